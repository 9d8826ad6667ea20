"""Nobody is a candidate before its first event: exclusions where candidates may have come after the train period."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.packing import ranges
from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation.tasks import Exclusions
from friendrec.pipeline.retrieval.exclusion import Jagged, union


@dataclass(frozen=True)
class SeenOnly(Exclusions):
    """Exclusions among the users of rows `start` to `stop`, the first of whom becomes candidate 0.

    They hide who has had no event strictly before.
    """

    start: int
    stop: int
    order: NDArray[np.int64]  # [num_candidates] candidates by their first event
    first: NDArray[np.int64]  # [num_candidates] when that was, µs, ascending

    @classmethod
    def among(cls, data: PreparedData, exclusions: Exclusions, start: int, stop: int) -> Self:
        first = first_seen(data)[start:stop]
        order = np.argsort(first, kind="stable")
        relations = exclusions.blocked, exclusions.contacted, exclusions.contacted_by
        return cls(stop - start, *relations, start, stop, order, first[order])

    def at(self, level: int, actors: NDArray[np.int64], times: NDArray[np.int64]) -> Jagged:
        offsets, ids = dataclasses.replace(self, num_candidates=self.stop)._related(level, actors, times)
        stays = ids >= self.start
        related = np.concatenate([[0], np.cumsum(stays)])[offsets], ids[stays] - self.start
        begins = np.searchsorted(self.first, times)
        counts = self.num_candidates - begins
        unseen = np.concatenate([[0], np.cumsum(counts)]), self.order[ranges(begins, counts)]
        return union(self.num_candidates, related, unseen)

    def _related(self, level: int, actors: NDArray[np.int64], times: NDArray[np.int64]) -> Jagged:
        return super().at(level, actors, times)


def first_seen(data: PreparedData) -> NDArray[np.int64]:
    """Time of each user's first event, `[U]` µs; the end of time where there is none."""
    first = np.full(data.num_users, np.iinfo(np.int64).max)
    active = np.diff(data.offsets) > 0
    first[active] = data.timestamp[data.offsets[:-1][active]]
    return first
