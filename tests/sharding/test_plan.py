"""Plans for any world size from one process without a process group."""

import io
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from friendrec.errors import FriendrecError
from friendrec.sharding.config import Sharding, ShardingConfig
from friendrec.sharding.plan import human_bytes, make_plan, plan_table, rank_bytes, shards
from friendrec.sharding.tables import Table, embedding_bag_collection


def model(users: int) -> nn.Module:
    tables = (Table("user", users, 64, ("user",)), Table("action", 5, 64, ("action",)))
    return nn.ModuleDict({"tables": embedding_bag_collection(tables), "dense": nn.Linear(64, 10)})


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_user_table_is_split_evenly(world_size: int) -> None:
    mine = [shard for shard in shards(model(1001), make_plan(model(1001), world_size)) if shard.table == "user"]
    per_rank = -(-1001 // world_size)
    assert [shard.sharding for shard in mine] == ["row_wise"] * world_size
    assert [(shard.rank, shard.first_row) for shard in mine] == [(r, r * per_rank) for r in range(world_size)]
    assert [shard.rows for shard in mine[:-1]] == [per_rank] * (world_size - 1)
    assert sum(shard.rows for shard in mine) == 1001


@pytest.mark.parametrize(("world_size", "sharding"), [(1, "row_wise"), (3, "row_wise"), (4, "table_wise")])
def test_a_table_too_short_for_all_ranks_lies_on_one(world_size: int, sharding: str) -> None:
    mine = [shard for shard in shards(model(1001), make_plan(model(1001), world_size)) if shard.table == "action"]
    assert {shard.sharding for shard in mine} == {sharding}
    assert all(shard.rows for shard in mine)


@pytest.mark.parametrize(
    ("rows", "config", "sharding"),
    [
        (1 << 14, {}, "data_parallel"),  # 4 MiB
        ((1 << 14) + 1, {}, "row_wise"),
        (1, {}, "data_parallel"),
        (1 << 14, {"sharding": "table_wise"}, "data_parallel"),  # which says where the user table lies
        (1 << 14, {"table_sharding": {"cluster": "row_wise"}}, "row_wise"),
        ((1 << 14) + 1, {"table_sharding": {"cluster": "data_parallel"}}, "data_parallel"),
    ],
)
def test_what_every_batch_reads_whole_is_copied_while_it_is_small(
    rows: int, config: dict[str, Any], sharding: str
) -> None:
    tables = [Table(name, rows, 64, (name,)) for name in ("cluster", "other")]
    toy = nn.ModuleDict({"tables": embedding_bag_collection(tables)})
    found = shards(toy, make_plan(toy, 2, ShardingConfig(**config)))
    assert {(s.table, s.sharding) for s in found} == {
        ("cluster", sharding),
        ("other", "row_wise" if rows > 1 else "table_wise"),
    }
    held = sorted(s.rows for s in found if s.table == "cluster")
    assert held == ([rows] * 2 if sharding == "data_parallel" else [rows // 2, rows - rows // 2])


DENSE = 4 * 4 * (64 * 10 + 10)  # parameter, gradient, two moments; four bytes each
SMALL = 5 * 65 * 4  # the action table and its momentum


@pytest.mark.parametrize(
    ("sharding", "each"),
    [
        ("row_wise", 500 * 65 * 4),  # a momentum a row
        ("column_wise", 1000 * 33 * 4),  # half of the columns, and a momentum a row again
        ("data_parallel", 1000 * (64 + 64 + 1) * 4),  # weight, gradient, momentum
    ],
)
def test_bytes_a_rank_needs(sharding: Sharding, each: int) -> None:
    toy = model(1000)
    config = ShardingConfig(sharding=sharding, table_sharding={"action": "table_wise"})
    assert sorted(rank_bytes(toy, make_plan(toy, 2, config), 2)) == [each + DENSE, each + SMALL + DENSE]


def test_a_whole_table_is_needed_on_one_rank() -> None:
    toy = model(1000)
    need = rank_bytes(toy, make_plan(toy, 3, ShardingConfig(sharding="table_wise")), 3)
    assert sorted(need)[-1] >= 1000 * 65 * 4 + DENSE
    assert sum(need) == 1000 * 65 * 4 + SMALL + 3 * DENSE


@pytest.mark.parametrize(("world_size", "columns"), [(2, 2), (3, 2), (4, 4)])
def test_columns_are_split_into_as_many_equal_parts_as_fit(world_size: int, columns: int) -> None:
    toy = model(1000)
    mine = [
        s for s in shards(toy, make_plan(toy, world_size, ShardingConfig(sharding="column_wise"))) if s.table == "user"
    ]
    assert [(s.first_row, s.first_column, s.rows, s.dim) for s in mine] == [
        (0, i * 64 // columns, 1000, 64 // columns) for i in range(columns)
    ]
    assert len({s.rank for s in mine}) == columns


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_the_planner_chooses_what_can_move_between_world_sizes(world_size: int) -> None:
    toy = model(100_000)
    plan = make_plan(toy, world_size, ShardingConfig(sharding="auto"))
    assert {s.sharding for s in shards(toy, plan)} <= {"row_wise", "table_wise", "data_parallel"}
    assert {s.table for s in shards(toy, plan)} == {"user", "action"}


def test_a_table_goes_where_its_own_line_says() -> None:
    toy = model(1000)
    plan = make_plan(
        toy, 2, ShardingConfig(sharding="auto", table_sharding={"user": "row_wise", "action": "data_parallel"})
    )
    assert [(s.table, s.sharding) for s in shards(toy, plan)] == [
        *[("user", "row_wise")] * 2,
        *[("action", "data_parallel")] * 2,
    ]


@pytest.mark.parametrize(
    ("config", "world_size", "says"),
    [
        ({"table_sharding": {"acton": "row_wise"}}, 2, "no table 'acton': the tables are user, action"),
        ({"table_sharding": {"action": "row_wise"}}, 4, "its 5 rows do not go round 4 processes"),
        ({"table_sharding": {"narrow": "column_wise"}}, 2, "FBGEMM wants columns in fours"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(config: dict[str, Any], world_size: int, says: str) -> None:
    tables = [Table("user", 99, 64, ("user",)), Table("action", 5, 64, ("action",))]
    if "narrow" in config["table_sharding"]:
        tables.append(Table("narrow", 99, 4, ("narrow",)))
    toy = nn.ModuleDict({"tables": embedding_bag_collection(tables)})
    with pytest.raises(FriendrecError, match=says):
        make_plan(toy, world_size, ShardingConfig(**config))


def test_the_planner_counts_on_the_memory_that_is_there() -> None:
    with pytest.raises(FriendrecError, match=r"finds no place for the tables in .*iB a process"):
        make_plan(model(10**11), 2, ShardingConfig(sharding="auto"))


@pytest.mark.parametrize("bad", [{"sharding": "rows"}, {"table_sharding": {"action": "rows"}}, {"device": "tpu"}])
def test_bad_values_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(FriendrecError, match=r"rows|tpu"):
        ShardingConfig(**bad)


def test_a_plan_larger_than_this_machine_is_still_printed() -> None:
    toy = model(10**11)
    out = io.StringIO()
    Console(file=out, width=100).print(plan_table(toy, make_plan(toy, 2), 2))
    assert "50,000,000,000" in out.getvalue()
    assert "11.6 TiB" in out.getvalue()


def test_human_bytes() -> None:
    shown = [human_bytes(n) for n in (0, 1023, 1024, 3 * 2**30, 2**50)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "3.0 GiB", "1024.0 TiB"]
