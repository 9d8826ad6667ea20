"""Share of a training step that is spent waiting for the reader, at the defaults, on one process and on two ranks.

The first batch of an epoch, which waits for the reader's processes to start, is told apart.

python benchmarks/input_stall.py
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from measuring import arguments, opened, report, simulated, table, workplace

from friendrec.datasets.batch import Batch
from friendrec.pipeline import job
from friendrec.pipeline.config import preset

USERS, EVENTS = 5_000, 200_000


def train(data: Path, out: Path, steps: int) -> None:
    """Take steps on this rank as `train.fit` does; rank 0 leaves its seconds in `out/stall.json`."""
    with job.start(preset("two_tower_mlp"), data, out) as running:
        waits: list[float] = []
        running.reader.batches = timed(running.reader.batches, waits)  # type: ignore[method-assign,assignment]
        for step, batch in enumerate(running.batches(0, 0)):
            if step == 0:
                begun = time.perf_counter()
            if step == steps:
                break
            running.optimizers.start_step(0, steps)
            loss = running.model(batch)
            running.agree(loss, False, False)()
            loss.backward()
            running.optimizers.finish_step()
        seconds = {"first": waits[0], "waited": sum(waits[1:]), "total": time.perf_counter() - begun}
        if dist.get_rank() == 0:
            (out / "stall.json").write_text(json.dumps(seconds))


def timed(batches: Callable[[int, int], Iterator[Batch]], waits: list[float]) -> Callable[[int, int], Iterator[Batch]]:
    """The same batches, with the seconds that each was waited for noted; ranks waiting for each other is not in it."""

    def read(epoch: int, step: int) -> Iterator[Batch]:
        reading = batches(epoch, step)
        while True:
            asked = time.perf_counter()
            batch = next(reading)
            waits.append(time.perf_counter() - asked)
            yield batch

    return read


def measure(data: Path, out: Path, ranks: int, steps: int) -> list[str]:
    """A row of the table, from processes of their own."""
    out.mkdir()
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    task = ["--data", str(data), "--task", str(out), "--steps", str(steps)]
    subprocess.run([sys.executable, "-m", *launcher, *task], check=True, capture_output=True)
    seconds = json.loads((out / "stall.json").read_text())
    share = seconds["waited"] / seconds["total"]
    step = 1000 * seconds["total"] / steps
    return [data.name, str(ranks), f"{step:.1f}", f"**{100 * share:.1f} %**", f"{1000 * seconds['first']:.0f}"]


def run() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(users=USERS, events=EVENTS)
    parser.add_argument("--steps", type=int, default=100, help="steps after the first batch")
    parser.add_argument("--task", type=Path, help="where a rank leaves its seconds: set by the benchmark itself")
    options = parser.parse_args()
    if options.task:
        train(Path(options.data[0]), options.task, options.steps)
        return
    with workplace() as folder:
        sets = [simulated(folder, options.users, options.events), *opened(options.data)]
        rows = [
            measure(data, folder / f"out-{number}-{ranks}", ranks, options.steps)
            for number, data in enumerate(sets)
            for ranks in (1, 2)
        ]
    header = ["log", "ranks", "ms a step", "waiting for the reader", "first batch ms"]
    report("input_stall", f"{options.steps} steps:\n\n" + table(header, rows), options.write)


if __name__ == "__main__":
    run()
