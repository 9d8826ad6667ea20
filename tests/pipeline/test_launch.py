"""The launcher gives each process its rank, hands SIGTERM on, and returns what the workers returned."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline.launch import LaunchOptions

LAUNCH = """
import json, sys
from friendrec.pipeline.launch import LaunchOptions, launch
options, command = json.loads(sys.argv[1])
sys.exit(launch(LaunchOptions(**options), command))
"""
WORKER = """
import os, signal, sys, time
from pathlib import Path
out, rank = Path(sys.argv[1]), os.environ["RANK"]

def checkpoint(signum, frame):
    time.sleep(0.5)
    (out / f"checkpoint-{rank}").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, checkpoint)
with (out / f"attempts-{rank}").open("a") as file:
    file.write(os.environ["WORLD_SIZE"])
"""


def start(worker: str, out: Path, **options: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WORKER + worker, str(out)]
    argv = [sys.executable, "-c", LAUNCH, json.dumps([options, command])]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(worker: str, out: Path, **options: int) -> tuple[int, str]:
    process = start(worker, out, **options)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def attempts(out: Path) -> list[str]:
    return [(out / f"attempts-{rank}").read_text() for rank in (0, 1)]


def test_every_rank_runs(tmp_path: Path) -> None:
    assert run("", tmp_path, nproc=2) == (0, "")
    assert attempts(tmp_path) == ["2", "2"]


@pytest.mark.parametrize(("worker", "expected"), [("time.sleep(60)", 0), ("signal.signal(15, 0); time.sleep(60)", 143)])
def test_sigterm_ends_with_what_the_workers_return(tmp_path: Path, worker: str, expected: int) -> None:
    process = start(worker, tmp_path, nproc=2)
    wait_for(lambda: len(list(tmp_path.glob("attempts-*"))) == 2)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == expected
    assert len(list(tmp_path.glob("checkpoint-*"))) == (2 if expected == 0 else 0)


def test_ctrl_c(tmp_path: Path) -> None:
    process = start("time.sleep(60)", tmp_path, nproc=2)
    wait_for(lambda: len(list(tmp_path.glob("attempts-*"))) == 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_failure_is_restarted_and_told(tmp_path: Path) -> None:
    code, err = run("time.sleep(0.5); sys.exit(3 if rank == '1' else 0)", tmp_path, nproc=2, max_restarts=1)
    assert (code, err) == (3, "error: rank 1 failed with exit code 3, see its output above\n")
    assert attempts(tmp_path) == ["22", "22"]


def test_killed_worker_is_told(tmp_path: Path) -> None:
    code, err = run("time.sleep(0.5); os.kill(os.getpid(), 9)", tmp_path, nproc=1)
    assert (code, err) == (137, "error: rank 0 was killed by SIGKILL\n")


def test_mistake_of_the_user_is_not_restarted(tmp_path: Path) -> None:
    code, err = run("time.sleep(0.5); sys.exit(2)", tmp_path, nproc=2, max_restarts=5)
    assert (code, err) == (2, "")
    assert attempts(tmp_path) == ["2", "2"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--nproc", "2", "--", "trian"], "there is no verb 'trian': did you mean train?"),
        (["--nprocs", "2", "--", "train"], "has no argument --nprocs: did you mean --nproc?"),
        (["--nproc", "0", "--", "train"], "--nproc and --nnodes must be at least 1"),
        (["--nproc", "2", "--", "pipeline"], "`friendrec pipeline` needs --interactions and --out"),
    ],
)
def test_mistakes_are_told_once_and_early(argv: Sequence[str], line: str) -> None:
    before = os.times()
    command = [sys.executable, "-P", "-m", "friendrec.pipeline.launch", *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    after = os.times()
    assert result.returncode == 2
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert after.children_user - before.children_user < 1


def test_several_machines_need_a_meeting_point() -> None:
    with pytest.raises(FriendrecError, match="needs --rdzv-id and --rdzv-endpoint HOST:PORT"):
        LaunchOptions(nnodes=2)
    LaunchOptions(nnodes=2, rdzv_id="job", rdzv_endpoint="$RANK0:29500")
