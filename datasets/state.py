"""Point-in-time state: what is known of a user strictly before t, for any (user, t) in bulk.

The reader, `evaluate`, `recommend` and `export` ask here and nowhere else, so that training and serving see the same.
Everything is a binary search in the memory-mapped arrays of the prepared data; nothing at or after t is touched.
"""

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.arrays import DECAYS, NEVER, SECONDS
from friendrec.datasets.prepared import OUT, PreparedData

NEVER_SECONDS = 1e9
PAIR_FEATURES = (
    "out_count", "in_count", "since_out", "since_in", "out_day", "out_month", "in_day", "in_month",
    "out_rank", "in_rank", "rank", "has_out", "has_in", "last_was_partner", "run_out", "run_in",
    "since_first_out", "since_first_in",
)  # fmt: skip
"""What the copy term knows of a pair; counts, ranks and times on log scales."""


@dataclass(frozen=True)
class Contacts:
    """The most recent distinct partners of Q queries, most recent first; row q is `offsets[q]:offsets[q + 1]`."""

    offsets: NDArray[np.int64]  # [Q + 1]
    partner: NDArray[np.int64]  # [T] dense rows
    features: NDArray[np.float32]  # [T, len(PAIR_FEATURES)]


class PointInTime:
    """The state of every user of a prepared data set at any time."""

    def __init__(self, data: PreparedData) -> None:
        self.data = data
        self.next_same = data.array("next_same")
        self.received = data.array("received")
        self.pair_count = data.array("pair_count")
        self.pair_time = data.array("pair_time")
        self.pair_decay = data.array("pair_decay")

    def ends(self, users: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.int64]:
        """Entry after the last one strictly before `times` (µs) in each user's sequence, `[Q]`."""
        return lower_bounds(self.data.timestamp, self.data.offsets[users], self.data.offsets[users + 1], times)

    def contacts(self, users: NDArray[np.int64], times: NDArray[np.int64], limit: int) -> Contacts:
        """The `limit` most recent distinct partners of each user strictly before its time, with pair features."""
        starts, ends = self.data.offsets[users], self.ends(users, times)
        entries, counts = latest_entries(starts, ends, self.next_same, limit)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        entry = entries[np.arange(limit) < counts[:, None]]
        rank = np.arange(len(entry)) - np.repeat(offsets[:-1], counts)
        features = self._pair_features(entry, np.repeat(times, counts), np.repeat(np.arange(len(users)), counts), rank)
        return Contacts(offsets, self.data.partner[entry].astype(np.int64), features)

    def _pair_features(
        self, entry: NDArray[np.int64], now: NDArray[np.int64], query: NDArray[np.int64], rank: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        counts, times = self.pair_count[entry].astype(np.float32), self.pair_time[entry]
        since = np.where(times == NEVER, NEVER_SECONDS, (now[:, None] - np.maximum(times, 0)) * SECONDS)
        age = ((now - self.data.timestamp[entry]) * SECONDS)[:, None]
        fade = np.exp(-age / np.array([*DECAYS, *DECAYS]))
        log_counts = np.log1p(counts)
        lag = 0.1 * np.log1p(since)
        columns = [
            log_counts[:, :2],
            lag[:, :2],
            np.log1p(self.pair_decay[entry] * fade),
            np.log1p(recency_rank(query, times[:, 0]))[:, None],
            np.log1p(recency_rank(query, times[:, 1]))[:, None],
            np.log1p(rank)[:, None],
            counts[:, :2] > 0,
            (self.data.direction[entry] != OUT)[:, None],
            log_counts[:, 2:],
            lag[:, 2:],
        ]
        return np.concatenate(columns, axis=1, dtype=np.float32)


ABSENT_RANK = np.expm1(8.0)


def recency_rank(query: NDArray[np.int64], time: NDArray[np.int64]) -> NDArray[np.float64]:
    """Place of each row among its query's rows by time, latest 0; rows that never were get ABSENT_RANK."""
    order = np.lexsort((-time.astype(np.float64), query))
    first = np.searchsorted(query[order], query[order], side="left")
    rank = np.empty(len(query))
    rank[order] = np.arange(len(query)) - first
    return np.where(time == NEVER, ABSENT_RANK, rank)


@numba.njit(cache=True, nogil=True)
def lower_bound(values, begin, end, value):  # type: ignore[no-untyped-def]
    """First index in [begin, end) whose value is at least `value`; the values there ascend."""
    while begin < end:
        middle = (begin + end) // 2
        if values[middle] < value:
            begin = middle + 1
        else:
            end = middle
    return begin


@numba.njit(cache=True, nogil=True)
def lower_bounds(values, begins, ends, wanted):  # type: ignore[no-untyped-def]
    """`lower_bound` of many ranges at once, int64 `[Q]`."""
    found = np.empty(len(begins), np.int64)
    for q in range(len(begins)):
        found[q] = lower_bound(values, begins[q], ends[q], wanted[q])
    return found


@numba.njit(cache=True, nogil=True)
def latest_entries(starts, ends, next_same, limit):  # type: ignore[no-untyped-def]
    """Walk back from each end to the latest entry of up to `limit` partners: entries `[Q, limit]`, counts `[Q]`.

    An entry is the latest of its partner when the next one with that partner is not before the end.
    """
    entries = np.empty((len(ends), limit), np.int64)
    counts = np.zeros(len(ends), np.int64)
    for q in range(len(ends)):
        i = ends[q] - 1
        while i >= starts[q] and counts[q] < limit:
            if next_same[i] >= ends[q]:
                entries[q, counts[q]] = i
                counts[q] += 1
            i -= 1
    return entries, counts
