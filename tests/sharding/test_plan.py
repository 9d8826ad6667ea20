"""Plans for any world size from one process without a process group."""

import io

import pytest
from rich.console import Console
from torch import nn

from friendrec.sharding.plan import human_bytes, make_plan, plan_table, rank_bytes, shards
from friendrec.sharding.tables import Table, embedding_bag_collection


def model(users: int) -> nn.Module:
    tables = (Table("user", users, 64, ("user",)), Table("action", 5, 64, ("action",)))
    return nn.ModuleDict({"tables": embedding_bag_collection(tables), "dense": nn.Linear(64, 10)})


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_user_table_is_split_evenly(world_size: int) -> None:
    mine = [shard for shard in shards(make_plan(model(1001), world_size)) if shard.table == "user"]
    per_rank = -(-1001 // world_size)
    assert [shard.sharding for shard in mine] == ["row_wise"] * world_size
    assert [(shard.rank, shard.first_row) for shard in mine] == [(r, r * per_rank) for r in range(world_size)]
    assert [shard.rows for shard in mine[:-1]] == [per_rank] * (world_size - 1)
    assert sum(shard.rows for shard in mine) == 1001


@pytest.mark.parametrize(("world_size", "sharding"), [(1, "row_wise"), (3, "row_wise"), (4, "table_wise")])
def test_a_table_too_short_for_all_ranks_lies_on_one(world_size: int, sharding: str) -> None:
    mine = [shard for shard in shards(make_plan(model(1001), world_size)) if shard.table == "action"]
    assert {shard.sharding for shard in mine} == {sharding}
    assert all(shard.rows for shard in mine)


def test_bytes_a_rank_needs() -> None:
    toy = model(1000)
    plan = make_plan(toy, 2)
    dense = 4 * 4 * (64 * 10 + 10)  # parameter, gradient, two moments; four bytes each
    assert rank_bytes(toy, plan, 2) == [500 * 65 * 4 + 3 * 65 * 4 + dense, 500 * 65 * 4 + 2 * 65 * 4 + dense]


def test_a_plan_larger_than_this_machine_is_still_printed() -> None:
    toy = model(10**11)
    out = io.StringIO()
    Console(file=out, width=100).print(plan_table(toy, make_plan(toy, 2), 2))
    assert "50,000,000,000" in out.getvalue()
    assert "11.6 TiB" in out.getvalue()


def test_human_bytes() -> None:
    shown = [human_bytes(n) for n in (0, 1023, 1024, 3 * 2**30, 2**50)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "3.0 GiB", "1024.0 TiB"]
