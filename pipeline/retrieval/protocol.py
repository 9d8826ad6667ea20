"""What every finder of friends answers to: `search(queries, k) -> (ids, scores)`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Queries:
    """Q queries over N candidates (ids 0..N-1). Jagged fields: row q is `ids[offsets[q]:offsets[q + 1]]`.

    score(v) = vector · v, plus sparse_bonus where the query names v among its sparse_ids. The ids of a row are
    distinct. Excluding a candidate changes neither score nor order of the others.
    """

    vector: NDArray[np.float32]  # [Q, D]
    sparse_offsets: NDArray[np.int64]  # [Q + 1]
    sparse_ids: NDArray[np.int64]
    sparse_bonus: NDArray[np.float32]
    exclude_offsets: NDArray[np.int64]  # [Q + 1]
    exclude_ids: NDArray[np.int64]
    keys: NDArray[np.int64] | None = None
    """What a retriever that draws by chance tells a query by, `[Q]`: the same key draws the same, in any company."""

    @classmethod
    def dense(cls, vector: NDArray[np.float32]) -> Self:
        """Queries that name nobody and exclude nobody."""
        none, ids = np.zeros(len(vector) + 1, np.int64), np.empty(0, np.int64)
        return cls(vector, none, ids, np.empty(0, np.float32), none, ids)

    def __len__(self) -> int:
        return len(self.vector)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """The queries at `rows`, in that order, repeats allowed."""
        sparse_offsets, sparse = take_rows(self.sparse_offsets, rows)
        exclude_offsets, exclude = take_rows(self.exclude_offsets, rows)
        return replace(
            self,
            vector=self.vector[rows],
            sparse_offsets=sparse_offsets,
            sparse_ids=self.sparse_ids[sparse],
            sparse_bonus=self.sparse_bonus[sparse],
            exclude_offsets=exclude_offsets,
            exclude_ids=self.exclude_ids[exclude],
            keys=None if self.keys is None else self.keys[rows],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The queries of all parts, in order."""
        names = [f.name for f in fields(cls) if all(getattr(part, f.name) is not None for part in parts)]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        for name in ("sparse_offsets", "exclude_offsets"):
            counts = np.concatenate([np.diff(getattr(part, name)) for part in parts])
            joined[name] = np.concatenate([[0], np.cumsum(counts)])
        return cls(**joined)

    def within(self, first: int, num: int) -> Self:
        """The same queries to a shard of the candidates, `first` becoming id 0; those of others are not named."""
        sparse_offsets, sparse = _kept(self.sparse_offsets, self.sparse_ids - first, num)
        exclude_offsets, exclude = _kept(self.exclude_offsets, self.exclude_ids - first, num)
        return replace(
            self,
            sparse_offsets=sparse_offsets,
            sparse_ids=(self.sparse_ids - first)[sparse],
            sparse_bonus=self.sparse_bonus[sparse],
            exclude_offsets=exclude_offsets,
            exclude_ids=(self.exclude_ids - first)[exclude],
        )

    def excluding(self, offsets: NDArray[np.int64], ids: NDArray[np.int64]) -> Self:
        """The same queries with these exclusions in place of their own."""
        return replace(self, exclude_offsets=offsets, exclude_ids=ids)


class Retriever(Protocol):
    """A searchable set of candidates."""

    def search(self, queries: Queries, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Best k allowed candidates, best first (ties: lower id first): ids `[Q, k]` and scores `[Q, k]`.

        Where fewer than k are allowed, the row ends with id -1 and score -inf.
        """
        ...


@runtime_checkable
class Ranker(Retriever, Protocol):
    """A retriever that scores every candidate, and so can tell the place of any of them."""

    def rank(self, queries: Queries, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """1 + the allowed candidates scored strictly higher than the target + half of the others tied with it, `[Q]`.

        A target that its own query excludes is ranked among the allowed all the same.
        """
        ...


def take_rows(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Gather jagged rows: the offsets `[R + 1]` of the result, and where each of its elements was."""
    counts = offsets[rows + 1] - offsets[rows]
    taken = np.concatenate([[0], np.cumsum(counts)])
    return taken, np.repeat(offsets[rows] - taken[:-1], counts) + np.arange(taken[-1])


def _kept(offsets: NDArray[np.int64], ids: NDArray[np.int64], num: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Jagged rows cut down to the ids in [0, num): the offsets left, and which elements stay."""
    stays = (ids >= 0) & (ids < num)
    return np.concatenate([[0], np.cumsum(stays)])[offsets], stays
