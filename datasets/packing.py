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
class Codes:
    """Tokenized users: row u holds the tokens of the u-th of the vocabulary, -1 where its code ends before."""

    tokens: NDArray[np.int32]  # [U, L]
    sizes: tuple[int, ...]  # [L] tokens of each level


@dataclass(frozen=True)
class Tables:
    """Rows of every embedding table that a prepared data set needs, by name; `sizes` are the tokens of each level."""

    rows: dict[str, int]
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, data: PreparedData, sizes: tuple[int, ...] = (), clusters: int = 0) -> "Tables":
        """Users are ids, or, with `sizes`, codes: a table a level, the first with a row for who has no code.

        With `clusters`, one more of so many centroids.
        """
        users = {f"stu_{level}": size + (level == 0) for level, size in enumerate(sizes)}
        small = {"event": 2 * len(data.actions), "condition": 1 + len(data.actions)}
        profiles = {f"profile_{name}": rows for name, rows in data.profile_rows.items()}
        centroids = {"cluster": clusters} if clusters else {}
        return cls({**(users or {"user": data.num_train_users + 1}), **small, **profiles, **centroids}, sizes)

    def features(self, table: str) -> tuple[str, ...]:
        """Keys of the batch that read a table."""
        return (table, table.replace("stu_", "codebook_")) if table.startswith("stu_") else (table,)


class Packer:
    """Packs queries on one prepared data set. The pseudo user `unknown` reads the out-of-vocabulary row.

    With `codes` users are read by their tokens; of its rows, in vocabulary order, those of the train users count.
    """

    def __init__(
        self, data: PreparedData, config: ContextConfig, codes: Codes | None = None, clusters: int = 0
    ) -> None:
        self.data = data
        self.config = config
        self.state = PointInTime(data)
        self.codes = codes
        self.tables = Tables.of(data, codes.sizes if codes is not None else (), clusters)
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
            codes=_tensor(self._codes_of(distinct)),
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
        values, lengths = self._user_ids(distinct)
        for key in filter(rows.__contains__, ("event", "condition", "cluster")):
            values[key], lengths[key] = np.arange(rows[key]), np.ones(rows[key], np.int64)
        for key, (offsets, codes) in self.profiles.items():
            known = distinct != self.unknown
            begin = offsets[distinct[known]]
            counts = offsets[distinct[known] + 1] - begin
            values[key] = codes[ranges(begin, counts)].astype(np.int64)
            lengths[key] = np.zeros(len(distinct), np.int64)
            lengths[key][known] = counts
        bags = max(map(len, lengths.values()))
        return KeyedJaggedTensor(
            keys=list(values),
            values=_tensor(np.concatenate(list(values.values()))),
            lengths=_tensor(np.concatenate([np.pad(count, (0, bags - len(count))) for count in lengths.values()])),
        )

    def _user_ids(self, distinct: Rows) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """Values and lengths of the keys that say who the distinct users are."""
        if self.codes is None:
            ids = np.minimum(distinct, self.data.num_train_users)
            return {"user": ids}, {"user": np.ones(len(distinct), np.int64)}
        values, lengths = {}, {}
        tokens = self._codes_of(distinct)
        tokens[tokens[:, 0] < 0, 0] = self.codes.sizes[0]
        for level, size in enumerate(self.codes.sizes):
            has = tokens[:, level] >= 0
            values[f"stu_{level}"], lengths[f"stu_{level}"] = tokens[has, level], has.astype(np.int64)
            values[f"codebook_{level}"], lengths[f"codebook_{level}"] = np.arange(size), np.ones(size, np.int64)
        return values, lengths

    def _codes_of(self, distinct: Rows) -> Rows:
        """Tokens `[len(distinct), L]` of users of the train period, -1 of the others; L = 0 where users are ids."""
        if self.codes is None:
            return np.empty((len(distinct), 0), np.int64)
        known = distinct < self.data.num_train_users
        tokens = self.codes.tokens[np.where(known, distinct, 0)].astype(np.int64)
        return np.where(known[:, None], tokens, -1)


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
