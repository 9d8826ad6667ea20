"""Checkpoints move between world sizes whole, and damaged or foreign ones are refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from friendrec.errors import FriendrecError
from friendrec.sharding import checkpoint
from friendrec.sharding.config import Sharding
from friendrec.sharding.tables import Table

from .harness import Workers
from .toy import TABLES, Parts, all_parts, assembled, sharded, toy, train, whole

EXTRA = {"epoch": 1, "step": 10, "config": {"dim": 8}}


def save_and_go_on(folder: Path, sharding: Sharding) -> tuple[list[float], torch.Tensor]:
    dmp, optimizers = sharded(sharding=sharding)
    train(dmp, optimizers, range(10))
    checkpoint.save(folder, 10, dmp, optimizers, EXTRA)
    noise = torch.rand(3)
    return train(dmp, optimizers, range(10, 20)), noise


def resume(folder: Path, sharding: Sharding) -> tuple[dict[str, Any], list[float], torch.Tensor]:
    dmp, optimizers = sharded(sharding=sharding)
    path = checkpoint.latest(folder)
    assert path is not None
    extra = checkpoint.load(path, dmp, optimizers)
    noise = torch.rand(3)
    return extra, train(dmp, optimizers, range(10, 20)), noise


ROW, TABLE, COLUMN, COPY = "row_wise", "table_wise", "column_wise", "data_parallel"
QUICK = [
    (2, ROW, 1, ROW),
    (2, ROW, 3, ROW),
    (2, ROW, 2, ROW),
    (2, ROW, 1, TABLE),
    (2, ROW, 3, COPY),
    (2, COPY, 1, ROW),
    (2, COLUMN, 2, COLUMN),
]
ALL = [(s, x, t, y) for s in (1, 2, 3) for x in (ROW, TABLE, COPY) for t in (1, 2, 3) for y in (ROW, TABLE, COPY)]


@pytest.mark.parametrize(
    ("saved", "before", "loaded", "after"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL if case not in QUICK)],
)
def test_a_checkpoint_moves_between_world_sizes_and_shardings(
    workers: Workers, tmp_path: Path, saved: int, before: Sharding, loaded: int, after: Sharding
) -> None:
    uninterrupted = workers.run(saved, save_and_go_on, tmp_path, before)
    for rank, (extra, losses, noise) in enumerate(workers.run(loaded, resume, tmp_path, after)):
        assert extra == EXTRA
        assert losses == pytest.approx(uninterrupted[0][0], abs=1e-6)
        if rank < saved:
            assert torch.equal(noise, uninterrupted[rank][1])


def refusal_of_columns(path: Path, sharding: Sharding) -> str:
    dmp, optimizers = sharded(sharding=sharding)
    with pytest.raises(FriendrecError) as caught:
        checkpoint.load(path, dmp, optimizers)
    checkpoint.load(path, dmp)  # the weights alone move freely
    return str(caught.value)


@pytest.mark.parametrize(
    ("saved", "before", "loaded", "after", "way"),
    [
        (2, COLUMN, 1, COLUMN, "column_wise on 2 processes"),
        (2, COLUMN, 2, ROW, "column_wise on 2 processes"),
        (1, ROW, 2, COLUMN, "another sharding than column_wise"),
    ],
)
def test_the_state_of_columns_is_refused_elsewhere(
    workers: Workers, tmp_path: Path, saved: int, before: Sharding, loaded: int, after: Sharding, way: str
) -> None:
    workers.run(saved, save_and_go_on, tmp_path, before)
    for line in workers.run(loaded, refusal_of_columns, tmp_path / "step-10", after):
        assert "table user" in line
        assert "row-wise Adagrad" in line
        assert line.endswith(way)
        assert "\n" not in line


def test_one_process_reads_a_table_split_by_columns_whole(workers: Workers, tmp_path: Path) -> None:
    parts = workers.run(2, save_columns, tmp_path)
    model = toy()
    checkpoint.load_whole(tmp_path / "step-3", model)
    for table in TABLES:
        weight = model.lookup["tables"].state_dict()[f"embedding_bags.{table.name}.weight"]
        assert torch.equal(weight, assembled(parts, table.name))


def save_columns(folder: Path) -> Parts:
    dmp, optimizers = sharded(sharding="column_wise")
    train(dmp, optimizers, range(3))
    checkpoint.save(folder, 3, dmp, optimizers, {})
    return all_parts(dmp)


def save_steps(folder: Path, steps: list[int], keep: int, protect: int | None = None) -> list[str]:
    dmp, optimizers = sharded()
    for step in steps:
        checkpoint.save(folder, step, dmp, optimizers, {}, keep, protect)
    dist.barrier()
    return sorted(path.name for path in folder.iterdir())


def refusal(path: Path, hidden: int, tables: tuple[Table, ...]) -> str:
    dmp, optimizers = sharded(hidden=hidden, tables=tables)
    with pytest.raises(FriendrecError) as caught:
        checkpoint.load(path, dmp, optimizers)
    return str(caught.value)


def load_model_only(path: Path) -> dict[str, Any]:
    return checkpoint.load(path, sharded()[0])


def test_the_newest_stay_and_the_model_alone_can_be_read(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / ".step-9").mkdir()  # what a killed run left
    names = workers.run(2, save_steps, tmp_path, [2, 3, 10, 11], 2, 3)
    assert names == [["step-10", "step-11", "step-3"]] * 2
    assert checkpoint.latest(tmp_path) == tmp_path / "step-11"
    assert workers.run(1, load_model_only, tmp_path / "step-11") == [{}]


def test_one_process_reads_the_tables_whole(workers: Workers, tmp_path: Path) -> None:
    workers.run(3, save_steps, tmp_path, [1], 1)
    model, expected = toy(), whole()
    with torch.no_grad():
        model.hidden.weight.zero_()
    checkpoint.load_whole(tmp_path / "step-1", model)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(FriendrecError, match="another model"):
        checkpoint.load_whole(tmp_path / "step-1", toy(hidden=4))


def test_a_damaged_checkpoint_is_passed_over_and_refused(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, save_steps, tmp_path, [1, 2, 3], 3)
    shard = tmp_path / "step-3" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    (tmp_path / "step-2" / "checkpoint.json").unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    for step, reason in ((3, "__1_0.distcp has another size"), (2, "not a complete checkpoint")):
        (line,) = workers.run(1, refusal, tmp_path / f"step-{step}", 16, TABLES)
        assert reason in line
        assert "\n" not in line
    metadata = tmp_path / "step-1" / ".metadata"
    metadata.write_bytes(b"\0" * metadata.stat().st_size)
    (line,) = workers.run(1, refusal, tmp_path / "step-1", 16, TABLES)
    assert "cannot be read" in line
    assert "\n" not in line


def test_a_checkpoint_of_another_model_is_refused(workers: Workers, tmp_path: Path) -> None:
    workers.run(1, save_steps, tmp_path, [1], 1)
    longer = (Table("user", 102, 8, ("user",)), *TABLES[1:])
    other = (*TABLES[:2], Table("course", 2, 8, ("direction",)))
    for hidden, tables, name in ((32, TABLES, "hidden.bias"), (16, longer, "user.w"), (16, other, "course.w")):
        for line in workers.run(2, refusal, tmp_path / "step-1", hidden, tables):
            assert "another model" in line
            assert name in line
            assert "\n" not in line


def test_nothing_saved_is_nothing_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None
