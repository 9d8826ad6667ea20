"""Who may not be suggested to whom: jagged lists merged into the one that a search takes."""

import numpy as np
from numpy.typing import NDArray

Jagged = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Offsets `[Q + 1]` and ids: row q is `ids[offsets[q]:offsets[q + 1]]`."""


def union(num_candidates: int, *lists: Jagged) -> Jagged:
    """Row by row, the distinct ids below `num_candidates` of all lists, ascending."""
    keys = [rows_of(offsets) * num_candidates + ids for offsets, ids in lists]
    kept = [key[ids < num_candidates] for key, (_, ids) in zip(keys, lists, strict=True)]
    merged = np.unique(np.concatenate(kept))
    num_rows = len(lists[0][0]) - 1
    return np.searchsorted(merged, np.arange(num_rows + 1) * num_candidates), merged % max(num_candidates, 1)


def one_each(ids: NDArray[np.int64]) -> Jagged:
    """One id a row: the actors themselves."""
    return np.arange(len(ids) + 1), ids


def rows_of(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of each element of a jagged list, `[T]`."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
