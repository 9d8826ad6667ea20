"""Compare the steps of the climb: one run a row, and what each row adds to the one before.

All rows train on the same data, from the same seed, for as many steps of as many examples; of each the checkpoint that
validates best is evaluated like any run. What is finished is not made again: the same command goes on where it stopped.
A row that writes codes of users takes them from the embeddings of another row, and both lists merged are a line more.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from friendrec.errors import FriendrecError
from friendrec.pipeline import train
from friendrec.pipeline.arguments import parse_options
from friendrec.pipeline.climb import ROWS, Row, chosen_rows
from friendrec.pipeline.config import RunConfig, run_inputs
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.export import ExportOptions
from friendrec.pipeline.launch import WORKER
from friendrec.pipeline.publish import is_finished, open_published, write_manifest
from friendrec.pipeline.tokenize import TokenizeOptions

EXAMPLES = """
friendrec compare --data data --out comparison
friendrec compare --data data --out comparison --minutes 10 --nproc 2
friendrec compare --data data --out comparison --rows temporal,copy_term
"""
FILES = ("metrics.json", "report.html")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    data: str
    """Directory or URL that `friendrec prepare` made."""
    out: str
    """Directory of the comparison: metrics.json, report.html, and rows/NAME/{run,report}."""
    rows: str = ""
    """Rows to compare, separated by commas, in the order above; all of them by default. stu brings transformer."""
    minutes: float = 2.0
    """Minutes that a row may train for; what it has by then is compared. Those of the row whose codes stu writes are
    not counted as its own."""
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

    @property
    def tokens(self) -> Path | None:
        """The codes that it writes."""
        return self.place / "stu" if self.row.codes_of else None

    @property
    def base(self) -> Path | None:
        """The run whose embeddings they are made of."""
        return self.place.parent / self.row.codes_of / "run" if self.row.codes_of else None

    def inputs(self, data: str) -> dict[str, str | Path]:
        """What its run is made from."""
        return run_inputs(data, None, str(self.tokens) if self.tokens else None)


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
            _tokenize(cell, options)
            _train(cell, options)
            reports[cell.row.name] = _report(cell.place, options, run=str(cell.run), also=cell.base)
        _publish(cells, reports, baselines, budget, options)
    _show(out)


def _plan(rows: list[Row], options: CompareOptions) -> tuple[list[Cell], dict[str, Any]]:
    """How each row is trained, and the budget of all: steps as for so many passes over every event.

    A row that was begun otherwise stops it before anything is trained.
    """
    from friendrec.datasets.prepared import load_prepared
    from friendrec.datasets.reader import Reader

    data = load_prepared(open_published(options.data, "data")[0])
    cells: list[Cell] = []
    steps = 0
    for row in rows:
        place = Path(options.out) / "rows" / row.name
        words = [row.preset, "--data", options.data, "--out", str(place / "run"), "--resume", *row.flags]
        words += ["--max-minutes", str(options.minutes), "--patience", "0"]
        words += ["--tokens", str(place / "stu")] if row.codes_of else []
        config = train.parse(words).config
        every, own = (
            Reader(data, config.context, reader, config.training.seed).steps
            for reader in (train.parse([*words, "--temporal"]).config.reader, config.reader)
        )
        steps = options.epochs * every
        words += ["--epochs", str(-(-steps // own))]
        cells.append(Cell(row, place, words, train.parse(words).config))
        if _begun_otherwise(cells[-1], options):
            raise FriendrecError(
                f"{place / 'run'} was trained on other data or with another budget: "
                "pass the same --data, --minutes and --epochs, or choose another --out"
            )
    batch = cells[0].config.reader.batch_size
    return cells, {"steps": steps, "batch_size": batch, "minutes": options.minutes, "processes": options.nproc}


def _begun_otherwise(cell: Cell, options: CompareOptions) -> bool:
    """Whether its run was begun with other settings or data; not where its codes are still to be made again."""
    begun = cell.run / "config.json"
    if not begun.exists() or (cell.tokens and not cell.tokens.exists()):
        return False
    same: bool = json.loads(begun.read_text()) == cell.config.identity(cell.inputs(options.data))
    return not same


def _tokenize(cell: Cell, options: CompareOptions) -> None:
    """Codes of the embeddings of the run that the row names."""
    if cell.tokens is None or cell.base is None:
        return
    base, embeddings, tokens = str(cell.base), str(cell.place / "embeddings"), str(cell.tokens)
    exported = ExportOptions(run=base, data=options.data, out=embeddings)
    if not is_finished(embeddings, kind="embeddings", options=exported, inputs={"run": base, "data": options.data}):
        words = ["export", "--run", base, "--data", options.data, "--out", embeddings]
        _call(cell.place, words, options.nproc, Path(embeddings))
    made = TokenizeOptions(embeddings=embeddings, out=tokens)
    if not is_finished(tokens, kind="stu", options=made, inputs={"embeddings": embeddings}):
        _call(cell.place, ["tokenize", "--embeddings", embeddings, "--out", tokens], 1, cell.tokens)


def _train(cell: Cell, options: CompareOptions) -> None:
    inputs = cell.inputs(options.data)
    if not is_finished(cell.run, kind="run", options=cell.config.settings(), inputs=inputs):
        _call(cell.place, ["train", *cell.train], options.nproc, cell.run)


def _report(
    place: Path, options: CompareOptions, run: str | None = None, also: Path | None = None, baselines: bool = False
) -> Path:
    """The report of a row, with `also` another run and the merged lists beside it, or of the baselines.

    A period has its own.
    """
    out = place / ("report" if options.period == "validation" else "report-test")
    models = {name: str(path) for name, path in (("run", run), ("also", also)) if path is not None}
    wanted = EvaluateOptions(data=options.data, **models, baselines=baselines, period=options.period, out=str(out))  # type: ignore[arg-type]
    if not is_finished(out, kind="report", options=wanted, inputs={"data": options.data} | models):
        words = ["evaluate", "--data", options.data, "--period", options.period, "--out", str(out)]
        words += [word for name, path in models.items() for word in (f"--{name}", path)]
        words += ["--baselines"] if baselines else []
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
        row = cell.row
        own = {"adds": row.adds, "preset": row.preset, "overrides": dict(row.overrides), "codes_of": row.codes_of}
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
