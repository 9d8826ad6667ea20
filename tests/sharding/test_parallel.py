"""One process without torchrun: a process group of one, no port, the same code."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from friendrec.sharding.parallel import local_shards, process_group, shard
from friendrec.sharding.plan import make_plan
from friendrec.sharding.tables import Table, embedding_bag_collection, initial_rows


@pytest.fixture(autouse=True)
def outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_group_of_one_opens_and_closes_again_and_again() -> None:
    for _ in range(2):
        with process_group() as device:
            assert (dist.get_rank(), dist.get_world_size(), device.type) == (0, 1, "cpu")
        assert not dist.is_initialized()


def test_the_group_closes_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="boom"), process_group():
        raise RuntimeError("boom")
    assert not dist.is_initialized()


def test_sharding_initialises_rows_and_dense_from_the_seed() -> None:
    with torch.device("meta"):
        dense = nn.Linear(8, 2)
    model = nn.ModuleDict({"tables": embedding_bag_collection([Table("user", 70_000, 8, ("user",))]), "dense": dense})
    with process_group() as device:
        dmp = shard(model, make_plan(model, 1), device, seed=5)
        (part,) = local_shards(dmp, "user")
        assert (part.first_row, part.first_column) == (0, 0)
        assert torch.equal(
            part.values, initial_rows(5, "user", range(70_000), 8)
        )  # more rows than one chunk of the filling
    torch.manual_seed(5)
    assert torch.equal(dmp.module["dense"].weight, nn.Linear(8, 2).weight)
