"""The exact index: every candidate scored by inner product, the metric the towers are trained with.

One matrix of scores, a block of queries at a time, serves search and rank alike: the bonus of a named candidate is
added in it and an exclusion only decides who is looked at, so that no score depends on what else was asked. On disk
it is a FAISS `IndexFlatIP`, which any tool of that library opens.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.pipeline.retrieval.exclusion import rows_of
from friendrec.pipeline.retrieval.files import UserIds, read_users, write_users
from friendrec.pipeline.retrieval.parts import CORES
from friendrec.pipeline.retrieval.protocol import Queries

BLOCK_SCORES = 1 << 25
"""Scores held at once (float32: 128 MiB), whatever the number of queries; with fewer, matrix products are slower."""


@dataclass(frozen=True)
class ExactIndex:
    """N candidates by their target vectors; `user_ids` are their raw ids in row order."""

    vectors: NDArray[np.float32]  # [N, D]
    user_ids: UserIds  # [N]

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: Queries, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Best k allowed candidates of each query: see `Retriever`."""
        ids = np.full((len(queries), k), -1, np.int64)
        best = np.full((len(queries), k), -np.inf, np.float32)
        with ThreadPoolExecutor(CORES) as pool:
            for rows, scores in self._blocks(queries):
                block = queries.take(rows)
                scores[rows_of(block.exclude_offsets), block.exclude_ids] = -np.inf
                of_block = slice(rows[0], rows[-1] + 1)
                shares = [
                    np.array_split(part, min(CORES, len(rows))) for part in (scores, ids[of_block], best[of_block])
                ]
                list((pool.map if len(shares[0]) > 1 else map)(_select, *shares))
        return ids, best

    def rank(self, queries: Queries, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Place of each target among the allowed candidates, ties shared: see `Ranker`."""
        ranks = np.empty(len(queries))
        for rows, scores in self._blocks(queries):
            block = queries.take(rows)
            mine = np.take_along_axis(scores, targets[rows, None], axis=1)[:, 0]
            higher, tied = _count(scores, mine, targets[rows], block.exclude_offsets, block.exclude_ids)
            ranks[rows] = 1 + higher + tied / 2
        return ranks

    def count_better(
        self, queries: Queries, scores: NDArray[np.float32], targets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Allowed candidates other than the target (-1: not of this index) that score higher, and that tie, `[Q]`.

        With the target's `scores` `[Q]` given, the counts of indices that share the candidates out add up.
        """
        higher, tied = np.empty(len(queries), np.int64), np.empty(len(queries), np.int64)
        for rows, own in self._blocks(queries):
            block = queries.take(rows)
            counts = _count(own, scores[rows], targets[rows], block.exclude_offsets, block.exclude_ids)
            higher[rows], tied[rows] = counts
        return higher, tied

    def vectors_of(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of candidates, `[len(ids), D]`."""
        return self.vectors[ids]

    def scores_of(self, queries: Queries, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of the candidates `ids` `[Q, M]` to each query, excluded or not, `[Q, M]`."""
        found = np.empty(ids.shape, np.float32)
        for rows, scores in self._blocks(queries):
            found[rows] = np.take_along_axis(scores, ids[rows], axis=1)
        return found

    def _blocks(self, queries: Queries) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Consecutive queries with all their scores `[B, N]`, which the next block overwrites."""
        size = min(len(queries), max(1, BLOCK_SCORES // max(1, len(self))))
        space = np.empty((size, len(self)), np.float32)  # once: fresh pages cost more than what is written to them
        for begin in range(0, len(queries), max(1, size)):
            rows = np.arange(begin, min(begin + size, len(queries)))
            block = queries.take(rows)
            scores = np.matmul(block.vector, self.vectors.T, out=space[: len(rows)])
            scores[rows_of(block.sparse_offsets), block.sparse_ids] += block.sparse_bonus
            yield rows, scores

    def save(self, directory: Path) -> None:
        import faiss

        index = faiss.IndexFlatIP(self.vectors.shape[1])
        index.add(np.ascontiguousarray(self.vectors))
        faiss.write_index(index, str(directory / "index.faiss"))
        write_users(directory, "exact", self.user_ids, index.d)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Open what `save` wrote; the caller has checked the manifest."""
        import faiss

        index = faiss.read_index(str(directory / "index.faiss"))
        return cls(index.reconstruct_n(0, index.ntotal), read_users(directory))


@numba.njit(cache=True, nogil=True)
def _select(scores, ids, best):  # type: ignore[no-untyped-def]
    """Keep the best of each row of `scores` in `ids` and `best` (which start at -1 and -inf), best first.

    Candidates come in ascending order and must beat the last place to enter, so that a tie goes to the lower id.
    """
    last = best.shape[1] - 1
    for q in range(len(scores)):
        for v in range(scores.shape[1]):
            score = scores[q, v]
            if score > best[q, last]:
                place = last
                while place > 0 and best[q, place - 1] < score:
                    best[q, place] = best[q, place - 1]
                    ids[q, place] = ids[q, place - 1]
                    place -= 1
                best[q, place] = score
                ids[q, place] = v


@numba.njit(cache=True, nogil=True)
def _count(scores, mine, targets, exclude_offsets, excluded):  # type: ignore[no-untyped-def]
    """The allowed of each row, its target apart, that score higher than `mine`, and those that tie: two of `[Q]`."""
    higher, tied = np.zeros(len(scores), np.int64), np.zeros(len(scores), np.int64)
    for q in range(len(scores)):
        for v in range(scores.shape[1]):
            higher[q] += scores[q, v] > mine[q]
            tied[q] += scores[q, v] == mine[q]
        for v in excluded[exclude_offsets[q] : exclude_offsets[q + 1]]:
            higher[q] -= scores[q, v] > mine[q]
            tied[q] -= scores[q, v] == mine[q]
        target_excluded = False
        for v in excluded[exclude_offsets[q] : exclude_offsets[q + 1]]:
            target_excluded |= v == targets[q]
        if targets[q] >= 0 and not target_excluded:
            higher[q] -= scores[q, targets[q]] > mine[q]
            tied[q] -= scores[q, targets[q]] == mine[q]
    return higher, tied
