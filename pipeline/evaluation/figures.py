"""The report's pictures, drawn by matplotlib and returned as data URIs, so that the page needs no other file."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from friendrec.pipeline.evaluation.metrics import recall_curve
from friendrec.pipeline.evaluation.results import ALSO, FUSION, MODEL, Evaluation
from friendrec.pipeline.evaluation.tasks import STATES, TASKS

MODEL_COLOUR, BEST_COLOUR, REST_COLOUR, INK, FAINT = "#1f5fd6", "#d9822b", "#c5cbd6", "#1c2430", "#e6e9ef"
ALSO_COLOUR, FUSION_COLOUR = "#3a9a6b", "#8a4fd0"
TITLES = {
    "next_contact": "Next contact",
    "new_link": "New link",
    "reply": "Reply",
    "unprompted_link": "Unprompted link",
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": "#9aa3b2",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#4a5565",
    "ytick.color": "#4a5565",
    "text.color": INK,
    "svg.hashsalt": "friendrec",
}


def bars(metrics: dict[str, Any], state: str) -> str:
    """Recall@10 of the model against every baseline, one panel a task, best first, with 95 % intervals."""
    methods = len(metrics["baselines"]) + len(metrics.get("beside", {})) + 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(11, 1.2 + 0.23 * methods * 2), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04)
        )
        for axes, task in zip(figure.subplots(2, 2).flat, TASKS, strict=True):
            _bar_panel(axes, metrics, task, state)
        return svg(figure)


def _bar_panel(axes: Axes, metrics: dict[str, Any], task: str, state: str) -> None:
    scored = {name: figures[task][state] for name, figures in metrics["baselines"].items() if figures[task][state]}
    own = metrics["tasks"][task][state]
    beside = {name: figures[task][state] for name, figures in metrics.get("beside", {}).items()}
    scored |= {name: figures for name, figures in {MODEL: own, **beside}.items() if "recall@10" in figures}
    best = own.get("best_baseline", {}).get("name")
    order = sorted(scored, key=lambda name: scored[name]["recall@10"])
    recall = np.array([scored[name]["recall@10"] for name in order])
    ends = np.array([scored[name]["recall@10_ci"] for name in order]).reshape(-1, 2)
    coloured = dict(zip((MODEL, *beside), (MODEL_COLOUR, ALSO_COLOUR, FUSION_COLOUR), strict=False))
    colours = [({best: BEST_COLOUR} | coloured).get(name, REST_COLOUR) for name in order]
    axes.barh(order, recall, color=colours, height=0.72)
    axes.hlines(order, ends[:, 0], ends[:, 1], color=INK, linewidth=0.9)
    for name, value, end in zip(order, recall, ends[:, 1], strict=True):
        axes.annotate(f"{value:.3f}", (max(value, end), name), (4, 0), textcoords="offset points", va="center", size=8)
    axes.set_title(f"{TITLES[task]} ({metrics['tasks'][task]['events']:,} events)")
    axes.set_xlim(0, max(0.05, 1.14 * float(ends.max(initial=0))))
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    for label in axes.get_yticklabels():
        if label.get_text() in coloured:
            label.set(fontweight="bold", color=coloured[label.get_text()])


def curves(metrics: dict[str, Any], evaluation: Evaluation) -> str:
    """Recall@k for k = 1..100, live drawn through and frozen dashed: models against the best baseline of each."""
    names = {MODEL: "model"} | dict(zip((ALSO, FUSION), metrics.get("beside", {}), strict=False))
    colours = {MODEL: MODEL_COLOUR, ALSO: ALSO_COLOUR, FUSION: FUSION_COLOUR}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.3), layout="constrained")
        panels = figure.subplots(1, 4, sharey=True)
        for axes, task in zip(panels, TASKS, strict=True):
            for state, dashes in zip(STATES, ("-", (0, (3, 2))), strict=True):
                best = metrics["tasks"][task][state].get("best_baseline", {}).get("name")
                for method in (best, *names):
                    if evaluation.has(method, state):
                        label = f"{names.get(method, 'best baseline')}, {state}"
                        until = min(100, evaluation.until.get(method) or 100)
                        curve = recall_curve(evaluation.of(method, task, state), until)
                        line: dict[str, Any] = {"color": colours.get(method, BEST_COLOUR), "linestyle": dashes}
                        axes.plot(np.arange(1, until + 1), curve, linewidth=1.7, label=label, **line)
            axes.set(title=TITLES[task], xlabel="k", xlim=(0, 100), ylim=(0, 1))
            axes.grid(color=FAINT)
        panels[0].set_ylabel("recall@k")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return svg(figure)


def slices(parts: dict[str, Any], state: str) -> str:
    """Recall@10 of the `parts` of one slicing, with 95 % intervals; under each the number of events."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        panels = figure.subplots(1, 4, sharey=True)
        places = np.arange(len(parts))
        for axes, task in zip(panels, TASKS, strict=True):
            bins = [part[task][state] for part in parts.values()]
            series = [("recall@10", "model", MODEL_COLOUR), ("best_baseline_recall@10", "best baseline", BEST_COLOUR)]
            shown = [entry for entry in series if any(entry[0] in figures for figures in bins)]
            for i, (key, label, colour) in enumerate(shown):
                left = places + (i - (len(shown) - 1) / 2) * 0.38
                axes.bar(left, [figures.get(key, 0) for figures in bins], 0.36, color=colour, label=label)
                ends = np.array([figures.get(f"{key}_ci", (np.nan, np.nan)) for figures in bins])
                axes.vlines(left, ends[:, 0], ends[:, 1], color=INK, linewidth=0.9)
            names = [f"{name}\n({figures['events']:,})" for name, figures in zip(parts, bins, strict=True)]
            axes.set_xticks(places, names, fontsize=8 if len(parts) < 7 else 5)
            axes.set(title=TITLES[task], ylim=(0, 1))
            axes.grid(axis="y", color=FAINT)
            axes.set_axisbelow(True)
        panels[0].set_ylabel("recall@10")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        return svg(figure)


def steps(metrics: dict[str, Any], tasks: Sequence[str]) -> str:
    """Live Recall@10 of the rows of a comparison, first at the top, one panel a task; what each adds stands beside it.

    Thin lines are 95 % intervals, the orange line is the best baseline.
    """
    rows = metrics["rows"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.3 + 0.36 * len(rows)), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(tasks), sharey=True))
        for axes, task in zip(panels, tasks, strict=True):
            scored = {name: row["tasks"][task]["live"] for name, row in rows.items() if row["tasks"][task]}
            names = list(scored)
            recall = np.array([figures["recall@10"] for figures in scored.values()])
            ends = np.array([figures["recall@10_ci"] for figures in scored.values()]).reshape(-1, 2)
            axes.barh(names, recall, color=MODEL_COLOUR, height=0.62, alpha=0.85)
            axes.hlines(names, ends[:, 0], ends[:, 1], color=INK, linewidth=0.9)
            best = metrics["baselines"][task].get("live")
            top = max(float(ends.max(initial=0.05)), best["recall@10"] if best else 0)
            for name, end, figures in zip(names, ends[:, 1], scored.values(), strict=True):
                change = f"  {figures['difference']:+.3f}" if "difference" in figures else ""
                axes.annotate(
                    f"{figures['recall@10']:.3f}{change}", (end, name), (4, 0), textcoords="offset points",
                    va="center", size=8, bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"},
                )  # fmt: skip
            if best:
                axes.axvline(best["recall@10"], color=BEST_COLOUR, linewidth=1.6, zorder=0)
            axes.set_title(f"{TITLES[task]} ({metrics['tasks'][task]['events']:,} events)")
            axes.set_xlim(0, 1.42 * top)
            axes.tick_params(axis="y", length=0, labelsize=9)
        panels[0].invert_yaxis()
        return svg(figure)


def losses(lines: list[dict[str, Any]]) -> str:
    """Training loss by step, and live validation Recall@10 of each task that training looked at."""
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    looks = [(line["step"], line["validation"]) for line in lines if "validation" in line]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        step, loss = np.array(steps).T
        left.plot(step, loss, color=REST_COLOUR, linewidth=0.9)
        width = max(1, len(loss) // 50)
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        left.plot(step[width - 1 :], smooth, color=MODEL_COLOUR, linewidth=1.8)
        left.set(title="Training loss", xlabel="step")
        tasks = [task for task in TASKS if looks and task in looks[0][1]]
        for task, colour in zip(tasks, (MODEL_COLOUR, BEST_COLOUR, INK, "#3a9a6b"), strict=False):
            recall = [figures[task].get("recall@10", np.nan) for _, figures in looks]
            right.plot([at for at, _ in looks], recall, "o-", color=colour, markersize=4, label=TITLES[task])
        right.set(title="Validation recall@10 during training", xlabel="step", ylim=(0, 1))
        if tasks:
            right.legend(frameon=False)
        for axes in (left, right):
            axes.grid(color=FAINT)
        return svg(figure)


def svg(figure: Figure) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
