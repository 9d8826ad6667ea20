"""The kinds of index that a frontier compares, each asked at one effort after the other, and what they compare.

FAISS is given its best: queries go to it together, and lists are made three ways, of which the best is taken. It looks
at nothing beyond what the effort says, however little is found; the model's own lists are opened as in an index of kind
clusters, twice as many while fewer than k are found, and what that compares is counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from friendrec.pipeline.evaluation.overfetch import allowed_names, room_of, search
from friendrec.pipeline.retrieval.approximate import CONSTRUCTION_EFFORT, of_one_length
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.clusters import ClusterIndex
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.files import UserIds
from friendrec.pipeline.retrieval.parts import Found
from friendrec.pipeline.retrieval.protocol import Queries

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]
Way = Literal["spherical", "plain", "one length"]
WAYS: dict[Way, str] = {
    "spherical": "centroids of length 1, vectors in the list of the largest product: FAISS's own for inner products",
    "plain": "plain k-means, vectors in the list of the nearest centroid",
    "one length": "one more dimension lifts all vectors to one length, then spherical, as in friendrec's kind ivf",
}
"""How k-means makes lists. Queries look into those whose centroid has the largest product with them."""
ITERATIONS, POINTS_A_LIST = 10, 1024
"""Of k-means: FAISS's own number for IVF, and the vectors a list that it learns from at most."""
NEIGHBOURS = 32
"""Of a candidate in the graph of hnsw, twice as many on the lowest level."""
ADDED = 20_000
"""Vectors added to a graph at a time, for the progress bar."""
PART = 4
"""Dimensions that a byte of a product code stands for."""
POINTS_A_CODE = 39
"""FAISS wants so many vectors for each entry of a codebook."""
REFINED = 4
"""Times as many codes as are wanted are compared again by their vectors."""
LONGEST = 4096
"""Queue of the walk through a graph; more is slower than comparing all."""


class Contender(Protocol):
    """One kind of index over N candidates."""

    @property
    def efforts(self) -> Sequence[int | None]:
        """Values of its parameter, ascending; the last lets it find what it can. One None: it has no parameter."""
        ...

    def search(self, queries: Queries, k: int, effort: int | None) -> Found:
        """See `Retriever`; fewer than k may be found."""
        ...

    def compared(self, queries: Queries, k: int, effort: int | None) -> float:
        """Vectors that a query is compared with in that search, on average."""
        ...


@dataclass(frozen=True)
class Exact:
    index: ExactIndex

    efforts: tuple[int | None, ...] = (None,)

    def search(self, queries: Queries, k: int, effort: int | None) -> Found:
        return self.index.search(queries, k)

    def compared(self, queries: Queries, k: int, effort: int | None) -> float:
        """All, once: the bonus of who is named is added to the product at hand."""
        return float(len(self.index))


@dataclass(frozen=True)
class Clusters:
    """The model's own lists; an effort is how many are opened at first."""

    index: ClusterIndex

    @classmethod
    def of(cls, vectors: Vectors, user_ids: UserIds, centroids: Centroids) -> "Clusters":
        return cls(ClusterIndex.of(vectors, user_ids, centroids))

    @property
    def load(self) -> Ids:
        """Vectors in each list `[C]`."""
        (segment,) = self.index.segments
        return np.diff(segment.offsets)

    @property
    def efforts(self) -> list[int]:
        return steps(len(self.index.centroids))

    def search(self, queries: Queries, k: int, effort: int | None) -> Found:
        return self._at(effort).search(queries, k)

    def compared(self, queries: Queries, k: int, effort: int | None) -> float:
        """Cells, centroids, rows of the lists probed, and who is named beyond them."""
        return float(self._at(effort).look(queries, k)[2].mean())

    def _at(self, effort: int | None) -> ClusterIndex:
        assert effort is not None
        if effort not in self._opened:
            self._opened[effort] = replace(self.index, effort=effort)
        return self._opened[effort]

    @cached_property
    def _opened(self) -> dict[int, ClusterIndex]:
        """One an effort: each works out once where the rows of candidates lie, which is no part of a search."""
        return {}


@dataclass(frozen=True)
class FaissLists:
    """Inverted lists of vectors (ivf), or of product codes whose best are compared again by their vectors (ivfpq)."""

    index: Any  # IndexIVFFlat, or IndexRefineFlat over IndexIVFPQ
    lists: Any  # the IndexIVF itself
    vectors: Vectors  # [N, D]
    list_of: Ids  # [N]
    load: Ids  # [C]

    @classmethod
    def flat(cls, vectors: Vectors, centroids: Vectors, list_of: Ids) -> "FaissLists":
        """Centroids `[C, D]`, and the list of each vector `[N]`."""
        quantizer = _quantizer(centroids)
        index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], len(centroids), faiss.METRIC_INNER_PRODUCT)
        _fill(index, vectors, list_of)
        return cls(index, index, vectors, list_of, np.bincount(list_of, minlength=len(centroids)))

    @classmethod
    def coded(cls, vectors: Vectors, centroids: Vectors, list_of: Ids) -> "FaissLists":
        """The same lists, with a byte for each PART dimensions: 0s fill up the last."""
        num, dimensions = vectors.shape
        wide = np.zeros((num, -(-dimensions // PART) * PART), np.float32)
        wide[:, :dimensions] = vectors
        quantizer = _quantizer(np.pad(centroids, ((0, 0), (0, wide.shape[1] - dimensions))))
        bits = int(np.clip(np.log2(max(num / POINTS_A_CODE, 2)), 1, 8))
        parts = wide.shape[1] // PART
        lists = faiss.IndexIVFPQ(quantizer, wide.shape[1], len(centroids), parts, bits, faiss.METRIC_INNER_PRODUCT)
        refined = faiss.IndexRefineFlat(lists)
        _fill(lists, wide, list_of)
        refined.refine_index.add(wide)
        refined.ntotal, refined.is_trained = num, True
        return cls(refined, lists, vectors, list_of, np.bincount(list_of, minlength=len(centroids)))

    @property
    def efforts(self) -> list[int]:
        return steps(len(self.load))

    def search(self, queries: Queries, k: int, effort: int | None) -> Found:
        def ask(vectors: Vectors, wanted: int, slack: int, selector: Any) -> Found:
            probes = faiss.SearchParametersIVF(nprobe=effort, sel=selector)
            again = self.index is not self.lists
            parameters = (
                faiss.IndexRefineSearchParameters(k_factor=REFINED, base_index_params=probes) if again else probes
            )
            scores, ids = self.index.search(_widened(vectors, self.index.d), wanted, params=parameters)
            return ids, scores

        return search(self.vectors, queries, k, k, ask)

    def compared(self, queries: Queries, k: int, effort: int | None) -> float:
        """Centroids, all of the lists probed, codes compared again, and who is named beyond those lists."""
        num_lists = len(self.load)
        total = 0
        for begin in range(0, len(queries), size := max(1, (1 << 22) // num_lists)):
            block = queries.take(np.arange(begin, min(begin + size, len(queries))))
            probed = self.lists.quantizer.search(_widened(block.vector, self.lists.d), effort)[1]
            looked = self.load[probed].sum(axis=1)
            row, named = allowed_names(len(self.vectors), block)
            keys = np.arange(len(block))[:, None] * num_lists + probed
            beyond = ~np.isin(row * num_lists + self.list_of[named], keys)
            again = 0
            if self.index is not self.lists:
                again = np.minimum(looked, REFINED * (k + room_of(block))).sum()
            total += len(block) * num_lists + looked.sum() + beyond.sum() + again
        return float(total / len(queries))


@dataclass(frozen=True)
class FaissGraph:
    """A graph of neighbours, walked to the nearest by distance among vectors of one length."""

    index: Any  # IndexHNSWFlat of D + 1 dimensions
    vectors: Vectors  # [N, D]

    @classmethod
    def of(cls, vectors: Vectors, advance: Callable[[int], None] = lambda added: None) -> "FaissGraph":
        """`advance` is told how many vectors each step has added."""
        stored = of_one_length(vectors)
        index = faiss.IndexHNSWFlat(stored.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = CONSTRUCTION_EFFORT
        for begin in range(0, len(stored), ADDED):
            index.add(stored[begin : begin + ADDED])
            advance(min(ADDED, len(stored) - begin))
        return cls(index, vectors)

    @property
    def efforts(self) -> list[int]:
        """Queues that are shorter than k find no more than they hold."""
        return [effort for effort in steps(min(len(self.vectors), LONGEST)) if effort >= 4]

    def search(self, queries: Queries, k: int, effort: int | None) -> Found:
        assert effort is not None

        def ask(vectors: Vectors, wanted: int, slack: int, selector: Any) -> Found:
            length = min(max(effort + slack, wanted), len(self.vectors))
            queue = faiss.SearchParametersHNSW(efSearch=length, sel=selector)
            scores, ids = self.index.search(_widened(vectors, self.index.d), wanted, params=queue)
            return ids, scores

        return search(self.vectors, queries, k, effort, ask)

    def compared(self, queries: Queries, k: int, effort: int | None) -> float:
        """Distances that FAISS counts on its walk, and all who are named."""
        counter = faiss.cvar.hnsw_stats
        counter.reset()
        self.search(queries, k, effort)
        return float((counter.ndis + len(allowed_names(len(self.vectors), queries)[1])) / len(queries))


def steps(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, … and at last `most`."""
    values = sorted({1, *(2**i for i in range(1, 40)), *(3 * 2**i for i in range(40))})
    return [value for value in values if value < most] + [most]


def k_means(way: Way, vectors: Vectors, lists: int, seed: int = 0) -> tuple[Vectors, Ids]:
    """Centroids `[C, D]`, which queries are multiplied with, and the list of each vector `[N]`."""
    points = of_one_length(vectors) if way == "one length" else np.ascontiguousarray(vectors)
    means = faiss.Kmeans(
        points.shape[1],
        lists,
        niter=ITERATIONS,
        seed=seed,
        spherical=way != "plain",
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_A_LIST,
    )
    means.train(points)
    nearest = faiss.IndexFlatL2(points.shape[1]) if way == "plain" else faiss.IndexFlatIP(points.shape[1])
    nearest.add(means.centroids)
    return np.ascontiguousarray(means.centroids[:, : vectors.shape[1]]), nearest.search(points, 1)[1][:, 0]


def _quantizer(centroids: Vectors) -> Any:
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    return index


def _fill(index: Any, vectors: Vectors, list_of: Ids) -> None:
    """Add vectors to lists that are decided."""
    index.cp.min_points_per_centroid = 1
    index.train(vectors)  # of what codes them alone: the quantizer is trained
    index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(np.ascontiguousarray(list_of)))


def _widened(vectors: Vectors, dimensions: int) -> Vectors:
    """With 0s behind, as many dimensions as the index has."""
    missing = dimensions - vectors.shape[1]
    return np.ascontiguousarray(np.pad(vectors, ((0, 0), (0, missing))) if missing else vectors, np.float32)
