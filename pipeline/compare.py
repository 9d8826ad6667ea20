"""Compare the steps of the climb: one run a row, and what each row adds to the one before.

All rows train on the same data, from the same seed, for as many steps of as many examples; of each the checkpoint that
validates best is evaluated like any run. What is finished is not made again: the same command goes on where it stopped.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from friendrec.errors import FriendrecError
from friendrec.pipeline import train
from friendrec.pipeline.arguments import comma_list, did_you_mean, parse_options
from friendrec.pipeline.config import RunConfig, run_inputs
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.launch import WORKER
from friendrec.pipeline.publish import is_finished, open_published, write_manifest

EXAMPLES = """
friendrec compare --data data --out comparison
friendrec compare --data data --out comparison --minutes 10 --nproc 2
friendrec compare --data data --out comparison --rows temporal,copy_term
"""
FILES = ("metrics.json", "report.html")


@dataclass(frozen=True)
class Row:
    """A step of the climb: a preset with some fields changed, and in words what it adds to the row before."""

    name: str
    adds: str
    preset: str
    overrides: Mapping[str, str | bool] = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        """The overrides as options of `friendrec train`."""
        names = {name: name.replace("_", "-") for name in self.overrides}
        return [
            f"--{'' if value else 'no-'}{names[name]}" if isinstance(value, bool) else f"--{names[name]}={value}"
            for name, value in self.overrides.items()
        ]


_PLAIN: dict[str, str | bool] = {
    "history_encoder": "none", "interaction": "none", "temporal": False, "copy_term": False,
}  # fmt: skip
_HISTORY = _PLAIN | {"history_encoder": "pooled_attention"}
ROWS = (
    Row("id_dot_product", "a product of two ids' vectors, taught by each user's last event", "two_tower_moe", _PLAIN),
    Row("history", "pooled attention over what the actor did before", "two_tower_moe", _HISTORY),
    Row("mlp", "an MLP over id, history and action", "two_tower_moe", _HISTORY | {"interaction": "mlp"}),
    Row("moe", "four MLPs and a gate in its place", "two_tower_moe", _HISTORY | {"interaction": "moe"}),
    Row(
        "temporal", "every event is an example, not each user's last alone", "two_tower_moe",
        {"history_encoder": "pooled_attention", "copy_term": False},
    ),
    Row(
        "copy_term", "a learned bonus for the actor's own contacts", "two_tower_moe",
        {"history_encoder": "pooled_attention"},
    ),
    Row("transformer", "a transformer over the history: the preset two_tower_moe", "two_tower_moe"),
)  # fmt: skip
"""Each differs from the one before in one field; a later phase appends its own."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    data: str
    """Directory or URL that `friendrec prepare` made."""
    out: str
    """Directory of the comparison: metrics.json, report.html, and rows/NAME/{run,report}."""
    rows: str = ""
    """Rows to compare, separated by commas, in the order above; all of them by default."""
    minutes: float = 2.0
    """Minutes that a row may train for; what it has by then is compared."""
    epochs: int = 6
    """Passes over the events of the train period. Who learns from fewer of them takes more passes and as many steps."""
    period: Literal["validation", "test"] = "validation"
    """Period that is scored. Decisions may be based on validation; each use of test is counted in the runs."""
    nproc: int = 1
    """Processes that train and evaluate together."""

    def __post_init__(self) -> None:
        if not self.minutes > 0 or min(self.epochs, self.nproc) < 1:
            raise FriendrecError("--minutes must be above 0, --epochs and --nproc at least 1")


@dataclass(frozen=True)
class Cell:
    """A row on its way: where it lies, and how it is trained."""

    row: Row
    place: Path
    train: list[str]
    config: RunConfig

    @property
    def run(self) -> Path:
        return self.place / "run"


def parse(argv: list[str]) -> CompareOptions:
    """`--data DATA --out REPORT`; the help explains the rows."""
    rows = "\n\n".join(f"{row.name}: {row.adds}." for row in ROWS)
    return parse_options(
        CompareOptions, argv, prog="friendrec compare", description=f"{__doc__}\n\nRows:\n\n{rows}", examples=EXAMPLES
    )


def main(options: CompareOptions) -> None:
    """Make what is missing of each row, then the table and the report."""
    rows = chosen_rows(options.rows)
    if "://" in options.out:
        raise FriendrecError(f"--out {options.out}: runs need a directory that every process can write to")
    open_published(options.data, "data")
    out, inputs = Path(options.out), {"data": options.data}
    if out.exists() and not out.is_dir():
        raise FriendrecError(f"{out} is not a directory: choose another --out")
    if not is_finished(out, kind="comparison", options=options, inputs=inputs):
        cells, budget = _plan(rows, options)
        print(f"[1/{len(cells) + 1}] baselines", flush=True)
        baselines = _report(out / "rows" / "baselines", options, baselines=True)
        reports = {}
        for number, cell in enumerate(cells, 2):
            print(f"[{number}/{len(cells) + 1}] {cell.row.name}: {cell.row.adds}", flush=True)
            _train(cell, options)
            reports[cell.row.name] = _report(cell.place, options, run=str(cell.run))
        _publish(cells, reports, baselines, budget, options)
    _show(out)


def chosen_rows(names: str) -> list[Row]:
    """The rows of those names, in their own order; all where none is named."""
    known = [row.name for row in ROWS]
    wanted = comma_list(names) or known
    for name in wanted:
        if name not in known:
            raise FriendrecError(f"--rows has no row {name!r}: {did_you_mean(name, known)}")
    return [row for row in ROWS if row.name in wanted]


def _plan(rows: list[Row], options: CompareOptions) -> tuple[list[Cell], dict[str, Any]]:
    """How each row is trained, and the budget of all: steps as for so many passes over every event.

    A row that was begun otherwise stops it before anything is trained.
    """
    from friendrec.datasets.prepared import load_prepared
    from friendrec.datasets.reader import Reader

    data = load_prepared(open_published(options.data, "data")[0])
    identity_inputs = run_inputs(options.data, None)
    cells: list[Cell] = []
    steps = 0
    for row in rows:
        place = Path(options.out) / "rows" / row.name
        words = [row.preset, "--data", options.data, "--out", str(place / "run"), "--resume", *row.flags]
        words += ["--max-minutes", str(options.minutes), "--patience", "0"]
        config = train.parse(words).config
        every, own = (
            Reader(data, config.context, reader, config.training.seed).steps
            for reader in (train.parse([*words, "--temporal"]).config.reader, config.reader)
        )
        steps = options.epochs * every
        words += ["--epochs", str(-(-steps // own))]
        cells.append(Cell(row, place, words, train.parse(words).config))
        begun = place / "run" / "config.json"
        if begun.exists() and json.loads(begun.read_text()) != cells[-1].config.identity(identity_inputs):
            raise FriendrecError(
                f"{place / 'run'} was trained on other data or with another budget: "
                "pass the same --data, --minutes and --epochs, or choose another --out"
            )
    batch = cells[0].config.reader.batch_size
    return cells, {"steps": steps, "batch_size": batch, "minutes": options.minutes, "processes": options.nproc}


def _train(cell: Cell, options: CompareOptions) -> None:
    inputs = run_inputs(options.data, None)
    if not is_finished(cell.run, kind="run", options=cell.config.settings(), inputs=inputs):
        _call(cell.place, ["train", *cell.train], options.nproc, cell.run)


def _report(place: Path, options: CompareOptions, run: str | None = None, baselines: bool = False) -> Path:
    """The report of a row, or of the baselines; a period has its own."""
    out = place / ("report" if options.period == "validation" else "report-test")
    wanted = EvaluateOptions(data=options.data, run=run, baselines=baselines, period=options.period, out=str(out))
    inputs = {"data": options.data} | ({"run": run} if run else {})
    if not is_finished(out, kind="report", options=wanted, inputs=inputs):
        words = ["evaluate", "--data", options.data, "--period", options.period, "--out", str(out)]
        words += (["--run", run] if run else []) + (["--baselines"] if baselines else [])
        _call(place, words, options.nproc, out)
    return out


def _call(place: Path, words: list[str], nproc: int, out: Path) -> None:
    """Run a verb in processes of its own, which publish `out`; progress is shown here, the rest is in PLACE/VERB.log.

    A signal ends it first, so that training leaves a checkpoint, then us.
    """
    launcher = (*WORKER[:-1], "friendrec.pipeline.launch", "--nproc", str(nproc), "--")
    place.mkdir(parents=True, exist_ok=True)
    log = place / f"{words[0]}.log"
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    with log.open("a") as said:
        process = subprocess.Popen([*(launcher if nproc > 1 else WORKER), *words], stdout=said, env=environment)
        try:
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
    if code or not (out / "manifest.json").exists():
        raise FriendrecError(f"{words[0]} of {place.name} stopped, see above and {log}; the same command goes on here")


def _publish(
    cells: list[Cell], reports: dict[str, Path], baselines: Path, budget: dict[str, Any], options: CompareOptions
) -> None:
    """The files, the manifest last: an older one is gone before any file is replaced."""
    from friendrec.pipeline.evaluation.comparison import compared, cost, write_comparison

    out = Path(options.out)
    metrics = compared(reports, baselines)
    for cell in cells:
        own = {"adds": cell.row.adds, "preset": cell.row.preset, "overrides": dict(cell.row.overrides)}
        metrics["rows"][cell.row.name] = own | metrics["rows"][cell.row.name] | cost(cell.run, options.data)
    metrics["budget"] = budget
    (out / "manifest.json").unlink(missing_ok=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    write_comparison(out / "report.html", metrics, options.data)
    write_manifest(out, kind="comparison", options=options, inputs={"data": options.data}, only=FILES)


def _show(out: Path) -> None:
    from rich.console import Console

    from friendrec.pipeline.summary import comparison_table

    console = Console()
    console.print(comparison_table(json.loads((out / "metrics.json").read_text())))
    console.print(f"{out}/report.html", soft_wrap=True, highlight=False)
