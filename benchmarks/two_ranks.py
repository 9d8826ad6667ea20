"""One job on two ranks against two independent one-process jobs at the same time, one thread each.

Weak scaling: the two ranks share a global batch of 2 · B, each of the others has B: the same work a process a step.
Strong scaling beside it: the two ranks share B. Examples/s are those of the training loop, from metrics.jsonl.

python benchmarks/two_ranks.py [--batch-size 512]
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measuring import arguments, opened, ratio, report, simulated, table, workplace

USERS, EVENTS = 5_000, 200_000
WARM_UP = 20  # steps


def start(data: Path, out: Path, batch_size: int, ranks: int) -> subprocess.Popen[bytes]:
    """A training job of one epoch, its processes on one thread each."""
    launcher = ["friendrec.pipeline.launch", "--nproc", str(ranks), "--"] if ranks > 1 else ["friendrec"]
    train = ["train", "two_tower_mlp", "--data", str(data), "--out", str(out), "--epochs", "1", "--max-minutes", "0.5"]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *launcher, *train, "--batch-size", str(batch_size)],
        env=os.environ | {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def examples_per_second(data: Path, folder: Path, batch_size: int, ranks: int, jobs: int) -> float:
    """Sum over `jobs` jobs of that size which run at the same time."""
    runs = [folder / f"run-{len(list(folder.iterdir()))}-{job}" for job in range(jobs)]
    started = [start(data, run, batch_size, ranks) for run in runs]
    if any(process.wait() for process in started):
        raise SystemExit("a training job failed: run it by hand to see why")
    return sum(speed(run, batch_size) for run in runs)


def speed(run: Path, batch_size: int) -> float:
    """Examples a second between the warm-up and the last logged step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line and line["step"] >= WARM_UP]
    first, last = steps[0], steps[-1]
    return (last["step"] - first["step"]) * batch_size / (last["seconds"] - first["seconds"])


def measure(data: Path, folder: Path, batch_size: int, repeats: int) -> Sequence[str]:
    """A row of the table: median examples/s each way, and ratios within a repetition: median and range."""
    ways = {"independent": (batch_size, 1, 2), "weak": (2 * batch_size, 2, 1), "strong": (batch_size, 2, 1)}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            speeds[name].append(examples_per_second(data, folder, *way))
    typical = {name: f"{statistics.median(values):,.0f}" for name, values in speeds.items()}
    ratios = {name: ratio(speeds[name], speeds["independent"]) for name in ("weak", "strong")}
    return [data.name, typical["independent"], typical["weak"], ratios["weak"], typical["strong"], ratios["strong"]]


def run() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(users=USERS, events=EVENTS, repeats=3)
    parser.add_argument("--batch-size", type=int, default=512, help="B, the batch of one process")
    options = parser.parse_args()
    with workplace() as folder:
        (folder / "runs").mkdir()
        sets = [simulated(folder, options.users, options.events), *opened(options.data)]
        rows = [measure(data, folder / "runs", options.batch_size, options.repeats) for data in sets]
    size = options.batch_size
    header = [
        "log", f"two jobs of {size}, sum", f"two ranks, {2 * size} together", "weak", f"two ranks, {size} together",
        "strong",
    ]  # fmt: skip
    text = f"Examples/s, one thread a process, medians of {options.repeats}:\n\n"
    report("two_ranks", text + table(header, rows), options.write)


if __name__ == "__main__":
    run()
