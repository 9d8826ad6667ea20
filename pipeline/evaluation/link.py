"""The link prediction protocol of the temporal-graph literature (DyGLib), for comparison with its tables only.

Each test event is told from one random negative: same actor, a target drawn uniformly from all distinct targets of the
log. That is an easy question, and one ranking mixes many actors. The log is taken as it comes, without any cleaning.

    train: up to the 70 % quantile of the timestamps │ validation: up to the 85 % quantile │ test: after it

A tenth of all users, drawn among those active after the train period, is unseen: every train event that touches one of
them is removed. Test events come in order of time in batches of 200.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from friendrec.datasets.preparation_config import parse_pairs
from friendrec.datasets.schema import open_log
from friendrec.errors import FriendrecError
from friendrec.pipeline.manifest import MANIFEST, Manifest, fingerprint

Rows = tuple[NDArray, NDArray, NDArray[np.int64]]
"""Actors and targets by raw id, timestamps (µs)."""
BATCH = 200
SEEDS = range(5)


@dataclass(frozen=True)
class Links:
    """All n events of a log in order of time (ties by actor, then target), users as 0..U-1, and which may be seen."""

    actor: NDArray[np.int64]  # [n]
    target: NDArray[np.int64]  # [n]
    timestamp: NDArray[np.int64]  # [n]
    hidden: NDArray[np.bool_]  # [n] train events that were removed
    train_end: int
    """Rows before it are the train period."""
    test_begin: int

    @classmethod
    def of(cls, actor: NDArray, target: NDArray, timestamp: NDArray[np.int64], seed: int) -> Self:
        """Order and split a log of raw ids; `seed` draws the unseen users."""
        order = np.lexsort((target, actor, timestamp))
        ids, user = np.unique(np.concatenate([actor[order], target[order]]), return_inverse=True)
        actors, targets = np.split(user, 2)
        time = timestamp[order]
        ends = np.searchsorted(time, np.quantile(time, [0.7, 0.85]), side="right")
        train_end, test_begin = (int(end) for end in ends)
        later = np.unique(np.concatenate([actors[train_end:], targets[train_end:]]))
        unseen = np.zeros(len(ids), bool)
        unseen[np.random.default_rng(seed).choice(later, min(len(ids) // 10, len(later)), replace=False)] = True
        hidden = unseen[actors] | unseen[targets]
        hidden[train_end:] = False
        return cls(actors, targets, time, hidden, train_end, test_begin)

    def __len__(self) -> int:
        return len(self.actor)

    def negatives(self, seed: int) -> NDArray[np.int64]:
        """One target for each test event, uniform over the distinct targets of the log."""
        return np.random.default_rng(seed).choice(np.unique(self.target), len(self) - self.test_begin)


class LinkScorer(Protocol):
    """Scores events; whatever is strictly before an event, and not hidden, may be used."""

    def scores(self, batch: slice, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """How likely it is that the actors of the rows in `batch` turned to these targets just then, `[B]`."""
        ...


class EdgeBank:
    """1 if the pair was seen in train, validation or an earlier test batch, else 0."""

    def __init__(self, links: Links) -> None:
        self.links = links
        seen = np.flatnonzero(~links.hidden)
        self.num_users = int(max(links.actor.max(), links.target.max())) + 1
        keys = links.actor[seen] * self.num_users + links.target[seen]
        self.keys, first = np.unique(keys, return_index=True)
        self.first = seen[first]

    def scores(self, batch: slice, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        wanted = self.links.actor[batch] * self.num_users + targets
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        known = (self.keys[place] == wanted) & (self.first[place] < batch.start)
        return known.astype(np.float64)


def read_uncleaned(data: Manifest, moved_to: str | None) -> tuple[str, Rows]:
    """The log that data was prepared from, and all its rows as they come."""
    made_from = data.inputs.get("interactions", {"path": "", "fingerprint": ""})
    path = moved_to or made_from["path"]
    if not path:
        raise FriendrecError("the prepared data does not say what log it was made from: pass --interactions LOG")
    if moved_to is None and fingerprint(path) != made_from["fingerprint"]:
        raise FriendrecError(f"{path} has changed since the data was prepared from it: pass --interactions LOG")
    simulated = (Path(path) / MANIFEST).exists()
    columns = parse_pairs(data.options.get("columns"), "columns")
    unit, single_action = data.options.get("time_unit"), data.options.get("single_action")
    log = open_log(f"{path}/interactions" if simulated else path, columns, unit, single_action)
    table = pa.concat_tables(log.read())
    actor, target, _, time = (column.to_numpy() for column in table.columns)
    return path, (actor, target, time)


def link_metrics(links: Links, scorer: LinkScorer, seed: int) -> dict[str, float]:
    """Average precision and area under the ROC curve of each test batch, averaged over batches."""
    negatives = links.negatives(seed)
    figures = []
    for begin in range(links.test_begin, len(links), BATCH):
        batch = slice(begin, min(begin + BATCH, len(links)))
        drawn = negatives[begin - links.test_begin : batch.stop - links.test_begin]
        scores = scorer.scores(batch, links.target[batch]), scorer.scores(batch, drawn)
        figures.append((average_precision(*scores), area_under_curve(*scores)))
    precision, area = np.mean(figures, axis=0)
    return {"average_precision": float(precision), "auc": float(area)}


def edge_bank(
    actor: NDArray, target: NDArray, timestamp: NDArray[np.int64], seeds: Sequence[int] = SEEDS
) -> dict[str, float | int]:
    """EdgeBank's figures: mean and standard deviation over seeds, which draw unseen users and negatives."""
    logs = [Links.of(actor, target, timestamp, seed) for seed in seeds]
    figures = over_seeds([link_metrics(links, EdgeBank(links), seed) for links, seed in zip(logs, seeds, strict=True)])
    return figures | {"test_events": len(logs[0]) - logs[0].test_begin, "targets": len(np.unique(target))}


def over_seeds(runs: Sequence[dict[str, float]]) -> dict[str, float | int]:
    """Mean and standard deviation of each figure, and the number of runs."""
    figures: dict[str, float | int] = {"seeds": len(runs)}
    for name in runs[0]:
        values = [run[name] for run in runs]
        figures |= {name: float(np.mean(values)), f"{name}_sd": float(np.std(values))}
    return figures


def average_precision(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Σ (recall gained at a threshold) × (precision there), over the distinct scores from the highest."""
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    hits, false = (_at_least(scores, thresholds) for scores in (positive, negative))
    return float((np.diff(hits, prepend=0) * hits / (hits + false)).sum() / len(positive))


def area_under_curve(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """The chance that a positive scores higher than a negative, half where they tie."""
    ordered = np.sort(negative)
    wins = np.searchsorted(ordered, positive, side="left") + np.searchsorted(ordered, positive, side="right")
    return float(wins.mean() / 2 / len(negative))


def _at_least(scores: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")
