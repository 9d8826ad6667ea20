"""Confidence intervals by the bootstrap over actors: a user's events hang together, so whole users are drawn."""

import numpy as np
from numpy.typing import NDArray

BLOCK_DRAWS = 1 << 22
"""Actors drawn at once, bounding memory."""


def bootstrap_means(
    values: NDArray[np.float64],
    actors: NDArray[np.int64],
    counted: NDArray[np.bool_] | None = None,
    replicates: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Means of the columns of `values` `[E, M]` when as many actors as there are are drawn with replacement: `[R, M]`.

    All columns see the same draws, so the difference of two columns is a paired comparison. With `counted` `[E, M]`, a
    column's mean is over those of its events alone, and nan where a draw has none of them.
    """
    _, group = np.unique(actors, return_inverse=True)
    num_actors = int(group.max()) + 1
    weights = np.ones((len(values), 1)) if counted is None else counted.astype(np.float64)
    columns = np.concatenate([weights * values, weights], axis=1)
    totals = np.stack([np.bincount(group, column, num_actors) for column in columns.T], axis=1)  # [A, M + 1 or 2 M]
    rng = np.random.default_rng(seed)
    drawn = []
    for begin in range(0, replicates, size := max(1, BLOCK_DRAWS // num_actors)):
        rows = min(size, replicates - begin)
        draws = rng.integers(num_actors, size=(rows, num_actors)) + np.arange(rows)[:, None] * num_actors
        times = np.bincount(draws.ravel(), minlength=rows * num_actors).reshape(rows, num_actors)
        drawn.append(times @ totals)
    sums = np.concatenate(drawn)
    with np.errstate(invalid="ignore"):
        return sums[:, : values.shape[1]] / sums[:, values.shape[1] :]


def interval(means: NDArray[np.float64], level: float = 0.95) -> list[float]:
    """The central `level` of the replicates `[R]` that are not nan: low and high."""
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]
