"""What the model and the search each do to Recall@10 and to queries/s, when every level of one meets all of the other.

A grid has M models × 2 (clusters off, on) × S shares compared × R seeds, axes in this order. The effect of a factor is
the change from its first level to another, averaged over the cells of all other factors: of Recall@10 the difference
and the ratio of means; of queries/s the mean difference and the geometric mean of the ratios, since speeds of cells lie
far apart. Both sides of a change are of the same users, so intervals are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from friendrec.pipeline.evaluation.intervals import bootstrap_means, interval
from friendrec.pipeline.summary import times

MODEL, CLUSTERS, SHARE = range(3)
"""Axes of a grid that are factors; seeds come after them, and last what is drawn anew: events, or blocks of queries."""
MODELS = ("two_tower_mlp", "two_tower_moe")
MEASURES = ("recall@10", "queries_per_second")


@dataclass(frozen=True)
class Grid:
    """What was measured of every cell; nan where no list fits in the share."""

    shares: Sequence[str]
    """Names of the shares, the exact search first."""
    seeds: Sequence[int]
    hits: NDArray[np.float64]
    """`[M, 2, S, R, E]`: whether the target of each event is among the first ten."""
    actors: NDArray[np.int64]
    """`[E]`."""
    seconds: NDArray[np.float64]
    """`[M, 2, S, R, B]`: a query of each block, encoding and search."""

    def take(self, axis: int, levels: Sequence[int]) -> "Grid":
        """The part of the grid with these levels of a factor."""
        shares = [self.shares[level] for level in levels] if axis == SHARE else self.shares
        parts = (values.take(levels, axis) for values in (self.hits, self.seconds))
        return Grid(shares, self.seeds, next(parts), self.actors, next(parts))

    def of_seed(self, place: int) -> "Grid":
        """The part of one seed."""
        part = slice(place, place + 1)
        return Grid(self.shares, self.seeds[part], self.hits[..., part, :], self.actors, self.seconds[..., part, :])

    @property
    def complete(self) -> "Grid":
        """With the shares alone that every cell has."""
        whole = ~np.isnan(self.seconds).any(axis=(0, 1, 3, 4))
        return self.take(SHARE, np.flatnonzero(whole).tolist())


def effects(grid: Grid) -> list[dict[str, Any]]:
    """Main effects: `factor`, `level` and of each measure the change with intervals, whole and by seed.

    The levels of the shares that some cell lacks are left out.
    """
    whole = grid.complete
    asked = [("model", MODELS[1], MODEL, 1), ("clusters", "on", CLUSTERS, 1)]
    asked += [("share", name, SHARE, place) for place, name in enumerate(whole.shares) if place]
    return [
        {"factor": factor, "level": level} | _changes(whole.take(axis, [0, place]), axis)
        for factor, level, axis, place in asked
    ]


def clusters_by_share(grid: Grid) -> dict[str, dict[str, Any]]:
    """What clusters change at each share, over both models; of the exact search also of each model alone."""
    whole = grid.complete
    found = {name: _changes(whole.take(SHARE, [place]), CLUSTERS) for place, name in enumerate(whole.shares)}
    exact = whole.take(SHARE, [0])
    found[exact.shares[0]]["models"] = {
        name: {"recall@10": recall_change(exact.take(MODEL, [place]), CLUSTERS)} for place, name in enumerate(MODELS)
    }
    return found


def recall_change(grid: Grid, axis: int) -> dict[str, Any]:
    """Recall@10 at the first level of a factor and at the second, their difference and ratio."""
    over = tuple(other for other in range(4) if other != axis)
    sides = grid.hits.mean(axis=over).T  # [E, 2]
    drawn = bootstrap_means(sides, grid.actors)
    before, after = sides.mean(axis=0)
    return _change(before, after, after - before, _ratio(before, after), drawn[:, 1] - drawn[:, 0], _ratio(*drawn.T))


def speed_change(grid: Grid, axis: int) -> dict[str, Any]:
    """Queries/s likewise; blocks of queries are drawn anew."""
    blocks = np.moveaxis(grid.seconds, axis, 0)  # [2, ..., B]
    drawn = bootstrap_means(blocks.reshape(-1, blocks.shape[-1]).T, np.arange(blocks.shape[-1]))  # [D, cells]
    sides = 1 / np.stack([blocks.mean(axis=-1).ravel(), *drawn]).reshape(1 + len(drawn), 2, -1)  # [1 + D, 2, pairs]
    difference = (sides[:, 1] - sides[:, 0]).mean(axis=1)
    ratio = np.exp(np.log(sides[:, 1] / sides[:, 0]).mean(axis=1))
    before, after = np.exp(np.log(sides[0]).mean(axis=1))
    return _change(before, after, difference[0], ratio[0], difference[1:], ratio[1:])


def finding(name: str, found: Sequence[dict[str, Any]]) -> str:
    """One sentence: what smaller searches do, what the model does, and which of the two moves each measure more.

    The model has one other level, so that it is held against each smaller search by itself, not against the best.
    """
    model = next(effect for effect in found if effect["factor"] == "model")
    searches = [effect for effect in found if effect["factor"] == "share"]
    if not searches:
        return f"{name}: no list fits in the shares asked for, so a smaller search cannot be compared with the model."
    said = "; ".join(
        f"searching {effect['level']} of the users in place of all changes {_both(effect)}" for effect in searches
    )
    levels: dict[str, list[str]] = {}
    for search in searches:
        levels.setdefault(_verdicts(model, search), []).append(search["level"])
    verdicts = "; ".join(f"at {' and '.join(own)}, {verdict}" for verdict, own in levels.items())
    return f"{name}: {said}; {MODELS[1]} in place of {MODELS[0]} changes {_both(model)}: {verdicts}."


_TITLES = {"recall@10": "Recall@10", "queries_per_second": "queries/s"}


def _verdicts(model: dict[str, Any], search: dict[str, Any]) -> str:
    """Which of the two moves each measure more."""
    of_measure = {_TITLES[measure]: _verdict(model[measure], search[measure]) for measure in MEASURES}
    if len(set(of_measure.values())) == 1:
        return f"{next(iter(of_measure.values()))} for both"
    return " and ".join(f"{verdict} for {title}" for title, verdict in of_measure.items())


def _verdict(model: dict[str, Any], search: dict[str, Any]) -> str:
    """Which of the two changes is larger, as a factor up or down; what chance explains moves nothing."""
    by_model, by_search = _strength(model), _strength(search)
    if by_model == by_search == 0:
        return "neither can be told from chance"
    return "the search matters more" if by_search > by_model else "the model matters more"


def _strength(change: dict[str, Any]) -> float:
    """How far the ratio lies from 1, as |log|; 0 where its interval holds 1, or where there is none."""
    if change["ratio"] is None:
        return 0.0
    low, high = change["ratio_ci"]
    return 0.0 if low <= 1 <= high else abs(float(np.log(max(change["ratio"], 1e-12))))


def _both(effect: dict[str, Any]) -> str:
    return " and ".join(f"{_TITLES[measure]} {times(effect[measure])}" for measure in MEASURES)


def _changes(grid: Grid, axis: int) -> dict[str, Any]:
    """Of both measures; `by_seed` has the ratios of each seed alone."""
    measured = {"recall@10": recall_change, "queries_per_second": speed_change}
    found = {measure: change(grid, axis) for measure, change in measured.items()}
    for place, seed in enumerate(grid.seeds):
        for measure, change in measured.items():
            found[measure].setdefault("ratio_by_seed", {})[str(seed)] = change(grid.of_seed(place), axis)["ratio"]
    return found


def _change(
    before: float,
    after: float,
    difference: float,
    ratio: NDArray[np.float64] | float,
    differences: NDArray[np.float64],
    ratios: NDArray[np.float64],
) -> dict[str, Any]:
    found: dict[str, Any] = {"before": float(before), "after": float(after)}
    found |= {"difference": float(difference), "difference_ci": interval(differences)}
    defined = bool(np.isfinite(ratio))
    return found | {"ratio": float(ratio) if defined else None, "ratio_ci": interval(ratios) if defined else None}


def _ratio(before: Any, after: Any) -> Any:
    """nan where there is nothing to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(before) > 0, np.divide(after, before), np.nan)
