"""The figures of `friendrec insight` for one data set, and the page about all of them."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from friendrec.pipeline.evaluation import figures
from friendrec.pipeline.evaluation.frontier import PERIOD, TASK
from friendrec.pipeline.evaluation.insight import MODELS, Grid, clusters_by_share, effects, finding
from friendrec.pipeline.evaluation.reduced import SHARES, Searches
from friendrec.pipeline.evaluation.report import ci, metric
from friendrec.pipeline.evaluation.speed import Seconds
from friendrec.pipeline.summary import effect_name, times

SYMBOLS = {False: "o", True: "D"}
"""Of a cell without clusters and with."""


def figures_of(
    name: str, runs: Sequence[str], seeds: Sequence[int], searches: Sequence[Searches], seconds: Seconds
) -> dict[str, Any]:
    """Cells, effects and what was found; runs come seed by seed, each model without clusters and with them."""
    grid = grid_of(seeds, searches, seconds)
    found = effects(grid)
    return {
        "task": TASK,
        "period": PERIOD,
        "events": len(grid.actors),
        "actors": len(np.unique(grid.actors)),
        "candidates": seconds.candidates,
        "cells": _cells(runs, seeds, searches, seconds),
        "notes": _left_out(searches),
        "effects": found,
        "clusters": clusters_by_share(grid),
        "finding": finding(name, found),
    }


def grid_of(seeds: Sequence[int], searches: Sequence[Searches], seconds: Seconds) -> Grid:
    """The searches of all runs as one grid."""
    hits = np.stack([search.hits for search in searches])  # [R · M · 2, S, E]
    per_query = seconds.encode[:, None] + seconds.search
    return Grid(list(SHARES), seeds, _by_factor(hits, seeds), searches[0].actors, _by_factor(per_query, seeds))


def _by_factor(values: NDArray[np.float64], seeds: Sequence[int]) -> NDArray[np.float64]:
    """`[R · M · 2, S, …]` as `[M, 2, S, R, …]`."""
    return np.moveaxis(values.reshape(len(seeds), len(MODELS), 2, *values.shape[1:]), 0, 3)


def _cells(
    runs: Sequence[str], seeds: Sequence[int], searches: Sequence[Searches], seconds: Seconds
) -> list[dict[str, Any]]:
    """A line for each run and share that a list fits in; times are milliseconds a query."""
    lines = []
    for place, (run, search) in enumerate(zip(runs, searches, strict=True)):
        cell = {"run": run, "seed": seeds[place // 4], "model": MODELS[place % 4 // 2], "clusters": place % 2 == 1}
        for level, share in enumerate(SHARES):
            if not np.isnan(search.compared[level]):
                encode, own = seconds.encode[place].mean(), seconds.search[place, level].mean()
                measured = {"recall@10": search.hits[level].mean(), "share_compared": search.compared[level]}
                measured |= {
                    "queries_per_second": 1 / (encode + own),
                    "encode_ms": 1e3 * encode,
                    "search_ms": 1e3 * own,
                }
                plain = {name: float(value) for name, value in measured.items()}
                lines.append(cell | {"share": share, "nprobe": int(search.nprobe[level])} | plain)
    return lines


def _left_out(searches: Sequence[Searches]) -> list[str]:
    """A line for each share that no list of some run fits in."""
    lines = []
    for level, share in enumerate(SHARES):
        for clusters, kind in enumerate(("k-means (FAISS IVF)", "the clusters")):
            least = [float(run.least) for run in searches[clusters::2] if np.isnan(run.compared[level])]
            if least:
                lines.append(
                    f"{share} is left out: one list of {kind} takes up to {100 * max(least):.2f} % of the users"
                )
    return lines


def write_insight(path: Path, metrics: dict[str, Any], data: dict[str, str]) -> None:
    """Write the page for `metrics` (what metrics.json holds) of the data sets at these paths, by name."""
    from jinja2 import Environment

    template = files("friendrec.pipeline.evaluation").joinpath("insight.html.jinja").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"metric": metric, "ci": ci, "times": times, "effect_name": effect_name}
    plots = {name: plot(found) for name, found in metrics["data"].items()}
    path.write_text(
        environment.from_string(template).render(m=metrics, plots=plots, data=data, shares=list(SHARES), models=MODELS)
    )


def plot(found: dict[str, Any]) -> str:
    """Left every cell, seeds averaged; right how many times each factor multiplies Recall@10 and queries/s."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        cells, recall, speed = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
        _plot_cells(cells, found["cells"])
        for axes, measure, title in ((recall, "recall@10", "Recall@10"), (speed, "queries_per_second", "Queries/s")):
            _plot_effects(axes, found["effects"], measure, title)
        speed.set_yticklabels([])
        return figures.svg(figure)


def _plot_cells(axes: Axes, cells: Sequence[dict[str, Any]]) -> None:
    for model, colour in zip(MODELS, (figures.BEST_COLOUR, figures.MODEL_COLOUR), strict=True):
        for clusters, symbol in SYMBOLS.items():
            own = [cell for cell in cells if (cell["model"], cell["clusters"]) == (model, clusters)]
            shares = list(dict.fromkeys(cell["share"] for cell in own))
            points = np.array(
                [
                    [np.mean([cell[of] for cell in own if cell["share"] == share]) for share in shares]
                    for of in ("queries_per_second", "recall@10")
                ]
            )
            label = f"{model}, clusters" if clusters else model
            axes.plot(*points, symbol + "-", color=colour, markersize=5, linewidth=1, label=label, alpha=0.9)
            for share, x, y in zip(shares, *points, strict=True):
                axes.annotate(share, (x, y), (3, 4), textcoords="offset points", size=7.5)
    axes.set(title="Cells, seeds averaged", xlabel="queries/s, one thread", ylabel="recall@10", xscale="log")
    axes.grid(color=figures.FAINT)
    axes.legend(frameon=False, fontsize=8)


def _plot_effects(axes: Axes, effects: Sequence[dict[str, Any]], measure: str, title: str) -> None:
    names = [effect_name(effect) for effect in effects]
    for place, effect in enumerate(effects):
        change = effect[measure]
        if change["ratio"] is not None:
            axes.plot(change["ratio"], place, "o", color=figures.MODEL_COLOUR, markersize=5)
            axes.hlines(place, *change["ratio_ci"], color=figures.INK, linewidth=1)
    axes.axvline(1, color=figures.BEST_COLOUR, linewidth=1.2, zorder=0)
    axes.set(title=f"{title}, times", yticks=range(len(names)), yticklabels=names)
    axes.grid(axis="x", color=figures.FAINT)
    axes.invert_yaxis()
