"""One pass over a packed sequence against encoding each example's window anew: same model, same examples, one run.

The history encoder alone (forward and backward), and the whole training step around it. The longer the histories,
the more the single pass saves: the simulated regular log has short ones, the dense log and real ones long.

python benchmarks/history_encoder.py [--data DATA ...]
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measuring import arguments, medians, opened, report, simulated, table, workplace

from friendrec.datasets.batch import Batch
from friendrec.datasets.packing import Rows
from friendrec.datasets.reader import Reader
from friendrec.models.features import Slots
from friendrec.pipeline import job
from friendrec.pipeline.config import preset

DENSE = (500, 100_000)  # users and events of a log with long histories


class EachWindow(Reader):
    """Reads the same examples with the same negatives, but each example's window is a sequence of its own."""

    def _groups(self, part: Rows) -> Rows:
        return np.arange(len(part))


def encoder(running: job.Job, batches: list[Batch]) -> Callable[[], None]:
    """Forward and backward of the history encoder, down to the vectors that the lookup answered."""
    model = running.model.module
    with torch.no_grad():
        slots = [model.lookup(batch.context.ids) for batch in batches]

    def run() -> None:
        for batch, found in zip(batches, slots, strict=True):
            leaves = Slots(*(getattr(found, f.name).detach().requires_grad_() for f in dataclasses.fields(found)))
            model.history(batch.context, leaves).sum().backward()

    return run


def step(running: job.Job, batches: list[Batch]) -> Callable[[], None]:
    """Training steps as `train.fit` takes them."""

    def run() -> None:
        for batch in batches:
            running.optimizers.start_step(0, 1)
            loss = running.model(batch)
            running.agree(loss, False, False)()
            loss.backward()
            running.optimizers.finish_step()

    return run


def measure(data: Path, out: Path, num_batches: int, repeats: int, threads: int) -> list[str]:
    """A row of the table: sizes, and milliseconds a batch both ways."""
    config = preset("two_tower_mlp")
    with job.start(config, data, out) as running:
        torch.set_num_threads(threads)
        one_pass = running.reader
        each = EachWindow(one_pass.data, config.context, config.reader, config.training.seed)
        steps = np.linspace(0, one_pass.steps - 1, num_batches).astype(int).tolist()
        batches = {"one": [one_pass[0, s] for s in steps], "each": [each[0, s] for s in steps]}
        seconds = medians(
            {
                "encoder one": encoder(running, batches["one"]),
                "encoder each": encoder(running, batches["each"]),
                "step one": step(running, batches["one"]),
                "step each": step(running, batches["each"]),
            },
            repeats,
        )
    examples = sum(len(batch.target) for batch in batches["one"]) / num_batches
    events = {way: sum(len(batch.context.event_user) for batch in read) for way, read in batches.items()}
    milliseconds = {name: f"{1000 * total / num_batches:.1f}" for name, total in seconds.items()}
    return [
        data.name,
        f"{examples:.0f}",
        *(f"{count / num_batches:,.0f}" for count in events.values()),
        *(milliseconds[f"encoder {way}"] for way in batches),
        f"**{seconds['encoder each'] / seconds['encoder one']:.1f}×**",
        *(milliseconds[f"step {way}"] for way in batches),
        f"{seconds['step each'] / seconds['step one']:.1f}×",
    ]


def run() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, default=8, help="batches, spread evenly over the epoch")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with workplace() as folder:
        sets = [simulated(folder, options.users, options.events), simulated(folder, *DENSE), *opened(options.data)]
        rows = [
            measure(data, folder / f"run-{number}", options.batches, options.repeats, options.threads)
            for number, data in enumerate(sets)
        ]
    header = [
        "log", "examples a batch", "events one pass", "events each window",
        "encoder one pass ms", "each window ms", "ratio", "step one pass ms", "each window ms", "ratio",
    ]  # fmt: skip
    context = preset("two_tower_mlp").context.context_length
    text = f"Context length {context}, {options.threads} thread(s), medians of {options.repeats}, a batch:\n\n"
    report("history_encoder", text + table(header, rows), options.write)


if __name__ == "__main__":
    run()
