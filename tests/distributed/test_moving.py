"""A run of the real model resumed with its tables spread otherwise, as if nothing had changed, or told why not."""

import json
import os
import signal
from pathlib import Path

import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline.publish import open_published
from friendrec.sharding import checkpoint
from tests.training import at_step, kill, losses, publish_data, train_run

from .harness import Workers

ARGS = ("--epochs=1", "--workers=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("moving") / "data")


@pytest.fixture(scope="module")
def whole(workers: Workers, data: Path) -> dict[int, float]:
    """Losses of the run that nothing interrupted, all row-wise on two ranks."""
    workers.run(2, train_run, data, data.parent / "whole", *ARGS)
    return losses(data.parent / "whole")


def stop_after_nine(data: Path, out: Path, *args: str) -> None:
    with at_step(8, lambda: kill(signal.SIGTERM) if os.environ["RANK"] == "0" else None):
        train_run(data, out, *ARGS, *args)


def refusal(data: Path, out: Path, *args: str) -> str:
    with pytest.raises(FriendrecError) as caught:
        train_run(data, out, "--resume", *ARGS, *args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("before", "ranks", "after"),
    [
        ("row_wise", 1, "table_wise"),
        pytest.param("data_parallel", 3, "row_wise", marks=pytest.mark.long),
        pytest.param("table_wise", 2, "data_parallel", marks=pytest.mark.long),
        pytest.param("auto", 3, "auto", marks=pytest.mark.long),
    ],
)
def test_a_run_goes_on_with_another_sharding(
    workers: Workers, data: Path, whole: dict[int, float], tmp_path: Path, before: str, ranks: int, after: str
) -> None:
    out = tmp_path / "run"
    workers.run(2, stop_after_nine, data, out, f"--sharding={before}")
    assert max(losses(out)) == 9
    workers.run(ranks, train_run, data, out, "--resume", *ARGS, f"--sharding={after}")
    assert losses(out) == pytest.approx(whole, abs=1e-4)
    assert open_published(out, "run")[1].extra["sharding"]["sharding"] == after
    if after != "auto":
        plan = json.loads((out / "plan.json").read_text())
        assert {shard["sharding"] for shard in plan if shard["table"] == "user"} == {after}


def test_columns_go_on_as_they_are_and_not_otherwise(workers: Workers, data: Path, tmp_path: Path) -> None:
    out, columns = tmp_path / "run", "--sharding=column_wise"
    workers.run(2, train_run, data, tmp_path / "whole", *ARGS, columns)
    workers.run(2, stop_after_nine, data, out, columns)
    for ranks, sharding in ((1, "column_wise"), (2, "row_wise")):
        for line in workers.run(ranks, refusal, data, out, f"--sharding={sharding}"):
            assert "row-wise Adagrad's state of one shard says nothing" in line
            assert line.endswith("go on with column_wise on 2 processes")
    assert checkpoint.latest(out / "checkpoints") == out / "checkpoints" / "step-9"
    workers.run(2, train_run, data, out, "--resume", *ARGS, columns)
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
