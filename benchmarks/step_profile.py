"""Where the time of a training step goes, and how many examples/s each preset trains: the presets take turns.

One process; batches are read beforehand (`input_stall.py` measures the reader). Forward is told apart by module. The
loss is the rest of forward: laying out candidates, their scores, the cross-entropy. Backward also computes the loss's
scores again and updates the tables.

python benchmarks/step_profile.py [--data DATA ...]
"""

import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import arguments, opened, ratio, report, simulated, table, workplace
from torch import nn

from friendrec.datasets.batch import Batch
from friendrec.pipeline import job
from friendrec.pipeline.config import preset

PRESETS = ("two_tower_mlp", "two_tower_moe")
MODULES = {"lookup": ("lookup",), "encoder": ("history",), "towers": ("query_tower", "target_tower", "copy_term")}
PARTS = (*MODULES, "loss", "backward", "optimizer")
USERS, EVENTS = 5_000, 200_000
Seconds = dict[str, float]


class Watch:
    """Adds up the seconds between a module's call and its answer."""

    def __init__(self, module: nn.Module, seconds: Seconds, part: str) -> None:
        self.seconds, self.part, self.begun = seconds, part, 0.0
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self.begun = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds[self.part] += time.perf_counter() - self.begun


def profile(name: str, data: Path, out: Path, num_batches: int, threads: int) -> tuple[Seconds, int]:
    """Seconds of each part over the batches, after as many to warm up, and the examples in them."""
    with job.start(preset(name), data, out) as running:
        torch.set_num_threads(threads)
        steps = np.linspace(0, running.reader.steps - 1, num_batches).astype(int).tolist()
        batches = [running.reader[0, step] for step in steps]
        for batch in batches:
            take_step(running, batch, defaultdict(float))
        seconds: Seconds = defaultdict(float)
        model = running.model.module
        for part, modules in MODULES.items():
            for module in modules:
                Watch(getattr(model, module), seconds, part)
        for batch in batches:
            take_step(running, batch, seconds)
    seconds["loss"] = seconds.pop("forward") - sum(seconds[part] for part in MODULES)
    return seconds, sum(len(batch.target) for batch in batches)


def take_step(running: job.Job, batch: Batch, seconds: Seconds) -> None:
    """A step as `train.fit` takes it, its stages timed."""
    times = [time.perf_counter()]
    running.optimizers.start_step(0, 1)
    times.append(time.perf_counter())
    loss = running.model(batch)
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    running.optimizers.finish_step()
    times.append(time.perf_counter())
    begin, forward, backward, finish = (b - a for a, b in pairwise(times))
    seconds["forward"] += forward
    seconds["backward"] += backward
    seconds["optimizer"] += begin + finish


def measure(data: Path, folder: Path, num_batches: int, repeats: int, threads: int) -> list[list[str]]:
    """A row of the table for each preset: medians over the repetitions."""
    found: dict[str, list[tuple[Seconds, int]]] = {name: [] for name in PRESETS}
    for repeat in range(repeats):
        for name in PRESETS:
            out = folder / f"{data.name}-{name}-{repeat}"
            found[name].append(profile(name, data, out, num_batches, threads))
    speeds = {name: [n / sum(seconds.values()) for seconds, n in runs] for name, runs in found.items()}
    return [
        [
            data.name,
            name,
            f"{1000 * statistics.median(sum(s.values()) for s, _ in runs) / num_batches:.1f}",
            *(f"{statistics.median(100 * s[part] / sum(s.values()) for s, _ in runs):.1f} %" for part in PARTS),
            f"{statistics.median(speeds[name]):,.0f}",
            ratio(speeds[name], speeds[PRESETS[0]]),
        ]
        for name, runs in found.items()
    ]


def run() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(users=USERS, events=EVENTS)
    parser.add_argument("--batches", type=int, default=20, help="batches, spread evenly over the epoch")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with workplace() as folder:
        sets = [simulated(folder, options.users, options.events), *opened(options.data)]
        rows = [
            row for data in sets for row in measure(data, folder, options.batches, options.repeats, options.threads)
        ]
    header = ["log", "preset", "ms a step", *PARTS, "examples/s", f"against {PRESETS[0]}"]
    batch = preset(PRESETS[0]).reader.batch_size
    text = f"Batches of about {batch} examples, {options.threads} thread(s), medians of {options.repeats}:\n\n"
    report("step_profile", text + table(header, rows), options.write)


if __name__ == "__main__":
    run()
