"""Whom a user had met before any time: distinct others in order of first contact, so that each answer is a prefix.

user 0   contacted: 5 (day 1), 9 (day 3), 2 (day 8)        before day 4 -> [5, 9], found by one binary search
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from friendrec.datasets.prepared import IN, OUT, PreparedData
from friendrec.datasets.state import lower_bounds


@dataclass(frozen=True)
class FirstContacts:
    """One relation between users: row u is `other[offsets[u]:offsets[u + 1]]`, `first` ascending within a row."""

    offsets: NDArray[np.int64]  # [U + 1]
    other: NDArray[np.int64]  # [P] dense rows, distinct within a row
    first: NDArray[np.int64]  # [P] when the relation began, µs

    @classmethod
    def contacted(cls, data: PreparedData) -> Self:
        """Whom each user had contacted (events of every role count)."""
        return cls._of_entries(data, np.flatnonzero(data.direction == OUT))

    @classmethod
    def contacted_by(cls, data: PreparedData) -> Self:
        """Who had contacted each user."""
        return cls._of_entries(data, np.flatnonzero(data.direction == IN))

    @classmethod
    def met(cls, data: PreparedData) -> Self:
        """Whom each user had met: had contacted, or been contacted by."""
        return cls._of_entries(data, np.arange(len(data.direction)))

    @classmethod
    def blocked(cls, data: PreparedData) -> Self:
        """Who is hidden from each user by an action of role `exclude`, whichever of the two took it."""
        if not (data.path / "exclusions").exists():
            nothing = np.empty(0, np.int64)
            return cls(np.zeros(data.num_users + 1, np.int64), nothing, nothing)
        table = pq.read_table(data.path / "exclusions", columns=["actor", "target", "timestamp"])
        actor, target, time = (column.to_numpy().astype(np.int64) for column in table.columns)
        pairs = np.concatenate([actor, target]), np.concatenate([target, actor]), np.concatenate([time, time])
        order = np.lexsort((pairs[2], pairs[0]))
        user, other, first = (column[order] for column in pairs)
        return cls._of_pairs(data.num_users, user, other, first)

    @classmethod
    def _of_entries(cls, data: PreparedData, chosen: NDArray[np.int64]) -> Self:
        user = np.repeat(np.arange(data.num_users), np.diff(data.offsets))[chosen]
        return cls._of_pairs(data.num_users, user, data.partner[chosen].astype(np.int64), data.timestamp[chosen])

    @classmethod
    def _of_pairs(
        cls, num_users: int, user: NDArray[np.int64], other: NDArray[np.int64], time: NDArray[np.int64]
    ) -> Self:
        """From rows in order of (user, time): the first row of each pair."""
        _, index = np.unique(user * num_users + other, return_index=True)
        index.sort()
        counts = np.bincount(user[index], minlength=num_users)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return cls(offsets, other[index], time[index])

    def degrees(self, users: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many others each user is related to strictly before its time, `[Q]`."""
        begins = self.offsets[users]
        return lower_bounds(self.first, begins, self.offsets[users + 1], times) - begins

    def before(self, users: NDArray[np.int64], times: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The others that each user is related to strictly before its time: jagged `(offsets [Q + 1], ids [T])`."""
        begins, counts = self.offsets[users], self.degrees(users, times)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return offsets, self.other[np.repeat(begins - offsets[:-1], counts) + np.arange(offsets[-1])]

    def known(self, users: NDArray[np.int64], others: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each user is related to the other strictly before its time, `[Q]`."""
        if not len(self.other):
            return np.zeros(len(users), bool)
        num_users = len(self.offsets) - 1
        keys = np.repeat(np.arange(num_users), np.diff(self.offsets)) * num_users + self.other
        order, wanted = np.argsort(keys), users * num_users + others
        place = np.searchsorted(keys, wanted, sorter=order)
        found = order[np.minimum(place, len(keys) - 1)]
        return (keys[found] == wanted) & (self.first[found] < times)
