"""Exclusions and named contacts for indices of FAISS: what is found beside whom, and merged with whom.

Queries that hide few go there in blocks, and ask for as many more as they hide. One that hides many goes alone, with a
filter, for a long list costs more than that.
"""

from typing import Any, Protocol

import faiss
import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.pipeline.retrieval.exclusion import rows_of, union
from friendrec.pipeline.retrieval.parts import Found
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.scan import ascending_rows

ROOM = np.array([0, 16, 32, 64, 128, 256])
"""So many more are asked for as cover those hidden: few sizes, so that blocks are large. Beyond these, a filter."""


class Ask(Protocol):
    """A search of an index."""

    def __call__(self, vectors: NDArray[np.float32], wanted: int, slack: int, selector: Any) -> Found:
        """The best `wanted` of each vector `[B, D]` that the selector lets through, best first, -1 behind the last.

        `slack`: so many near ones may be none that the query is after.
        """
        ...


def room_of(queries: Queries) -> NDArray[np.int64]:
    """How many more each query asks for, `[Q]`: at least as many as it excludes or names, or 0 with a filter."""
    jagged = (queries.exclude_offsets, queries.exclude_ids), (queries.sparse_offsets, queries.sparse_ids)
    num = 1 + max(int(ids.max(initial=-1)) for _, ids in jagged)
    return _room(np.diff(union(num, *jagged)[0]))


def _room(hidden: NDArray[np.int64]) -> NDArray[np.int64]:
    room: NDArray[np.int64] = np.where(hidden <= ROOM[-1], ROOM[np.searchsorted(ROOM[:-1], hidden)], 0)
    return room


def _num_hidden(queries: Queries, scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many each query excludes or names, each once: most who are named are excluded, and then score -inf.

    The same as by `union`, which would sort on FAISS's time.
    """
    named = np.bincount(rows_of(queries.sparse_offsets)[scores > -np.inf], minlength=len(queries))
    hidden: NDArray[np.int64] = np.diff(queries.exclude_offsets) + named
    return hidden


def search(
    vectors: NDArray[np.float32],
    queries: Queries,
    k: int,
    most: int,
    ask: Ask,
) -> Found:
    """The best k `[Q, k]` of the `most` that are wanted of an index, exclusions apart, and of those named."""
    ids, best = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
    excluded = queries.exclude_offsets, ascending_rows(queries.exclude_offsets, queries.exclude_ids)
    named = queries.sparse_offsets, ascending_rows(queries.sparse_offsets, queries.sparse_ids)
    jagged = queries.sparse_offsets, queries.sparse_ids, queries.sparse_bonus
    ranked, scores = _ranked(queries.vector, vectors, *jagged, *excluded)
    hidden, wanted = _num_hidden(queries, scores), min(k, most, len(vectors))
    room, filtered = _room(hidden), hidden > ROOM[-1]
    for more in np.unique(room[~filtered]).tolist():
        rows = np.flatnonzero((room == more) & ~filtered)
        found = ask(queries.vector[rows], min(len(vectors), wanted + more), more, None)
        _merge(rows, *found, *excluded, *named, ranked, scores, ids, best)
    rows = np.flatnonzero(filtered)
    found = np.empty((len(rows), wanted), np.int64), np.empty((len(rows), wanted), np.float32)
    for place, q in enumerate(rows):
        own = [of_row[offsets[q] : offsets[q + 1]] for offsets, of_row in (excluded, named)]
        selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(np.concatenate(own)))
        found[0][place], found[1][place] = ask(queries.vector[q : q + 1], wanted, int(hidden[q]), selector)
    _merge(rows, *found, *excluded, *named, ranked, scores, ids, best)
    return ids, best


@numba.njit(cache=True, nogil=True)
def _holds(ids, wanted):  # type: ignore[no-untyped-def]
    """Whether one of ascending ids is the wanted."""
    place = np.searchsorted(ids, wanted)
    return place < len(ids) and ids[place] == wanted


@numba.njit(cache=True, nogil=True)
def _ranked(queries, vectors, offsets, ids, bonus, excluded_offsets, excluded):  # type: ignore[no-untyped-def]
    """Those named and their scores, row by row best first, ties to the lower id; -inf where excluded."""
    ranked, scores = np.empty_like(ids), np.empty(len(ids), np.float32)
    for q in range(len(offsets) - 1):
        own = excluded[excluded_offsets[q] : excluded_offsets[q + 1]]
        begin, end = offsets[q], offsets[q + 1]
        by_id = begin + np.argsort(ids[begin:end])
        found = np.full(end - begin, -np.inf, np.float32)
        for place, m in enumerate(by_id):
            if not _holds(own, ids[m]):
                product = np.float32(0)
                for d in range(queries.shape[1]):
                    product += queries[q, d] * vectors[ids[m], d]
                found[place] = product + bonus[m]
        order = np.argsort(-found, kind="mergesort")
        ranked[begin:end], scores[begin:end] = ids[by_id[order]], found[order]
    return ranked, scores


@numba.njit(cache=True, nogil=True)
def _merge(rows, found, found_scores, excluded_offsets, excluded, offsets, named, ranked, scores, ids, best):  # type: ignore[no-untyped-def]
    """Into rows `rows` of `ids` and `best` the best of the found who are not excluded, and of the named."""
    for i in range(len(rows)):
        q = rows[i]
        hidden = excluded[excluded_offsets[q] : excluded_offsets[q + 1]]
        own = named[offsets[q] : offsets[q + 1]]
        place, m = 0, offsets[q]
        for f in range(found.shape[1] + 1):
            candidate, score = np.int64(-1), np.float32(-np.inf)
            if f < found.shape[1]:
                candidate, score = found[i, f], found_scores[i, f]
                if candidate < 0 or _holds(hidden, candidate) or _holds(own, candidate):
                    continue
            while place < ids.shape[1] and m < offsets[q + 1] and scores[m] >= score and scores[m] > -np.inf:
                ids[q, place], best[q, place] = ranked[m], scores[m]
                place, m = place + 1, m + 1
            if place == ids.shape[1]:
                break
            if candidate >= 0:
                ids[q, place], best[q, place] = candidate, score
                place += 1


def allowed_names(num: int, queries: Queries) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Query and id of whom a query names and does not exclude, `[M]`, among `num` candidates."""
    row = np.repeat(np.arange(len(queries)), np.diff(queries.sparse_offsets))
    hidden = np.repeat(np.arange(len(queries)), np.diff(queries.exclude_offsets)) * num + queries.exclude_ids
    stays = ~np.isin(row * num + queries.sparse_ids, hidden)
    return row[stays], queries.sparse_ids[stays]
