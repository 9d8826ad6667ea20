"""Inverted lists around centroids that the model learned: a query looks at the lists whose centroids it scores best.

    cells ──best──► their centroids ──best nprobe──► rows of those lists ──► best k
    R scores         some R each                      exact products, and bonuses of who is named

The same product ranks lists and rows, for a centroid is what its list's target vectors have in common. Where the lists
hold too few whom a query may see, twice as many are probed, until k are found or none is left.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.files import UserIds, read_meta
from friendrec.pipeline.retrieval.parts import CORES, Found
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.scan import (
    ascending_rows,
    best_first,
    by_list,
    largest,
    nobody,
    scan_named,
    scan_segment,
    score_children,
)
from friendrec.pipeline.retrieval.segments import Dtype, Segment, build_segment, check_ids, restored
from friendrec.pipeline.retrieval.store import open_index, save_index

EXPANDED = 2.5
"""Share of the cells whose centroids are scored, by the root of the share of the lists probed: a quarter of the cells
for a hundredth of the lists. On 862,567 users in 62 · 62 lists half as many cost recall, and twice as many bought none
that more lists would not have bought for less."""
LEAST_CELLS = 2
BLOCK = 4096
"""Queries that go through the lists together: the more, the more of them share the reading of a list."""
BLOCK_SCORES = 1 << 22
"""Scores of centroids held at once by a thread (float32: 16 MiB)."""


@dataclass(frozen=True)
class ClusterIndex:
    """N candidates in the lists of segments. Ids are places in `user_ids`; a deleted user's is nobody's any more."""

    centroids: Centroids
    segments: list[Segment]
    user_ids: UserIds  # [N]
    effort: int
    """nprobe: the lists that a query looks at."""
    recall: float | None = None
    """Measured by `calibrate`."""

    kind: Literal["clusters"] = "clusters"

    @classmethod
    def of(
        cls,
        vectors: NDArray[np.float32],
        user_ids: UserIds,
        centroids: Centroids,
        dtype: Dtype = "float32",
        copies: int = 1,
        nprobe: int = 1,
    ) -> Self:
        """Each vector `[N, D]` in the lists of its nearest one or two centroids."""
        assigned = centroids.assign(vectors, copies)
        segment = build_segment(vectors, np.arange(len(vectors), dtype=np.int32), assigned, len(centroids), dtype)
        return cls(centroids, [segment], user_ids, min(nprobe, len(centroids)))

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def effort_name(self) -> str:
        return "nprobe"

    @property
    def most_effort(self) -> int:
        """All lists."""
        return len(self.centroids)

    def search(self, queries: Queries, k: int) -> Found:
        """Best k allowed candidates of each query that its lists hold: see `Retriever`."""
        ids, scores, _ = self.look(queries, k)
        return ids, scores

    def look(self, queries: Queries, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """What `search` finds, and how many vectors each query was compared with, `[Q]`.

        Those are cells, centroids, the live rows of the lists probed, and who is named beyond those lists.
        """
        ids = np.full((len(queries), k), -1, np.int64)
        best = np.full((len(queries), k), -np.inf, np.float32)
        compared = np.zeros(len(queries), np.int64)
        rows, nprobe = np.arange(len(queries)), min(self.effort, self.most_effort)
        while len(rows):
            ids[rows], best[rows], more = self._probe(queries.take(rows), k, nprobe)
            compared[rows] += more
            if nprobe == self.most_effort:
                break
            rows = rows[(ids[rows] < 0).any(axis=1)]
            nprobe = min(2 * nprobe, self.most_effort)
        return ids, best, compared

    def vectors_of(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The stored vectors of candidates, `[len(ids), D]`; zeros of who was deleted."""
        vectors, places = np.zeros((len(ids), self.centroids.vectors.shape[1]), np.float32), self._places[ids]
        for begin, segment in zip(self._begins, self.segments, strict=True):
            rows = places - begin
            here = (rows >= 0) & (rows < len(segment.ids))
            scale = segment.scale[rows[here]] if len(segment.scale) else segment.scale
            vectors[here] = restored(segment.rows[rows[here]], scale)
        return vectors

    def is_live(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these candidates have not been deleted, `[len(ids)]`."""
        return self._places[ids] >= 0

    def save(self, directory: Path) -> None:
        save_index(directory, self.centroids, self.segments, self.user_ids, nprobe=self.effort, recall=self.recall)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Open what is committed in the directory: rows are memory-mapped, read where a list is probed."""
        meta, found = read_meta(directory, "nprobe", "recall"), open_index(directory)
        return cls(found.centroids, found.segments, found.user_ids, meta["nprobe"], meta["recall"])

    def choose(self, vectors: NDArray[np.float32], nprobe: int) -> tuple[NDArray[np.int32], int]:
        """The lists `[B, nprobe]` to probe for each query `[B, D]`, ascending, and how many centroids were scored."""
        lists, cells = len(self.centroids), self.centroids.cells
        if nprobe == lists:
            return np.broadcast_to(np.arange(lists, dtype=np.int32), (len(vectors), lists)).copy(), 0
        expanded = self._expanded(nprobe)
        if expanded == cells:
            return largest(vectors @ self.centroids.vectors.T, nprobe), lists
        size = lists // cells
        chosen = largest(vectors @ self._of_cells.T, expanded)
        scores = np.empty((len(vectors), expanded, size), np.float32)
        score_children(vectors, self.centroids.vectors, chosen, scores)
        found = largest(scores.reshape(len(vectors), -1), nprobe)
        probes = np.take_along_axis(chosen, found // size, axis=1) * size + found % size
        return probes, cells + expanded * size

    def _expanded(self, nprobe: int) -> int:
        """Cells whose centroids are scored."""
        cells = self.centroids.cells
        return min(max(LEAST_CELLS, round(EXPANDED * cells * (nprobe / len(self.centroids)) ** 0.5)), cells)

    def _probe(
        self, queries: Queries, k: int, nprobe: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """Ids and scores `[Q, k]` of the best in `nprobe` lists, and with how many each was compared."""
        ids, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        compared = np.zeros(len(queries), np.int64)
        vectors = np.ascontiguousarray(queries.vector, np.float32)
        excluded = ascending_rows(queries.exclude_offsets, queries.exclude_ids)
        named = ascending_rows(queries.sparse_offsets, queries.sparse_ids)

        def answer(block: slice) -> None:
            mine = vectors[block]
            probes, scored = self.choose(mine, nprobe)
            compared[block] = scored + self._live[probes].sum(axis=1)
            ends = slice(block.start, block.stop + 1)
            exclusions = queries.exclude_offsets[ends], excluded
            names = queries.sparse_offsets[ends], queries.sparse_ids
            hidden = (*exclusions, queries.sparse_offsets[ends], named)
            askers = by_list(probes, len(self.centroids))
            found = nobody(len(mine), k)
            for begin, (offsets, own, primary, rows, scale, dead) in zip(self._begins, self._arrays, strict=True):
                scan_segment(offsets, own, primary, rows, scale, dead, mine, probes, askers, hidden, found)
                if len(queries.sparse_ids):
                    bonus, places = queries.sparse_bonus, self._places
                    scan_named(
                        begin, primary, rows, scale, mine, probes, names, bonus, places, exclusions, found,
                        compared[block],
                    )  # fmt: skip
            best_first(found, ids[block], scores[block])

        width = max(nprobe, self._expanded(nprobe) * len(self.centroids) // self.centroids.cells)
        size = max(1, min(BLOCK, BLOCK_SCORES // width, -(-len(queries) // CORES)))
        blocks = [slice(start, min(start + size, len(queries))) for start in range(0, len(queries), size)]
        if k:
            with ThreadPoolExecutor(CORES) as pool:
                list((pool.map if len(blocks) > 1 else map)(answer, blocks))
        return ids, scores, compared

    @cached_property
    def _of_cells(self) -> NDArray[np.float32]:
        return self.centroids.of_cells

    @cached_property
    def _checked(self) -> list[Segment]:
        """The segments, once their ids have been looked at: opening does not read them."""
        for segment in self.segments:
            check_ids(segment, len(self))
        return self.segments

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        """The place of each segment's first row, were all rows in one."""
        return np.cumsum([0, *(len(segment.ids) for segment in self.segments)], dtype=np.int64)[:-1]

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """Where a candidate's row lies, `[N]`; -1 where it has none."""
        places = np.full(len(self), -1, np.int64)
        for begin, segment in zip(self._begins, self._checked, strict=True):
            rows = np.flatnonzero(~segment.dead) if len(segment.dead) else np.arange(len(segment.ids))
            places[segment.ids[rows]] = begin + rows
        return places

    @cached_property
    def _live(self) -> NDArray[np.int64]:
        """Rows in each list `[C]` that are not dead."""
        live = np.zeros(len(self.centroids), np.int64)
        for segment in self.segments:
            live += np.diff(segment.offsets)
            dead = np.flatnonzero(segment.dead)
            lists = np.searchsorted(segment.offsets, dead, side="right") - 1
            live -= np.bincount(lists, minlength=len(live))
        return live

    @cached_property
    def _arrays(self) -> list[tuple[NDArray[Any], ...]]:
        """The segments as the kernel takes them: one compilation serves arrays in memory and on disk."""
        return [
            tuple(_read_only(array) for array in (s.offsets, s.ids, s.primary, s.rows, s.scale, s.dead))
            for s in self._checked
        ]


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = np.asarray(array).view(np.uint16 if array.dtype == np.float16 else array.dtype)
    view.flags.writeable = False
    return view
