"""Test what matters more, a smaller search or a better model: cross both, on one log or several.

Models {two_tower_mlp, two_tower_moe} × {without clusters, with clusters} × {all users, 10 %, 1 % of them compared},
each with several seeds. Runs with clusters are searched by their own lists, the others by lists of k-means (FAISS). For
each factor the effect on live new_link Recall@10 (validation period) and on queries/s, with intervals. A share that no
list fits in is told and left out. What is finished is not made again, and runs of `friendrec compare` are taken as they
are.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from friendrec.errors import FriendrecError
from friendrec.pipeline.arguments import comma_list
from friendrec.pipeline.cells import Budget, Cell, made_before, plan, train_cell
from friendrec.pipeline.climb import Row
from friendrec.pipeline.publish import is_finished, open_published, publish, write_manifest

EXAMPLES = """
friendrec insight --data collegemsg --data mathoverflow --out insight
friendrec insight --data data --out insight --seeds 0,1,2 --minutes 10 --nproc 2
friendrec insight --data data --out insight --comparisons comparison
"""
FILES = ("metrics.json", "report.html")
MODELS = {"mlp": "two_tower_mlp", "moe": "two_tower_moe"}


@dataclass(frozen=True, kw_only=True)
class InsightOptions:
    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """Directory or URL that `friendrec prepare` made; again for another one."""
    out: str
    """Directory of the test: metrics.json, report.html, and DATA/rows/NAME/{run,searches}."""
    seeds: str = "0,1,2"
    """Seeds that each model is trained with, separated by commas. More narrow what chance may explain."""
    minutes: float = 2.0
    """Minutes that a run may train for, as in `friendrec compare`."""
    epochs: int = 6
    """Passes over the events of the train period, as there."""
    nproc: int = 1
    """Processes that train together."""
    comparisons: str = ""
    """Directories that `friendrec compare` or this command made, separated by commas: finished runs of the same
    settings, data and budget are taken from there."""

    def __post_init__(self) -> None:
        if not self.data:
            raise FriendrecError("nothing to test: pass --data DATA, what `friendrec prepare` made")
        if not self.minutes > 0 or min(self.epochs, self.nproc) < 1:
            raise FriendrecError("--minutes must be above 0, --epochs and --nproc at least 1")
        if not all(seed.isdecimal() for seed in comma_list(self.seeds)) or not comma_list(self.seeds):
            raise FriendrecError(f"--seeds {self.seeds}: give whole numbers from 0 on, as 0,1,2")
        if len(set(self.each_seed)) < len(self.each_seed):
            raise FriendrecError(f"--seeds {self.seeds}: one is there twice, give each once")
        if not all(self.names):
            path = self.data[self.names.index("")]
            raise FriendrecError(f"--data {path} has no name, which its runs would lie under: pass it by another path")
        if len(set(self.names)) < len(self.names):
            raise FriendrecError(f"--data {' '.join(self.data)}: two are of one name, give their directories two names")

    @property
    def each_seed(self) -> list[int]:
        """The seeds as numbers."""
        return [int(seed) for seed in comma_list(self.seeds)]

    @property
    def names(self) -> list[str]:
        """What each data set is called: the last part of its path, "" where there is none."""
        return [_name(path) for path in self.data]

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on beside the data."""
        seeds = ",".join(str(seed) for seed in self.each_seed)
        return {"seeds": seeds, "minutes": self.minutes, "epochs": self.epochs}


def main(options: InsightOptions) -> None:
    """Train what is missing, search it, then the table, the page and what was found."""
    if "://" in options.out:
        raise FriendrecError(f"--out {options.out}: runs need a directory that every process can write to")
    for path in options.data:
        open_published(path, "data")
    out, inputs = Path(options.out), dict(zip(options.names, options.data, strict=True))
    if out.exists() and not out.is_dir():
        raise FriendrecError(f"{out} is not a directory: choose another --out")
    if not is_finished(out, kind="insight", options=options.settings, inputs=inputs):
        planned = {name: _plan(options, name, path) for name, path in inputs.items()}
        for name, cells in planned.items():
            _make(options, name, inputs[name], cells)
        _publish(options, planned, inputs)
    _show(out)


def _name(path: str) -> str:
    """The last part of a path once `.`, `..` and links are followed, or of a URL as it is."""
    if "://" not in path:
        return Path(path).resolve().name
    last = path.partition("://")[2].rstrip("/").rpartition("/")[2]
    return "" if last in (".", "..") else last


def rows_of(seed: int) -> list[Row]:
    """The four models of a seed: without clusters and with them, in this order."""
    return [
        Row(
            f"{short}{'-clusters' if clusters else ''}-{seed}",
            f"{preset} with{'' if clusters else 'out'} clusters, seed {seed}",
            preset,
            {"seed": str(seed)} | ({"clusters": "residual"} if clusters else {}),
        )
        for short, preset in MODELS.items()
        for clusters in (False, True)
    ]


def _plan(options: InsightOptions, name: str, path: str) -> list[Cell]:
    """The runs of a data set: seed by seed the four models; those that were made elsewhere are taken from there."""
    from friendrec.datasets.prepared import load_prepared

    budget = _budget(options, path)
    data = load_prepared(open_published(path, "data")[0])
    cells = [
        plan(row, Path(options.out) / name / "rows" / row.name, budget, data)
        for seed in options.each_seed
        for row in rows_of(seed)
    ]
    elsewhere = list(_runs(comma_list(options.comparisons)))
    return [cell if cell.run.exists() else made_before(cell, budget, elsewhere) for cell in cells]


def _budget(options: InsightOptions, path: str) -> Budget:
    return Budget(data=path, minutes=options.minutes, epochs=options.epochs, nproc=options.nproc)


def _runs(comparisons: list[str]) -> Iterator[Path]:
    """Every run of these directories, begun or finished."""
    for directory in comparisons:
        if not Path(directory).is_dir():
            raise FriendrecError(f"--comparisons {directory} does not exist: pass what `friendrec compare` made")
        for pattern in ("rows/*/run", "*/rows/*/run"):
            yield from sorted(Path(directory).glob(pattern))


def _make(options: InsightOptions, name: str, path: str, cells: list[Cell]) -> None:
    """Train and search what is not yet."""
    from friendrec.pipeline.evaluation.reduced import SHARES, searched

    for number, cell in enumerate(cells, 1):
        taken = "" if cell.run.parent == cell.place else f", taken from {cell.run}"
        print(f"{name} [{number}/{len(cells)}] {cell.row.adds}{taken}", flush=True)
        if not taken:
            train_cell(cell, _budget(options, path))
        wanted, inputs = {"shares": list(SHARES)}, {"run": str(cell.run), "data": path}
        if not is_finished(cell.place / "searches", kind="searches", options=wanted, inputs=inputs):
            shutil.rmtree(cell.place / "searches", ignore_errors=True)  # of a run that was elsewhere before
            with (
                publish(cell.place / "searches", kind="searches", options=wanted, inputs=inputs) as attempt,
                _bar(f"searching {cell.row.name}") as advance,
            ):
                searched(cell.run, path, advance).save(attempt)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function that moves a bar on: so many done, of how many."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def _publish(options: InsightOptions, planned: dict[str, list[Cell]], inputs: dict[str, str]) -> None:
    """Measure speeds, side by side, then write the files, the manifest last."""
    import numpy as np

    from friendrec.pipeline.evaluation.insight_page import figures_of, write_insight
    from friendrec.pipeline.evaluation.reduced import Searches
    from friendrec.pipeline.evaluation.speed import measure

    out, seeds = Path(options.out), options.each_seed
    metrics: dict[str, Any] = {"budget": options.settings | {"processes": options.nproc}, "data": {}}
    for name, cells in planned.items():
        print(f"{name}: queries/s, all cells in turns on one thread", flush=True)
        runs = [str(cell.run) for cell in cells]
        searches = [Searches.load(cell.place / "searches") for cell in cells]
        with _bar("timing") as advance:
            seconds = measure(runs, inputs[name], np.stack([search.nprobe for search in searches]), advance)
        found = figures_of(name, runs, seeds, searches, seconds)
        found["notes"] += _cut_short(cells, options.minutes)
        metrics["data"][name] = found
    (out / "manifest.json").unlink(missing_ok=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    write_insight(out / "report.html", metrics, inputs)
    write_manifest(out, kind="insight", options=options.settings, inputs=inputs, only=FILES)


def _cut_short(cells: list[Cell], minutes: float) -> list[str]:
    """A line on the runs that had no time for all their steps: who trains more slowly learned from less."""
    taken = {cell.row.name: open_published(cell.run, "run")[1].extra["progress"]["step"] for cell in cells}
    short = [f"{cell.row.name} {taken[cell.row.name]:,}" for cell in cells if taken[cell.row.name] < cell.steps]
    if not short:
        return []
    return [f"{minutes:g} minutes were too few for the {cells[0].steps:,} steps of a run: {', '.join(short)}"]


def _show(out: Path) -> None:
    from rich.console import Console

    from friendrec.pipeline.summary import insight_table

    metrics, console = json.loads((out / "metrics.json").read_text()), Console()
    console.print(insight_table(metrics))
    for found in metrics["data"].values():
        for line in (*found["notes"], found["finding"]):
            console.print(f"\n{line}", soft_wrap=True, highlight=False)
    console.print(f"\n{out}/report.html", soft_wrap=True, highlight=False)
