"""From ranks to `metrics.json`: the contract of the report, plain numbers with intervals beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from friendrec.pipeline.evaluation.intervals import bootstrap_means, interval
from friendrec.pipeline.evaluation.metrics import summary
from friendrec.pipeline.evaluation.slices import Slicing
from friendrec.pipeline.evaluation.tasks import LEVEL, STATES, TASKS, Events

MODEL, ALSO, FUSION = "model", "also", "fusion"
"""What is scored, what is scored beside it, and the merged lists of both."""
ORACLE = "oracle"
"""What ranks a simulated log by its generator stands beside the baselines, but is none to be compared with."""


@dataclass(frozen=True)
class Evaluation:
    """Every rank of an evaluation. Methods are the baselines and, where something else was scored, MODEL.

    Where two models are side by side, the other is ALSO and their merged lists are FUSION: by each of many weights,
    `[W, LEVELS, E]`, until one is chosen.

    What can be known as of the end of training only has no live ranks; what is a list, none beyond its length.
    """

    events: Events
    ranks: dict[str, dict[str, NDArray[np.float64]]]  # method -> state -> [LEVELS, E]
    slicings: Mapping[str, Slicing] = field(default_factory=dict)
    until: Mapping[str, int | None] = field(default_factory=dict)
    """How far the ranks of a method go, where they end: of lists, or of what a search finds."""

    @property
    def baselines(self) -> list[str]:
        return [method for method in self.ranks if method not in (MODEL, ALSO, FUSION)]

    def has(self, method: str | None, state: str) -> bool:
        return method in self.ranks and state in self.ranks[method]

    def of(self, method: str, task: str, state: str) -> NDArray[np.float64]:
        """The ranks of a task's events."""
        return self.ranks[method][state][LEVEL[task], self.events.of_task(task)]


def results(
    evaluation: Evaluation, also: str = ALSO, weights: Mapping[str, list[float]] | None = None
) -> dict[str, Any]:
    """The sections `tasks`, `baselines`, `slices` and, where two are side by side, `beside`.

    There the other is called `also`, and `weights` `[LEVELS]` by state are the model's in the fusion.
    """
    tasks: dict[str, Any] = {task: {"events": int(evaluation.events.of_task(task).sum())} for task in TASKS}
    baselines: dict[str, Any] = {
        name: {task: {state: {} for state in STATES} for task in TASKS} for name in evaluation.baselines
    }
    slices: dict[str, Any] = {
        name: {part: {task: {} for task in TASKS} for part in slicing.names}
        for name, slicing in evaluation.slicings.items()
    }
    names = {ALSO: also, FUSION: FUSION} if ALSO in evaluation.ranks else {}
    beside: dict[str, Any] = {name: {task: {} for task in TASKS} for name in names.values()}
    for task in TASKS:
        for state in STATES:
            measured, comparison, gain = _measure(evaluation, task, state)
            tasks[task][state] = measured.pop(MODEL, {}) | comparison
            for method, name in names.items():
                beside[name][task][state] = measured.pop(method)
            if gain and weights:
                said = {"better": names.get(gain["better"], MODEL), "weight": weights[state][LEVEL[task]]}
                beside[FUSION][task][state] |= gain | said
            for name, figures in measured.items():
                baselines[name][task][state] = figures
            best = comparison.get("best_baseline", {}).get("name")
            for (name, part), figures in _sliced(evaluation, best, task, state).items():
                slices[name][part][task][state] = figures
    return {"tasks": tasks, "baselines": baselines, "slices": slices} | ({"beside": beside} if beside else {})


def best_baseline(baselines: dict[str, Any], task: str, state: str) -> str | None:
    """The baseline of highest Recall@10 there."""
    scored = {
        name: figures[task][state]["recall@10"]
        for name, figures in baselines.items()
        if figures[task][state] and name != ORACLE
    }
    return max(scored, key=lambda name: scored[name]) if scored else None


def _measure(evaluation: Evaluation, task: str, state: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Figures of every method with intervals, the model's comparison with the best baseline, the fusion's gain."""
    ranks = {method: evaluation.of(method, task, state) for method in evaluation.ranks if evaluation.has(method, state)}
    asking = evaluation.events.of_task(task)
    if not asking.any() or not ranks:
        return {method: {} for method in ranks}, {}, {}
    hits = np.stack([rank <= 10 for rank in ranks.values()], axis=1).astype(np.float64)
    means = dict(zip(ranks, bootstrap_means(hits, evaluation.events.actor[asking]).T, strict=True))
    figures: dict[str, dict[str, Any]] = {
        method: {**summary(rank, evaluation.until.get(method)), "recall@10_ci": interval(means[method])}
        for method, rank in ranks.items()
    }

    def compared(method: str, other: str) -> dict[str, Any]:
        """Paired: both means are of the same draws."""
        return {
            "difference": figures[method]["recall@10"] - figures[other]["recall@10"],
            "difference_ci": interval(means[method] - means[other]),
        }

    scored = {name: {task: {state: figures[name]}} for name in evaluation.baselines if name in figures}
    best = best_baseline(scored, task, state)
    comparison = {} if best is None else {"name": best} | (compared(MODEL, best) if MODEL in figures else {})
    gain = {}
    if FUSION in figures:
        better = max((MODEL, ALSO), key=lambda method: float(figures[method]["recall@10"]))
        gain = {"better": better} | compared(FUSION, better)
    return figures, {"best_baseline": comparison} if comparison else {}, gain


def _sliced(
    evaluation: Evaluation, best: str | None, task: str, state: str
) -> dict[tuple[str, str], dict[str, int | float | list[float]]]:
    """Recall@10 of each slice: of the model, and of the best baseline of the whole task."""
    asking = evaluation.events.of_task(task)
    inside = {
        (name, part): slicing.of[state][asking] == place
        for name, slicing in evaluation.slicings.items()
        for place, part in enumerate(slicing.names)
    }
    figures: dict[tuple[str, str], Any] = {key: {"events": int(chosen.sum())} for key, chosen in inside.items()}
    filled = [key for key, chosen in inside.items() if chosen.any()]
    for metric, method in (("recall@10", MODEL), ("best_baseline_recall@10", best)):
        if method is None or not filled or not evaluation.has(method, state):
            continue
        hits = evaluation.of(method, task, state) <= 10
        counted = np.stack([inside[key] for key in filled], axis=1)
        values = np.repeat(hits[:, None].astype(np.float64), len(filled), axis=1)
        means = bootstrap_means(values, evaluation.events.actor[asking], counted)
        for key, drawn in zip(filled, means.T, strict=True):
            figures[key] |= {metric: float(hits[inside[key]].mean()), f"{metric}_ci": interval(drawn)}
    return figures
