"""Residual k-means: a vector becomes a token a level, each level quantising what the levels before leave.

    residual_0 = (x − mean) / scale
    token_l = argmin_k |residual_l − C_l[k]|²
    residual_{l+1} = residual_l − C_l[token_l]

(RQ-KMeans; Chen et al. 2010, Juang and Gray 1982). The codebooks C_l are trained by FAISS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from friendrec.models.capacity import BLOCK, within_capacity

ITERATIONS = 25
"""Of k-means, a level."""
BALANCING = 8
"""Rounds of assignment within the capacity, and of means of those assigned."""
SAMPLE = 256
"""Vectors a token, at most, from which codebooks are learned."""
CAPACITY = 1.1
"""Users that a token of a balanced level may have, as a multiple of the mean."""

Vectors = NDArray[np.float32]
Tokens = NDArray[np.int32]


class Tokenizer(Protocol):
    """What gives vectors `[N, D]` codes `[N, L]` of `sizes[l]` tokens a level."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    def encode(self, vectors: Vectors, prefix: Tokens | None = None) -> Tokens:
        """Codes int32 `[N, L]`, which begin with `prefix` `[N, l]` where it is given."""
        ...

    def distances(self, vectors: Vectors, prefix: Tokens) -> Vectors:
        """Squared distance of each vector from each token that may follow its `prefix` `[N, l]`: `[N, sizes[l]]`."""
        ...

    def decode(self, tokens: Tokens) -> Vectors:
        """The vectors that codes `[N, l]` of any number of levels stand for, float32 `[N, D]`."""
        ...

    def save(self, path: Path) -> None:
        """Write codebooks.npz."""
        ...

    @classmethod
    def load(cls, path: Path) -> Self:
        """Open what `save` wrote."""
        ...


@dataclass(frozen=True)
class Codebooks:
    """L codebooks in units of `scale` around `mean`."""

    levels: tuple[Vectors, ...]  # of each level: [K, D]
    mean: Vectors  # [D]
    scale: float

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(level) for level in self.levels)

    def encode(self, vectors: Vectors, prefix: Tokens | None = None) -> Tokens:
        """See `Tokenizer`."""
        given = np.empty((len(vectors), 0), np.int32) if prefix is None else prefix
        tokens = np.empty((len(vectors), len(self.levels)), np.int32)
        tokens[:, : given.shape[1]] = given
        residual = self.residual(vectors, given)
        for level in range(given.shape[1], len(self.levels)):
            tokens[:, level] = nearest(residual, self.levels[level])
            residual -= self.levels[level][tokens[:, level]]
        return tokens

    def distances(self, vectors: Vectors, prefix: Tokens) -> Vectors:
        """See `Tokenizer`."""
        return squared_distances(self.residual(vectors, prefix), self.levels[prefix.shape[1]])

    def decode(self, tokens: Tokens) -> Vectors:
        """See `Tokenizer`."""
        return self.mean + np.float32(self.scale) * self._sum(tokens)

    def residual(self, vectors: Vectors, prefix: Tokens) -> Vectors:
        """What the first levels' tokens `[N, l]` leave of vectors, in units of `scale`: `[N, D]`."""
        return (vectors - self.mean) / np.float32(self.scale) - self._sum(prefix)

    def _sum(self, tokens: Tokens) -> Vectors:
        total = np.zeros((len(tokens), len(self.mean)), np.float32)
        for level, column in zip(self.levels, tokens.T, strict=False):
            total += level[column]
        return total

    def save(self, path: Path) -> None:
        """See `Tokenizer`."""
        arrays: dict[str, Any] = {f"level_{level}": codebook for level, codebook in enumerate(self.levels)}
        np.savez(path, mean=self.mean, scale=self.scale, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """See `Tokenizer`."""
        with np.load(path) as arrays:
            levels = [arrays[f"level_{level}"] for level in range(len(arrays.files) - 2)]
            return cls(tuple(levels), arrays["mean"], float(arrays["scale"]))


def fit_residual_kmeans(
    vectors: Vectors,
    num_codebooks: int,
    codebook_size: int,
    seed: int,
    balanced: bool = False,
    after_level: Callable[[], object] = lambda: None,
) -> tuple[Codebooks, Tokens]:
    """Train a codebook a level on `vectors` `[N, D]`, N ≥ codebook_size; with the codes of the vectors `[N, L]`.

    `balanced` limits how many vectors a token of a level may have; the codes are then not always the nearest ones.
    """
    mean, scale = standard_units(vectors)
    residual = (vectors - mean) / np.float32(scale)
    levels, columns = [], []
    for level in range(num_codebooks):
        codebook = _kmeans(residual, codebook_size, seed + level)
        codebook, tokens = _balance(residual, codebook, seed) if balanced else (codebook, nearest(residual, codebook))
        residual -= codebook[tokens]
        levels.append(codebook)
        columns.append(tokens)
        after_level()
    return Codebooks(tuple(levels), mean, scale), np.stack(columns, axis=1)


def standard_units(vectors: Vectors) -> tuple[Vectors, float]:
    """Mean `[D]` of the vectors, and the root of their mean squared distance from it (1 where they are all alike)."""
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    spread = np.square(vectors - mean, dtype=np.float64).sum(axis=1).mean() ** 0.5
    return mean, float(spread) or 1.0


def nearest(vectors: Vectors, codebook: Vectors) -> NDArray[np.int32]:
    """The nearest of K centroids of each vector, int32 `[N]`; the first of equals."""
    size = max(1, BLOCK // len(codebook))
    found = [
        squared_distances(vectors[begin : begin + size], codebook).argmin(axis=1)
        for begin in range(0, len(vectors), size)
    ]
    return np.concatenate([*found, np.empty(0, np.int64)]).astype(np.int32)


def squared_distances(vectors: Vectors, codebook: Vectors) -> Vectors:
    """`[N, K]`."""
    squares = np.square(vectors).sum(axis=1)[:, None] + np.square(codebook).sum(axis=1)
    return squares - 2 * (vectors @ codebook.T)


def _kmeans(vectors: Vectors, size: int, seed: int) -> Vectors:
    """Centroids `[size, D]`; FAISS splits large clusters where one is empty."""
    points = {"min_points_per_centroid": 1, "max_points_per_centroid": SAMPLE}
    kmeans = faiss.Kmeans(vectors.shape[1], size, niter=ITERATIONS, seed=seed, **points)
    kmeans.train(np.ascontiguousarray(vectors))
    centroids: Vectors = kmeans.centroids
    return centroids


def _balance(vectors: Vectors, codebook: Vectors, seed: int) -> tuple[Vectors, NDArray[np.int32]]:
    """Centroids after rounds in which no token takes more than its capacity, and tokens within it."""
    sample = vectors
    if len(vectors) > SAMPLE * len(codebook):
        sample = vectors[np.random.default_rng(seed).permutation(len(vectors))[: SAMPLE * len(codebook)]]
    for _ in range(BALANCING):
        codebook = means_of_tokens(sample, _evenly(sample, codebook), codebook)
    return codebook, _evenly(vectors, codebook)


def _evenly(vectors: Vectors, codebook: Vectors) -> NDArray[np.int32]:
    """The nearest token that has room, `[N]`."""
    capacity = int(np.ceil(CAPACITY * len(vectors) / len(codebook)))
    together = np.zeros(len(vectors), np.int64)
    distances = lambda rows: squared_distances(vectors[rows], codebook)  # noqa: E731
    return within_capacity(nearest(vectors, codebook), together, capacity, distances, len(codebook))


def means_of_tokens(vectors: Vectors, tokens: NDArray[np.int32], codebook: Vectors) -> Vectors:
    """Means of the vectors of each token, the old centroid where there are none."""
    order = np.argsort(tokens, kind="stable")
    used, starts = np.unique(tokens[order], return_index=True)
    means = codebook.copy()
    sums = np.add.reduceat(vectors[order], starts, axis=0, dtype=np.float64)
    means[used] = sums / np.diff(np.append(starts, len(tokens)))[:, None]
    return means
