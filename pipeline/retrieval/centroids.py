"""Centroids that candidates are sorted by and queries are led by, and the k-means that first places them."""

from dataclasses import dataclass

import faiss
import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.errors import FriendrecError

ITERATIONS = 10
"""Of every k-means here; lists change little after."""
FULL = 2.0
"""Times the mean load from which a list is split, and another dissolved for it."""
FULL_OF_ALL = 3.5
"""The same where a centroid must come from another cell, which disturbs both."""
ROUNDS = 4
"""How often lists are looked through for full ones."""


@dataclass(frozen=True)
class Centroids:
    """C centroids in the space of the target vectors; a query's score of a list is its product with the centroid.

    They lie in `cells` cells of equally many, one after the other: a query looks for its best cells first, whose
    vectors are the means of their centroids, and scores the centroids of these alone. One cell: it scores all.
    """

    vectors: NDArray[np.float32]  # [C, D]
    cells: int

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not len(self.vectors) or not np.isfinite(self.vectors).all():
            raise FriendrecError("centroids must be rows of finite numbers: train and export again")
        if self.cells < 1 or len(self.vectors) % self.cells:
            raise FriendrecError(f"{len(self.vectors)} centroids do not make {self.cells} cells of equally many")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def of_cells(self) -> NDArray[np.float32]:
        """`[cells, D]`."""
        means: NDArray[np.float32] = self.vectors.reshape(self.cells, -1, self.vectors.shape[1]).mean(axis=1)
        return means

    def assign(self, vectors: NDArray[np.float32], copies: int = 1) -> NDArray[np.int32]:
        """The nearest centroids (Euclidean) of each vector, `[N, copies]`, nearest first."""
        if vectors.ndim != 2 or vectors.shape[1] != self.vectors.shape[1]:
            raise FriendrecError(
                f"vectors of shape {vectors.shape} do not fit centroids of {self.vectors.shape[1]} dimensions: "
                "export embeddings and clusters of one run"
            )
        if not np.isfinite(vectors).all():
            raise FriendrecError("vectors that are not finite belong to no centroid: train and export again")
        if not 1 <= copies <= len(self):
            raise FriendrecError(f"a vector cannot be in {copies} of {len(self)} lists")
        found = _nearest(vectors, self.vectors, min(copies + 1, len(self)))
        _put_in_order(np.ascontiguousarray(vectors, np.float32), self.vectors, found)
        return found[:, :copies]


def hierarchical_k_means(vectors: NDArray[np.float32], lists: int, cells: int, seed: int = 0) -> Centroids:
    """Centroids of `lists` clusters of vectors `[n, D]`, lying in cells of equally many; a function of its arguments.

    K-means to √lists parts, in each to as many centroids as its share of the vectors; then full lists are split.
    Vectors that occur twice count once, and their order does not matter. With fewer than `lists` different ones
    centroids repeat.
    """
    different = _different(vectors)
    if len(different) <= lists:
        centroids = different[np.arange(lists) % len(different)]
    else:
        centroids = evened(different, _in_parts(different, lists, seed), seed=seed)
    return Centroids(centroids[_cell_order(centroids, cells, seed)], cells)


def _in_parts(vectors: NDArray[np.float32], lists: int, seed: int) -> NDArray[np.float32]:
    """`[lists, D]`."""
    part = _nearest(vectors, _k_means(vectors, round(lists**0.5), seed))[:, 0]
    sizes = np.bincount(part)
    shares = np.minimum(sizes, 1)
    while shares.sum() < lists:
        shares[np.argmax(sizes / (shares + 1))] += 1
    return np.concatenate([_k_means(vectors[part == p], share, seed) for p, share in enumerate(shares) if share])


def refitted(
    vectors: NDArray[np.float32], centroids: NDArray[np.float32], cells: int = 1, seed: int = 0
) -> NDArray[np.float32]:
    """K-means of vectors `[n, D]` that goes on from these centroids `[C, D]`; full lists are split, cells made anew."""
    different = _different(vectors)
    if len(different) <= len(centroids):
        return hierarchical_k_means(different, len(centroids), cells, seed).vectors
    fitted = evened(different, _k_means(different, len(centroids), seed, centroids), seed=seed)
    return fitted[_cell_order(fitted, cells, seed)]


def evened(
    vectors: NDArray[np.float32], centroids: NDArray[np.float32], cells: int = 1, seed: int = 0
) -> NDArray[np.float32]:
    """Centroids `[C, D]` with those that have fewest vectors placed anew, to halve those of their cell with most.

    Where that is not enough, for whole cells are empty or full, those of all with most; cells are then made anew.
    """
    found, _ = _halved(vectors, centroids, cells, FULL, seed)
    if cells > 1:
        found, moved = _halved(vectors, found, 1, FULL_OF_ALL, seed)
        found = found[_cell_order(found, cells, seed)] if moved else found
    return found


def _halved(
    vectors: NDArray[np.float32], centroids: NDArray[np.float32], cells: int, full: float, seed: int
) -> tuple[NDArray[np.float32], bool]:
    """The same with lists of more than `full` times the mean halved in their cell, and whether any was."""
    centroids, mean, moved = centroids.copy(), len(vectors) / len(centroids), False
    for _ in range(ROUNDS):
        assigned = _nearest(vectors, centroids)[:, 0]
        load = np.bincount(assigned, minlength=len(centroids))
        pairs: list[tuple[int, int]] = []
        for cell in np.split(np.arange(len(centroids)), cells):
            order = cell[np.argsort(load[cell], kind="stable")]
            pairs += [
                (few, many)
                for few, many in zip(order[: len(cell) // 2], order[::-1], strict=False)
                if load[many] > 1 and (load[few] == 0 or (load[many] > full * mean and load[few] < load[many] / 3))
            ]
        if not pairs:
            break
        moved = True
        for few, many in pairs:
            centroids[[few, many]] = _k_means(vectors[assigned == many], 2, seed)
    return centroids, moved


def _cell_order(centroids: NDArray[np.float32], cells: int, seed: int) -> NDArray[np.int64]:
    """The order `[C]` that lays centroids of a neighbourhood into one cell, each of C // cells."""
    size = len(centroids) // cells
    cell_of = np.arange(len(centroids)) // size
    means = _k_means(centroids, cells, seed) if cells < len(_different(centroids)) else centroids[::size]
    for _ in range(ITERATIONS if cells > 1 else 0):
        distances = np.square(centroids).sum(axis=1)[:, None] - 2 * centroids @ means.T + np.square(means).sum(axis=1)
        best, second = np.partition(distances, 1, axis=1)[:, :2].T
        room = np.full(cells, size)
        for c in np.argsort(best - second, kind="stable"):  # first those who would lose most
            cell_of[c] = np.argmin(np.where(room > 0, distances[c], np.inf))
            room[cell_of[c]] -= 1
        order = np.argsort(cell_of, kind="stable")
        means = centroids[order].reshape(cells, size, -1).mean(axis=1)
    return np.argsort(cell_of, kind="stable")


def _k_means(
    vectors: NDArray[np.float32], k: int, seed: int, start: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """`[k, D]`, of at least k vectors; from some of them, or from `start`."""
    means = faiss.Kmeans(
        vectors.shape[1],
        int(k),
        niter=ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(vectors),
    )
    means.train(np.ascontiguousarray(vectors), init_centroids=start)
    found: NDArray[np.float32] = means.centroids
    return found


def _nearest(vectors: NDArray[np.float32], centroids: NDArray[np.float32], copies: int = 1) -> NDArray[np.int32]:
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    nearest: NDArray[np.int32] = index.search(np.ascontiguousarray(vectors, np.float32), copies)[1].astype(np.int32)
    return nearest


@numba.njit(cache=True, nogil=True)
def _put_in_order(vectors, centroids, found):  # type: ignore[no-untyped-def]
    """Sort the centroids found `[N, m]` by distance, ties by number: in double precision, one term after the other.

    FAISS leaves near ties to rounding, which depends on who else is asked for and on the number of threads.
    """
    width = found.shape[1]
    distances = np.empty(width)
    for n in range(len(found)):
        for m in range(width):
            distance = 0.0
            for d in range(vectors.shape[1]):
                distance += (np.float64(vectors[n, d]) - np.float64(centroids[found[n, m], d])) ** 2
            centroid, at = found[n, m], m
            while at and (distances[at - 1], found[n, at - 1]) > (distance, centroid):
                distances[at], found[n, at] = distances[at - 1], found[n, at - 1]
                at -= 1
            distances[at], found[n, at] = distance, centroid


def _different(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The distinct rows, ascending by their first component, so that what differs in the last bits comes out alike."""
    rows = np.ascontiguousarray(vectors + np.float32(0))  # no zero has a sign
    width = rows.dtype.itemsize * rows.shape[1]
    distinct = np.unique(rows.view(f"V{width}")).view(np.float32).reshape(-1, rows.shape[1])
    return distinct[np.argsort(distinct[:, 0], kind="stable")]
