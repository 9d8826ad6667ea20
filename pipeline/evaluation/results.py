"""From ranks to `metrics.json`: the contract of the report, plain numbers with intervals beside them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.datasets.state import lower_bounds
from friendrec.pipeline.evaluation.intervals import bootstrap_means, interval
from friendrec.pipeline.evaluation.metrics import summary
from friendrec.pipeline.evaluation.scoring import asked
from friendrec.pipeline.evaluation.tasks import LEVEL, STATES, TASKS, Events

MODEL = "model"
HISTORY_BINS = {"0": (0, 0), "1-5": (1, 5), "6-20": (6, 20), "21-50": (21, 50), "51+": (51, np.inf)}
"""Slices by the number of events, sent or received, that the query knew of its actor: first and last of each."""


@dataclass(frozen=True)
class Evaluation:
    """Every rank of an evaluation. Methods are the baselines and, where a run was given, MODEL."""

    events: Events
    ranks: dict[str, dict[str, NDArray[np.float64]]]  # method -> state -> [LEVELS, E]
    history_length: dict[str, NDArray[np.int64]]  # state -> [E] what the query knew

    @property
    def baselines(self) -> list[str]:
        return [method for method in self.ranks if method != MODEL]

    def of(self, method: str, task: str, state: str) -> NDArray[np.float64]:
        """The ranks of a task's events."""
        return self.ranks[method][state][LEVEL[task], self.events.of_task(task)]


def history_length(data: PreparedData, events: Events, state: str) -> NDArray[np.int64]:
    """How many events of the actor each query knows, `[E]`."""
    actors, as_of, query = asked(data, events, state)
    begins = data.offsets[actors]
    known: NDArray[np.int64] = lower_bounds(data.timestamp, begins, data.offsets[actors + 1], as_of) - begins
    return known[query]


def results(evaluation: Evaluation) -> dict[str, Any]:
    """The sections `tasks`, `baselines` and `slices`."""
    tasks: dict[str, Any] = {task: {"events": int(evaluation.events.of_task(task).sum())} for task in TASKS}
    baselines: dict[str, Any] = {name: {task: {} for task in TASKS} for name in evaluation.baselines}
    for task in TASKS:
        for state in STATES:
            measured, comparison = _measure(evaluation, task, state)
            tasks[task][state] = measured.pop(MODEL, {}) | comparison
            for name, figures in measured.items():
                baselines[name][task][state] = figures
    return {"tasks": tasks, "baselines": baselines, "slices": {"history_length": _slices(evaluation, tasks)}}


def best_baseline(baselines: dict[str, Any], task: str, state: str) -> str | None:
    """The baseline of highest Recall@10 there."""
    scored = {name: figures[task][state]["recall@10"] for name, figures in baselines.items() if figures[task][state]}
    return max(scored, key=lambda name: scored[name]) if scored else None


def _measure(evaluation: Evaluation, task: str, state: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of every method on a task with intervals, and how the model compares with the best baseline."""
    ranks = {method: evaluation.of(method, task, state) for method in evaluation.ranks}
    asking = evaluation.events.of_task(task)
    if not asking.any():
        return {method: {} for method in ranks}, {}
    hits = np.stack([rank <= 10 for rank in ranks.values()], axis=1).astype(np.float64)
    means = dict(zip(ranks, bootstrap_means(hits, evaluation.events.actor[asking]).T, strict=True))
    figures: dict[str, dict[str, Any]] = {
        method: {**summary(rank), "recall@10_ci": interval(means[method])} for method, rank in ranks.items()
    }
    best = best_baseline({name: {task: {state: figures[name]}} for name in evaluation.baselines}, task, state)
    if best is None:
        return figures, {}
    comparison: dict[str, Any] = {"name": best}
    if MODEL in figures:
        comparison["difference"] = figures[MODEL]["recall@10"] - figures[best]["recall@10"]
        comparison["difference_ci"] = interval(means[MODEL] - means[best])
    return figures, {"best_baseline": comparison}


def _slices(evaluation: Evaluation, tasks: dict[str, Any]) -> dict[str, Any]:
    """Recall@10 by how much of the actor was known: of the model, and of the best baseline of the whole task."""
    return {
        name: {task: {state: _slice(evaluation, tasks, bounds, task, state) for state in STATES} for task in TASKS}
        for name, bounds in HISTORY_BINS.items()
    }


def _slice(
    evaluation: Evaluation, tasks: dict[str, Any], bounds: tuple[float, float], task: str, state: str
) -> dict[str, Any]:
    length = evaluation.history_length[state][evaluation.events.of_task(task)]
    inside = (length >= bounds[0]) & (length <= bounds[1])
    figures: dict[str, Any] = {"events": int(inside.sum())}
    if inside.any():
        best = tasks[task][state].get("best_baseline", {}).get("name")
        for key, method in _present({"recall@10": MODEL, "best_baseline_recall@10": best}.items(), evaluation):
            figures[key] = float((evaluation.of(method, task, state)[inside] <= 10).mean())
    return figures


def _present(methods: Iterable[tuple[str, str | None]], evaluation: Evaluation) -> list[tuple[str, str]]:
    return [(key, method) for key, method in methods if method in evaluation.ranks]
