"""Search of an index that knows vectors only: who is named is scored here, the rest there, and both are merged."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.pipeline.retrieval.exclusion import rows_of, union
from friendrec.pipeline.retrieval.protocol import Queries

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Found = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Ids and scores of some candidates."""


class Dense(Protocol):
    """N stored vectors."""

    def __len__(self) -> int: ...

    def vectors_of(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The stored vectors of candidates, `[len(ids), D]`."""
        ...

    def nearest(self, vector: NDArray[np.float32], k: int, hidden: NDArray[np.int64]) -> Found:
        """At least k candidates of high inner product with `vector` `[D]`, none of the `hidden` (distinct, ascending).

        k is at least 1, and so many are not hidden.
        """
        ...


def search_by_parts(index: Dense, queries: Queries, k: int) -> Found:
    """Best k allowed candidates of each query: see `Retriever`.

    Named candidates are scored exactly, whatever the index would have found; it looks among all others, whom the
    query does not exclude. Queries go one at a time, for each hides others, and on all cores.
    """
    num = len(index)
    sparse = queries.sparse_offsets, queries.sparse_ids
    hidden_offsets, hidden = union(num, (queries.exclude_offsets, queries.exclude_ids), sparse)
    excluded = rows_of(queries.exclude_offsets) * num + queries.exclude_ids
    allowed = ~np.isin(rows_of(queries.sparse_offsets) * num + queries.sparse_ids, excluded)
    ids, best = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)

    def answer(q: int) -> None:
        mine = slice(*queries.sparse_offsets[q : q + 2])
        named = queries.sparse_ids[mine][allowed[mine]]
        bonus = queries.sparse_bonus[mine][allowed[mine]]
        found = [(named, _products(queries.vector[q], index.vectors_of(named)) + bonus)] if len(named) else []
        unseen = hidden[slice(*hidden_offsets[q : q + 2])]
        if wanted := min(k, num - len(unseen)):
            found.append(index.nearest(queries.vector[q], wanted, unseen))
        if found:
            candidates, scores = (np.concatenate(part) for part in zip(*found, strict=True))
            order = np.lexsort((candidates, -scores))[:k]
            ids[q, : len(order)], best[q, : len(order)] = candidates[order], scores[order]

    with ThreadPoolExecutor(CORES) as pool:
        for _ in pool.map(answer, range(len(queries))):  # raises what a thread raised
            pass
    return ids, best


@numba.njit(cache=True, nogil=True)
def _products(vector, vectors):  # type: ignore[no-untyped-def]
    """Inner products `[M]`, each summed in one order, so that no score depends on who else is named."""
    products = np.zeros(len(vectors), np.float32)
    for v in range(len(vectors)):
        for d in range(len(vector)):
            products[v] += vector[d] * vectors[v, d]
    return products
