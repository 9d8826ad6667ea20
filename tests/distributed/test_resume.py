"""Runs that are killed or preempted at any moment, and go on as if nothing had happened."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from friendrec.pipeline.job import Job
from friendrec.pipeline.publish import open_published
from friendrec.sharding import checkpoint
from tests.training import SMALL, at_step, kill, losses, publish_data, recorded, train_run

from .harness import Workers

ARGS = ("--epochs=2", "--patience=0", "--checkpoint-steps=6", "--workers=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("resume") / "data")


@pytest.fixture(scope="module")
def whole(workers: Workers, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupted."""
    out = tmp_path_factory.mktemp("resume") / "whole"
    workers.run(2, train_run, data, out, *ARGS)
    return out


def die(readers: Path) -> None:
    """Write down the reader's processes, which must not outlive this one, and be killed."""
    readers.write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
    kill()


def train_and_be_killed(data: Path, out: Path, moment: str, readers: Path) -> None:
    own, step = readers / os.environ["RANK"], moment.removeprefix("step ")
    last = os.environ["RANK"] == "1"
    killed: Any = {
        "checkpoint": patch.object(checkpoint, "_write_durably", lambda *_: die(own)),  # files written, not yet whole
        "validation": patch.object(Job, "validate", lambda _: die(own) if last else time.sleep(60)),
        "publication": patch("friendrec.pipeline.train.write_manifest", lambda *_, **__: die(own)),
    }.get(moment) or at_step(int(step), lambda: die(own) if last else None)
    with killed:
        train_run(data, out, *ARGS)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "moment",
    [
        "step 15",
        pytest.param("checkpoint", marks=pytest.mark.long),
        pytest.param("step 3", marks=pytest.mark.long),
        pytest.param("step 28", marks=pytest.mark.long),
        pytest.param("validation", marks=pytest.mark.long),
        pytest.param("publication", marks=pytest.mark.long),
    ],
)
def test_killed_and_resumed(workers: Workers, data: Path, whole: Path, tmp_path: Path, moment: str) -> None:
    out, readers = tmp_path / "run", tmp_path / "readers"
    readers.mkdir()
    with pytest.raises(AssertionError, match="exit code -9"):
        workers.run(2, train_and_be_killed, data, out, moment, readers)
    assert not (out / "manifest.json").exists()
    if (out / "metrics.jsonl").exists():
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9')  # as when the kill came in the middle of a line
    workers.run(2, train_run, data, out, "--resume", *ARGS)
    assert_same(recorded(out), recorded(whole), 1e-6)
    assert open_published(out, "run", verify=True)[1].extra["checkpoint"] == best(whole)
    orphans = [int(pid) for file in readers.iterdir() for pid in file.read_text().split()]
    assert orphans or moment in ("validation", "publication")  # when the readers have ended
    deadline = time.monotonic() + 20
    while any(map(is_alive, orphans)):
        assert time.monotonic() < deadline, "reader processes outlived the trainer"
        time.sleep(0.1)


def assert_same(resumed: dict[int, Any], expected: dict[int, Any], tolerance: float) -> None:
    """The same steps with the same losses and the same metrics."""
    assert resumed.keys() == expected.keys()
    for step, value in expected.items():
        tasks = value.items() if isinstance(value, dict) else [(None, value)]
        for task, wanted in tasks:
            got = resumed[step] if task is None else resumed[step][task]
            assert got == pytest.approx(wanted, abs=tolerance), (step, task)


def best(run: Path) -> str:
    checkpoint: str = open_published(run, "run")[1].extra["checkpoint"]
    return checkpoint


def train_and_be_asked_to_stop(data: Path, out: Path, step: int, *args: str) -> None:
    """SIGTERM reaches one rank only; all stop after the same step."""
    with at_step(step, lambda: kill(signal.SIGTERM) if int(os.environ["RANK"]) == 0 else None):
        train_run(data, out, *ARGS, *args)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long), 3])
def test_a_run_of_two_goes_on_at_any_world_size(
    workers: Workers, data: Path, whole: Path, tmp_path: Path, world_size: int
) -> None:
    out, stopped = tmp_path / "run", 20 if world_size == 2 else 13  # 20 is the last step of an epoch
    workers.run(2, train_and_be_asked_to_stop, data, out, stopped - 1)
    assert not (out / "manifest.json").exists()
    assert max(recorded(out)) == stopped
    assert checkpoint.latest(out / "checkpoints") == out / "checkpoints" / f"step-{stopped}"
    workers.run(world_size, train_run, data, out, "--resume", *ARGS)
    assert losses(out) == pytest.approx(losses(whole), abs=1e-6 if world_size == 2 else 1e-4)
    assert open_published(out, "run")[1].extra["world_size"] == world_size


SLOW = """
import sys, time
from unittest.mock import patch
from friendrec.pipeline import cli, job
log = job.Job.log
job.LOG_EVERY = 1
job.Job.log = lambda self, progress, **values: (time.sleep(0.1), log(self, progress, **values))
sys.exit(cli.main(sys.argv[1:]))
"""
LAUNCH = """
import sys
from friendrec.pipeline.launch import LaunchOptions, launch
sys.exit(launch(LaunchOptions(nproc=2), [sys.executable, *sys.argv[1:]]))
"""


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_is_a_checkpoint_and_success(
    workers: Workers, data: Path, whole: Path, tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "run"
    train = ["-c", SLOW, "train", "two_tower_mlp", f"--data={data}", f"--out={out}", *SMALL, *ARGS]
    command = [sys.executable, *train] if processes == 1 else [sys.executable, "-c", LAUNCH, *train]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(out, 4)
    trainer.send_signal(signal.SIGTERM)
    told, err = trainer.communicate(timeout=60)
    assert trainer.returncode == 0, err
    assert "go on with --resume" in told
    assert told.count("\n") == 1
    assert "Warning" not in err
    assert 4 <= max(recorded(out)) < max(recorded(whole))
    workers.run(2, train_run, data, out, "--resume", *ARGS)
    assert losses(out) == pytest.approx(losses(whole), abs=1e-4)


def wait_for_steps(out: Path, steps: int) -> None:
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < steps:
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.05)


def be_stopped_with_the_readers() -> None:
    for child in multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, signal.SIGTERM)
    kill(signal.SIGTERM)


def train_and_be_stopped_with_the_readers(data: Path, out: Path) -> None:
    with at_step(9, be_stopped_with_the_readers):
        train_run(data, out, *ARGS)


@pytest.mark.long
def test_sigterm_to_all_processes_at_once(workers: Workers, data: Path, whole: Path, tmp_path: Path) -> None:
    """What a scheduler does that ends every process of a job, readers included."""
    workers.run(2, train_and_be_stopped_with_the_readers, data, tmp_path / "run")
    assert max(recorded(tmp_path / "run")) == 10
    workers.run(2, train_run, data, tmp_path / "run", "--resume", *ARGS)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-6)


@pytest.mark.long
def test_plain_torchrun(workers: Workers, data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    friendrec = [sys.executable, "-P", "-m", "friendrec"]
    train = ["train", "two_tower_mlp", f"--data={data}", f"--out={out}", *SMALL, *ARGS]
    result = subprocess.run([*torchrun, *friendrec, *train], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    ours, expected = losses(out), losses(whole)
    assert ours == pytest.approx({step: expected[step] for step in ours}, abs=1e-6)
