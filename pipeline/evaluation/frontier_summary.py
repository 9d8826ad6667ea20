"""What a frontier comes to: knees, recall at round shares with intervals, and speeds at equal recall."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from friendrec.pipeline.evaluation.frontier import Row
from friendrec.pipeline.evaluation.intervals import bootstrap_means, interval

SHARES = (0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
COMPARED_SHARES = SHARES[1:]
"""Where clusters and ivf are compared."""
ENOUGH = 0.95
"""Of the exact search's task recall: the least share for it is marked."""
RECALLS = (0.8, 0.9, 0.95, 0.99)
"""Of the exact search's, at which speeds are compared."""

Weights = NDArray[np.float64]


def summary(rows: Sequence[Row], actors: NDArray[np.int64]) -> dict[str, Any]:
    """Figures of each kind; `actors` `[E]` are who asked, and intervals are 95 %, by the bootstrap over them."""
    hits = np.stack([row.hits for row in rows], axis=1).astype(np.float64)  # [E, R]
    exact = next(place for place, row in enumerate(rows) if row.index == "exact")
    names = list(dict.fromkeys(row.index for row in rows if row.index != "exact"))
    drawn = bootstrap_means(hits, actors)  # [B, R]
    kinds = {name: _kind(name, rows, hits.mean(axis=0), drawn, exact) for name in names}
    return {
        "exact": rows[exact].plain()
        | {
            "queries_per_second_dense": rows[exact].queries_per_second_dense,
            "task_recall_ci": interval(drawn[:, exact]),
        },
        "kinds": kinds,
        "clusters_minus_ivf": _differences(rows, hits.mean(axis=0), drawn) if {"clusters", "ivf"} <= set(names) else {},
        "intervals": [interval(column) for column in drawn.T],
    }


def _kind(
    name: str, rows: Sequence[Row], recall: NDArray[np.float64], drawn: NDArray[np.float64], exact: int
) -> dict[str, Any]:
    own = [place for place, row in enumerate(rows) if row.index == name]
    share = np.array([rows[place].share for place in own])
    neighbours = np.array([rows[place].neighbours for place in own])
    at = {}
    for wanted in SHARES:
        if (weights := between(share, wanted)) is not None:
            mean, means = recall[own] @ weights, drawn[:, own] @ weights
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = means / drawn[:, exact]
            at[f"{wanted:.1%}"] = {
                "task_recall": float(mean),
                "task_recall_ci": interval(means),
                "of_exact": _divided(float(mean), float(recall[exact])),
                "of_exact_ci": interval(ratio) if recall[exact] > 0 else None,
                "neighbour_recall": float(neighbours @ weights),
            }
    least = least_share(share, recall[own], ENOUGH * recall[exact])
    bend = knee(share, recall[own])
    speed, dense = (
        np.array([getattr(rows[place], name) for place in own])
        for name in ("queries_per_second", "queries_per_second_dense")
    )
    return {
        "least_share": float(share.min()),
        "knee": None if bend is None else rows[own[bend]].plain(),
        "share_at_95_percent_of_exact": least,
        "at_share": at,
        "speed_at_task_recall": _speeds(share, speed, recall[own], recall[exact]),
        "speed_at_neighbour_recall": _speeds(share, speed, neighbours, 1.0),
        "speed_at_task_recall_dense": _speeds(share, dense, recall[own], recall[exact]),
        "speed_at_neighbour_recall_dense": _speeds(share, dense, neighbours, 1.0),
        "queries_per_second_dense": {str(rows[place].parameter): rows[place].queries_per_second_dense for place in own},
    }


def _differences(
    rows: Sequence[Row], recall: NDArray[np.float64], drawn: NDArray[np.float64]
) -> dict[str, dict[str, Any]]:
    """Task recall of clusters less that of ivf at equal shares, on the same draws."""
    places = {name: [p for p, row in enumerate(rows) if row.index == name] for name in ("clusters", "ivf")}
    found = {}
    for wanted in COMPARED_SHARES:
        sides = []
        for own in places.values():
            weights = between(np.array([rows[place].share for place in own]), wanted)
            if weights is not None:
                sides.append((recall[own] @ weights, drawn[:, own] @ weights))
        if len(sides) == 2:
            (ours, our_means), (theirs, their_means) = sides
            found[f"{wanted:.1%}"] = {
                "difference": float(ours - theirs),
                "difference_ci": interval(our_means - their_means),
            }
    return found


def between(share: NDArray[np.float64], wanted: float) -> Weights | None:
    """Weights `[R]` of the rows that interpolate, linearly in log share, at `wanted`; the last row beyond all.

    None below the least share.
    """
    order = np.argsort(share, kind="stable")
    if wanted < share[order[0]]:
        return None
    weights = np.zeros(len(share))
    after = int(np.searchsorted(share[order], wanted, side="right"))
    if after == len(share):
        weights[order[-1]] = 1
        return weights
    low, high = order[after - 1], order[after]
    part = np.log(wanted / share[low]) / np.log(share[high] / share[low])
    weights[low], weights[high] = 1 - part, part
    return weights


def least_share(share: NDArray[np.float64], recall: NDArray[np.float64], wanted: float) -> float | None:
    """Where the curve first reaches a recall, linear in log share; None where it does not."""
    order = np.argsort(share, kind="stable")
    reached = np.flatnonzero(recall[order] >= wanted)
    if not len(reached):
        return None
    after = reached[0]
    if not after:
        return float(share[order[0]])
    low, high = order[after - 1], order[after]
    part = (wanted - recall[low]) / (recall[high] - recall[low])
    return float(share[low] * (share[high] / share[low]) ** part)


def knee(share: NDArray[np.float64], recall: NDArray[np.float64]) -> int | None:
    """The row that lies highest above the line from the first to the last, in log share (Satopää et al. 2011).

    None with fewer than three rows, or where none lies above it.
    """
    order = np.argsort(share, kind="stable")
    if len(order) < 3 or share[order[-1]] <= share[order[0]] or recall[order[-1]] <= recall[order[0]]:
        return None
    x, y = np.log(share[order]), recall[order]
    above = (y - y[0]) / (y[-1] - y[0]) - (x - x[0]) / (x[-1] - x[0])
    best = int(np.argmax(above))
    return int(order[best]) if above[best] > 0 else None


def _speeds(
    share: NDArray[np.float64], speeds: NDArray[np.float64], recall: NDArray[np.float64], exact: float
) -> dict[str, float | None]:
    """Queries/s where the curve first reaches each of RECALLS times `exact`, times interpolated between rows.

    Where `speeds` are of other queries, the recall is still that of those asked.
    """
    order = np.argsort(share, kind="stable")
    found: dict[str, float | None] = {}
    for part in RECALLS:
        reached = np.flatnonzero(recall[order] >= part * exact)
        speed = None
        if len(reached):
            after = order[reached[0]]
            speed = float(speeds[after])
            if reached[0]:
                before = order[reached[0] - 1]
                weight = (part * exact - recall[before]) / (recall[after] - recall[before])
                times = [1 / speeds[place] for place in (before, after)]
                speed = float(1 / (times[0] + weight * (times[1] - times[0])))
        found[f"{part:.0%}"] = speed
    return found


def _divided(value: float, by: float) -> float | None:
    return value / by if by > 0 else None
