"""The files of a frontier: its rows as JSON and CSV, the summary, and the page with the pictures."""

import csv
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from friendrec.pipeline.evaluation import figures
from friendrec.pipeline.evaluation.contenders import NEIGHBOURS, PART, REFINED
from friendrec.pipeline.evaluation.frontier import REPEATS, K, Row
from friendrec.pipeline.evaluation.frontier_summary import RECALLS
from friendrec.pipeline.evaluation.report import ci

COLOURS = {
    "ivf": figures.BEST_COLOUR,
    "hnsw": figures.ALSO_COLOUR,
    "ivfpq": "#b0413e",
    "clusters": figures.MODEL_COLOUR,
    "beam": figures.FUSION_COLOUR,
}
PARAMETERS = {"ivf": "nprobe", "hnsw": "efSearch", "ivfpq": "nprobe", "clusters": "nprobe", "beam": "beam width"}
TASK, NEIGHBOUR = f"task_recall@{K}", f"neighbour_recall@{K}"


def write_frontier(directory: Path, rows: Sequence[Row], summary: dict[str, Any], lineage: dict[str, str]) -> None:
    """frontier.json, frontier.csv, summary.json, report.html."""
    plain = [row.plain() for row in rows]
    (directory / "frontier.json").write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n")
    summary = {**summary}
    intervals = summary.pop("intervals")
    (directory / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    with_ends = [
        row.plain()
        | {"queries_per_second_dense": row.queries_per_second_dense, f"{TASK}_low": low, f"{TASK}_high": high}
        for row, (low, high) in zip(rows, intervals, strict=True)
    ]
    with (directory / "frontier.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(with_ends[0]))
        writer.writeheader()
        writer.writerows(with_ends)
    (directory / "report.html").write_text(_page(with_ends, summary, lineage))


def _page(rows: list[dict[str, Any]], summary: dict[str, Any], lineage: dict[str, str]) -> str:
    from jinja2 import Environment

    template = files("friendrec.pipeline.evaluation").joinpath("frontier.html.jinja").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"ci": ci, "share": share_text}
    shares = sorted({share for kind in summary["kinds"].values() for share in kind["at_share"]}, key=_number)
    return environment.from_string(template).render(
        m=summary,
        rows=rows,
        lineage=lineage,
        shares=shares,
        recalls=[f"{part:.0%}" for part in RECALLS],
        parameters=PARAMETERS,
        K=K,
        repeats=REPEATS,
        built={"neighbours": NEIGHBOURS, "part": PART, "refined": REFINED},
        by_share=by_share(rows, summary),
        by_speed=by_speed(rows, summary),
    )


def by_share(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Task and neighbour recall over the share compared."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        titles = {TASK: "The true next friend is found", NEIGHBOUR: "The exact list is found"}
        for axes, (measure, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            _curves(axes, rows, "share_scored", measure)
            axes.axhline(summary["exact"][measure], color=figures.INK, linewidth=1, linestyle="--", label="exact")
            _mark_knees(axes, summary, "share_scored", measure)
            axes.set(title=title, xlabel="share of the vectors compared", ylabel=measure.replace("_", " "))
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: share_text(share)))
            axes.axvspan(0.001, 0.1, color=figures.FAINT, alpha=0.45, zorder=0, linewidth=0)
            axes.set_ylim(0, 1.12 * max([summary["exact"][measure], *(row[measure] for row in rows)]))
            axes.grid(color=figures.FAINT)
        _legend(figure, axes)
        return figures.svg(figure)


def by_speed(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Queries/s on one thread over both recalls."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        for axes, measure in zip(figure.subplots(1, 2, sharey=True), (TASK, NEIGHBOUR), strict=True):
            _curves(axes, rows, measure, "queries_per_second")
            exact = summary["exact"]
            axes.plot(exact[measure], exact["queries_per_second"], "*", color=figures.INK, markersize=11, label="exact")
            _mark_knees(axes, summary, measure, "queries_per_second")
            axes.set(xlabel=measure.replace("_", " "), ylabel="queries/s, one thread", yscale="log")
            axes.grid(color=figures.FAINT)
        _legend(figure, axes)
        return figures.svg(figure)


def _curves(axes: Axes, rows: list[dict[str, Any]], x: str, y: str) -> None:
    for name, colour in COLOURS.items():
        own = sorted((row for row in rows if row["index"] == name), key=lambda row: float(row["share_scored"]))
        if not own:
            continue
        across = np.array([row[x] for row in own])
        axes.plot(across, [row[y] for row in own], ".-", color=colour, linewidth=1.6, markersize=5, label=name)
        if y == TASK:
            low, high = (np.array([row[f"{TASK}_{end}"] for row in own]) for end in ("low", "high"))
            axes.fill_between(across, low, high, color=colour, alpha=0.1, linewidth=0)


def _mark_knees(axes: Axes, summary: dict[str, Any], x: str, y: str) -> None:
    """A diamond at each knee; over the share also a line up to where 95 % of the exact task recall is reached."""
    for name, kind in summary["kinds"].items():
        if kind["knee"] is not None:
            axes.plot(kind["knee"][x], kind["knee"][y], "D", color=COLOURS[name], markersize=8, markeredgecolor="white")
        if (x, y) == ("share_scored", TASK) and (least := kind["share_at_95_percent_of_exact"]) is not None:
            axes.vlines(least, 0, 0.95 * summary["exact"][TASK], color=COLOURS[name], linewidth=1, linestyle=":")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def share_text(share: float | None) -> str:
    """`0.5 %`; shares of 10 and more, of beams, as times."""
    if share is None:
        return "–"
    return f"{100 * share:.3g} %" if share < 10 else f"{share:.3g}×"


def _number(text: str) -> float:
    return float(text.rstrip("%"))
