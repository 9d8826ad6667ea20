"""Compare the steps of the climb: one run a row, and what each row adds to the one before.

All rows train on the same data, from the same seed, for as many steps of as many examples; of each the checkpoint that
validates best is evaluated like any run. What is finished is not made again: the same command goes on where it stopped.
A row that writes codes of users takes them from the embeddings of another row, with which it is compared, and both
lists merged are a line more.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from friendrec.errors import FriendrecError
from friendrec.pipeline import cells
from friendrec.pipeline.arguments import parse_options
from friendrec.pipeline.cells import Budget, Cell, plan, train_cell
from friendrec.pipeline.climb import ROWS, Row, chosen_rows, rows_before
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.export import ExportOptions
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

    @property
    def budget(self) -> Budget:
        """Of each row."""
        return Budget(data=self.data, minutes=self.minutes, epochs=self.epochs, nproc=self.nproc)


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
        planned, budget = _plan(rows, options)
        print(f"[1/{len(planned) + 1}] baselines", flush=True)
        baselines = _report(out / "rows" / "baselines", options, baselines=True)
        reports = {}
        for number, cell in enumerate(planned, 2):
            print(f"[{number}/{len(planned) + 1}] {cell.row.name}: {cell.row.adds}", flush=True)
            _tokenize(cell, options)
            train_cell(cell, options.budget)
            reports[cell.row.name] = _report(cell.place, options, run=str(cell.run), also=cell.base)
        _publish(planned, reports, baselines, budget, options)
    _show(out)


def _plan(rows: list[Row], options: CompareOptions) -> tuple[list[Cell], dict[str, Any]]:
    """How each row is trained, and the budget of all."""
    from friendrec.datasets.prepared import load_prepared

    data = load_prepared(open_published(options.data, "data")[0])
    planned = [plan(row, Path(options.out) / "rows" / row.name, options.budget, data) for row in rows]
    sizes = {"steps": planned[-1].steps, "batch_size": planned[0].config.reader.batch_size}
    return planned, sizes | {"minutes": options.minutes, "processes": options.nproc}


def _tokenize(cell: Cell, options: CompareOptions) -> None:
    """Codes of the embeddings of the run that the row names."""
    if cell.tokens is None or cell.base is None:
        return
    base, embeddings, tokens = str(cell.base), str(cell.place / "embeddings"), str(cell.tokens)
    exported = ExportOptions(run=base, data=options.data, out=embeddings)
    if not is_finished(embeddings, kind="embeddings", options=exported, inputs={"run": base, "data": options.data}):
        words = ["export", "--run", base, "--data", options.data, "--out", embeddings]
        cells.call(cell.place, words, options.nproc, Path(embeddings))
    made = TokenizeOptions(embeddings=embeddings, out=tokens)
    if not is_finished(tokens, kind="stu", options=made, inputs={"embeddings": embeddings}):
        cells.call(cell.place, ["tokenize", "--embeddings", embeddings, "--out", tokens], 1, cell.tokens)


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
        cells.call(place, words, options.nproc, out)
    return out


def _publish(
    planned: list[Cell], reports: dict[str, Path], baselines: Path, budget: dict[str, Any], options: CompareOptions
) -> None:
    """The files, the manifest last: an older one is gone before any file is replaced."""
    from friendrec.pipeline.evaluation.comparison import compared, cost, write_comparison

    out = Path(options.out)
    metrics = compared(reports, baselines, rows_before([cell.row for cell in planned]))
    for cell in planned:
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
