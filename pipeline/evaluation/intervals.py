"""Confidence intervals by the bootstrap over actors: a user's events hang together, so whole users are drawn."""

import numpy as np
from numpy.typing import NDArray

BLOCK_DRAWS = 1 << 22
"""Actors drawn at once, bounding memory."""


def bootstrap_means(
    values: NDArray[np.float64], actors: NDArray[np.int64], replicates: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Means of the columns of `values` `[E, M]` when as many actors as there are are drawn with replacement: `[R, M]`.

    All columns see the same draws, so the difference of two columns is a paired comparison.
    """
    _, group = np.unique(actors, return_inverse=True)
    num_actors = int(group.max()) + 1
    columns = np.concatenate([np.ones((len(values), 1)), values], axis=1)
    totals = np.stack([np.bincount(group, column, num_actors) for column in columns.T], axis=1)  # [A, 1 + M]
    rng = np.random.default_rng(seed)
    drawn = []
    for begin in range(0, replicates, size := max(1, BLOCK_DRAWS // num_actors)):
        rows = min(size, replicates - begin)
        draws = rng.integers(num_actors, size=(rows, num_actors)) + np.arange(rows)[:, None] * num_actors
        times = np.bincount(draws.ravel(), minlength=rows * num_actors).reshape(rows, num_actors)
        drawn.append(times @ totals)
    sums = np.concatenate(drawn)
    return sums[:, 1:] / sums[:, :1]


def interval(means: NDArray[np.float64], level: float = 0.95) -> list[float]:
    """The central `level` of the replicates `[R]`: low and high."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]
