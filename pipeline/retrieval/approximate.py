"""Approximate indices of FAISS: inverted lists (ivf) and a graph of neighbours (hnsw), by inner product.

How much of the index a query looks at, its effort, buys recall with time: the number of lists (nprobe), or the length
of the queue that walks the graph (ef). `calibrate` finds what a wanted recall takes, on queries as they are asked.

Stored vectors have one dimension more, in which queries have 0 and candidates what lifts all to one length: no product
changes, and a graph by inner product becomes one by distance, without which much of it cannot be reached
(Bachrach et al. 2014).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.pipeline.retrieval.clusters import ClusterIndex
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.files import UserIds, read_meta, read_users, write_users
from friendrec.pipeline.retrieval.parts import Found, search_by_parts
from friendrec.pipeline.retrieval.protocol import Queries, Retriever

CONSTRUCTION_EFFORT = 200
"""Queue length while the graph is built: more makes a better graph, more slowly."""
POINTS_A_LIST = 39
"""FAISS wants so many vectors a list to train on."""
SHORT_WALK = 1000
"""A queue of this length is worth trying among however few candidates."""
CALIBRATED_AT = (10, 100)
"""k of the recalls of which the lower is calibrated: a short list may miss what a long one has to look for anyway."""


@dataclass(frozen=True)
class ApproximateIndex:
    """N candidates in a FAISS index of D + 1 dimensions; `effort` is nprobe or ef."""

    kind: Literal["ivf", "hnsw"]
    faiss_index: Any
    user_ids: UserIds  # [N]
    effort: int
    recall: float | None = None
    """Measured by `calibrate`."""

    @classmethod
    def ivf(cls, vectors: NDArray[np.float32], user_ids: UserIds, nlist: int | None = None, nprobe: int = 1) -> Self:
        """Lists around `nlist` centroids of k-means, `default_lists` where it is None."""
        stored = of_one_length(vectors)
        num, dimensions = stored.shape
        lists = min(nlist or default_lists(num), num)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # a warning less where the user chose more lists
        index.train(stored)
        index.add(stored)
        return cls("ivf", _with_vectors(index), user_ids, min(nprobe, lists))

    @classmethod
    def hnsw(cls, vectors: NDArray[np.float32], user_ids: UserIds, m: int = 32, ef: int = 64) -> Self:
        """A graph in which a candidate has up to `m` neighbours on each level, 2 m on the lowest."""
        stored = of_one_length(vectors)
        index = faiss.IndexHNSWFlat(stored.shape[1], m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = CONSTRUCTION_EFFORT
        index.add(stored)
        return cls("hnsw", index, user_ids, ef)

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def effort_name(self) -> str:
        return "nprobe" if self.kind == "ivf" else "ef"

    @property
    def most_effort(self) -> int:
        """Beyond which looking at everything is faster: all lists, or a queue of a tenth of the candidates."""
        return self.faiss_index.nlist if self.kind == "ivf" else max(SHORT_WALK, len(self) // 10)

    def search(self, queries: Queries, k: int) -> Found:
        """Best k allowed candidates of each query that the effort finds: see `Retriever`."""
        return search_by_parts(self, queries, k)

    def vectors_of(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = self.faiss_index.reconstruct_batch(ids)[:, :-1]
        return vectors

    def nearest(self, vector: NDArray[np.float32], k: int, hidden: NDArray[np.int64]) -> Found:
        """See `Dense`. Where the effort finds too few, everything is looked at.

        The hidden are often the nearest, and take their room among what is looked at: there is more of it for them.
        """
        num = len(self)
        allowed = faiss.IDSelectorNot(faiss.IDSelectorBatch(hidden))
        if self.kind == "ivf":
            depth = max(1.0, (k + len(hidden)) / max(CALIBRATED_AT))
            nprobe = min(round(self.effort * depth), self.faiss_index.nlist)
            found = _found(self.faiss_index, vector, k, faiss.SearchParametersIVF(nprobe=nprobe, sel=allowed))
            every = self.faiss_index, faiss.SearchParametersIVF(nprobe=self.faiss_index.nlist, sel=allowed)
        else:
            wanted = min(max(self.effort, k), num)
            walk = faiss.SearchParametersHNSW(efSearch=min(wanted + len(hidden), num), sel=allowed)
            found = _found(self.faiss_index, vector, wanted, walk)
            every = faiss.downcast_index(self.faiss_index.storage), faiss.SearchParameters(sel=allowed)
        return found if len(found[0]) >= k else _found(every[0], vector, k, every[1])

    def save(self, directory: Path) -> None:
        faiss.write_index(self.faiss_index, str(directory / "index.faiss"))
        shape = (
            {"nlist": self.faiss_index.nlist} if self.kind == "ivf" else {"m": self.faiss_index.hnsw.nb_neighbors(1)}
        )
        effort = {self.effort_name: self.effort, "recall": self.recall}
        write_users(directory, self.kind, self.user_ids, self.faiss_index.d - 1, **shape, **effort)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Open what `save` wrote; the caller has checked the manifest."""
        meta, index = read_meta(directory), faiss.read_index(str(directory / "index.faiss"))
        effort = meta["nprobe"] if meta["kind"] == "ivf" else meta["ef"]
        return cls(meta["kind"], _with_vectors(index), read_users(directory), effort, meta["recall"])


Tunable = TypeVar("Tunable", ApproximateIndex, ClusterIndex)


def default_lists(num_candidates: int) -> int:
    """About 4 √N lists, and none too short to be trained."""
    return max(1, min(int(4 * num_candidates**0.5), num_candidates // POINTS_A_LIST))


def calibrate(
    index: ApproximateIndex, exact: ExactIndex, queries: NDArray[np.float32], recall: float
) -> ApproximateIndex:
    """The same index with the least effort, by factors of √2, that finds this share of the exact best.

    `queries` `[Q, D]` should be of the kind that will be asked: which lists are good depends on it.
    """
    tried, found = least_effort(index, exact, queries, recall, 1 if index.kind == "ivf" else min(CALIBRATED_AT))
    if found < recall:
        raise FriendrecError(
            f"an index of kind {index.kind} finds {found:.3f} of the exact best, not {recall}, "
            "before the exact index is faster: pass --kind exact, or a lower --recall"
        )
    return tried


def least_effort(
    index: Tunable, exact: Retriever, queries: NDArray[np.float32], recall: float, first: float
) -> tuple[Tunable, float]:
    """The index with the least effort, by factors of √2 from the first, that finds this share of what `exact` does.

    Beside it what it finds: less where the most effort is not enough.
    """
    asked = Queries.dense(queries)
    expected, _ = exact.search(asked, min(max(CALIBRATED_AT), len(index)))
    while True:
        effort = min(round(first), index.most_effort)
        tried = replace(index, effort=effort)
        found = min(recall_of(tried, asked, expected[:, :k]) for k in CALIBRATED_AT)
        if found >= recall or effort == index.most_effort:
            return replace(tried, recall=found), found
        first *= 2**0.5


def recall_of(index: Retriever, queries: Queries, expected: NDArray[np.int64]) -> float:
    """Share of the `expected` `[Q, k]` that the index finds among as many."""
    found, _ = index.search(queries, expected.shape[1])
    return float(np.mean([np.isin(right, mine).mean() for right, mine in zip(expected, found, strict=True)]))


def _with_vectors(index: Any) -> Any:
    """The same index, of which stored vectors can be read back by id."""
    if isinstance(index, faiss.IndexIVF):
        index.set_direct_map_type(faiss.DirectMap.Array)
    return index


def of_one_length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[N, D + 1]`."""
    squares = np.square(vectors, dtype=np.float64).sum(axis=1)
    return np.column_stack([vectors, np.sqrt(squares.max(initial=0) - squares)]).astype(np.float32)


def _found(index: Any, vector: NDArray[np.float32], k: int, parameters: Any) -> Found:
    scores, ids = index.search(np.append(vector, np.float32(0))[None], k, params=parameters)
    filled = ids[0] >= 0
    return ids[0][filled], scores[0][filled]
