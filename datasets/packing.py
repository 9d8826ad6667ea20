"""Packs queries (who, when) into the Context that a model reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from friendrec.datasets.arrays import SECONDS
from friendrec.datasets.batch import Context
from friendrec.datasets.config import ContextConfig
from friendrec.datasets.prepared import PreparedData
from friendrec.datasets.state import Contacts, PointInTime

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Queries:
    """Q queries in packing order: queries of one group lie together, of one user, in ascending time."""

    users: Rows
    times: Rows  # µs; only what is strictly before is seen
    groups: Rows  # [Q] one packed sequence for each run of equal values
    conditions: Rows  # [Q] 0 any, 1 + action otherwise
    actors: Rows  # [Q] the id to look up: the user, or `unknown` where it is dropped


@dataclass(frozen=True)
class Tables:
    """Rows of every embedding table that a prepared data set needs, by key."""

    rows: dict[str, int]

    @classmethod
    def of(cls, data: PreparedData) -> "Tables":
        small = {"event": 2 * len(data.actions), "condition": 1 + len(data.actions)}
        profiles = {f"profile_{name}": rows for name, rows in data.profile_rows.items()}
        return cls({"user": data.num_train_users + 1, **small, **profiles})


class Packer:
    """Packs queries on one prepared data set. The pseudo user `unknown` reads the out-of-vocabulary row."""

    def __init__(self, data: PreparedData, config: ContextConfig) -> None:
        self.data = data
        self.config = config
        self.state = PointInTime(data)
        self.tables = Tables.of(data)
        self.unknown = data.num_users
        self.profiles = {
            f"profile_{name}": (data.array(f"profile_{name}_offsets"), data.array(f"profile_{name}_values"))
            for name in data.profile_rows
        }

    def windows(self, users: Rows, times: Rows) -> tuple[Rows, Rows]:
        """Entry range `[begin, end)` of each query's history."""
        ends = self.state.ends(users, times)
        return np.maximum(self.data.offsets[users], ends - self.config.context_length), ends

    def pack(
        self, queries: Queries, contacts: Contacts, candidates: Sequence[Rows] = ()
    ) -> tuple[Context, list[Tensor]]:
        """Context of the queries and the slots of every candidate array.

        Candidates and contacts take the first slots, so that the target tower leaves out who only stands in histories.
        """
        begin, end = self.windows(queries.users, queries.times)
        group = runs(queries.groups)
        first, last = bounds(group)
        lengths = end[last] - begin[first]
        entry = ranges(begin[first], lengths)
        blocks = -(-lengths // self.config.context_length)
        block_start = (np.cumsum(blocks) - blocks) * self.config.context_length
        partners = self.data.partner[entry].astype(np.int64)
        named = [contacts.partner, *candidates, partners, queries.actors]
        distinct, slots = assign_slots(np.concatenate([array.ravel() for array in named]), self.unknown + 1)
        contact, *candidate, partner, actor = np.split(slots, np.cumsum([array.size for array in named])[:-1])
        context = Context(
            ids=self.ids(distinct),
            event_user=_tensor(partner),
            event_kind=_tensor(2 * self.data.action[entry].astype(np.int64) + self.data.direction[entry]),
            event_sequence=_tensor(np.repeat(np.arange(len(lengths)), lengths)),
            event_time=_tensor(self.data.timestamp[entry]),
            event_gap=_tensor(self._gaps(entry, np.repeat(self.data.offsets[queries.users[first]], lengths))),
            event_position=_tensor(ranges(block_start, lengths)),
            num_blocks=int(blocks.sum()),
            window_begin=_tensor(block_start[group] + begin - begin[first][group]),
            window_end=_tensor(block_start[group] + end - begin[first][group]),
            actor=_tensor(actor),
            condition=_tensor(queries.conditions),
            clock=_tensor(self._clock(queries, end)),
            contact_offsets=_tensor(contacts.offsets),
            contact_user=_tensor(contact),
            contact_features=_tensor(contacts.features),
            num_candidates=1 + max((int(part.max()) for part in (contact, *candidate) if len(part)), default=-1),
        )
        shaped = zip(candidate, candidates, strict=True)
        return context, [_tensor(part.reshape(array.shape)) for part, array in shaped]

    def _gaps(self, entry: Rows, start: Rows) -> NDArray[np.float32]:
        """0.1 · log1p(seconds) since the entry before in the sequence, which begins at `start`; 0 for its first."""
        before = np.maximum(entry - 1, start)
        gap = (self.data.timestamp[entry] - self.data.timestamp[before]) * SECONDS
        return (0.1 * np.log1p(gap)).astype(np.float32)

    def _clock(self, queries: Queries, end: Rows) -> NDArray[np.float32]:
        start = self.data.offsets[queries.users]
        last = self.data.timestamp[np.maximum(end - 1, 0)]
        since = np.where(end > start, (queries.times - last) * SECONDS, 1e9)
        return np.stack([0.1 * np.log1p(since), np.log1p(end - start) / 4], axis=1).astype(np.float32)

    def ids(self, distinct: Rows) -> KeyedJaggedTensor:
        """What the tables are asked for: slot i is the i-th of the distinct users."""
        rows = self.tables.rows
        bags = max(len(distinct), rows["event"], rows["condition"])
        values = {"user": np.minimum(distinct, self.data.num_train_users)}
        lengths = {"user": np.ones(len(distinct), np.int64)}
        for key in ("event", "condition"):
            values[key], lengths[key] = np.arange(rows[key]), np.ones(rows[key], np.int64)
        for key, (offsets, codes) in self.profiles.items():
            known = distinct != self.unknown
            begin = offsets[distinct[known]]
            counts = offsets[distinct[known] + 1] - begin
            values[key] = codes[ranges(begin, counts)].astype(np.int64)
            lengths[key] = np.zeros(len(distinct), np.int64)
            lengths[key][known] = counts
        return KeyedJaggedTensor(
            keys=list(values),
            values=_tensor(np.concatenate(list(values.values()))),
            lengths=_tensor(np.concatenate([np.pad(count, (0, bags - len(count))) for count in lengths.values()])),
        )


def ranges(begin: Rows, lengths: Rows) -> Rows:
    """`[begin_0, begin_0 + 1, …, begin_1, …]`: the given ranges end to end."""
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(begin - offsets, lengths) + np.arange(lengths.sum())


def runs(groups: Rows) -> Rows:
    """Number of the run of equal values that each element lies in: 7 7 3 7 -> 0 0 1 2."""
    return np.concatenate([[0], np.cumsum(groups[1:] != groups[:-1])])[: len(groups)]


def bounds(groups: Rows) -> tuple[Rows, Rows]:
    """First and last place of each run of equal values: 7 7 3 7 -> 0 2 3, 1 2 3."""
    change = np.flatnonzero(groups[1:] != groups[:-1])
    return np.append(0, change + 1)[: len(groups)], np.append(change, len(groups) - 1)[: len(groups)]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@numba.njit(cache=True, nogil=True)
def assign_slots(ids, num_ids):  # type: ignore[no-untyped-def]
    """Distinct ids in order of first appearance, and the place of each id among them."""
    slot_of = np.full(num_ids, -1, np.int64)
    distinct = np.empty(min(len(ids), num_ids), np.int64)
    slots = np.empty(len(ids), np.int64)
    count = 0
    for i in range(len(ids)):
        if slot_of[ids[i]] < 0:
            slot_of[ids[i]] = count
            distinct[count] = ids[i]
            count += 1
        slots[i] = slot_of[ids[i]]
    return distinct[:count], slots
