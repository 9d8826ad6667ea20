"""One level of a search in the trie, compiled: legal children of every beam, and the best of each query's.

A child is legal while not all leaves beneath it are hidden from its query. Nothing here has the size of the corpus.
"""

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def expand(  # type: ignore[no-untyped-def]
    offsets, nodes, scores, source, log_p, first_child, tokens, first_leaf, users, hidden_offsets, hidden, width
):
    """The best `width` legal children of each query's beams: what they are, which beam's, and their scores, `[Q, W]`.

    Beams of query q are `offsets[q]:offsets[q + 1]` of `nodes` and `scores`; `log_p[source]` are the log-probabilities
    of their tokens. The hidden leaves of a query ascend. `users` is empty but for the last level, of which users come
    back in place of nodes. Best first, ties to the lower; -1 and -inf where there are no more.
    """
    num = len(offsets) - 1
    kept, parents = np.full((num, width), -1, np.int64), np.full((num, width), -1, np.int64)
    best = np.full((num, width), -np.inf, np.float32)
    for q in range(num):
        own = hidden[hidden_offsets[q] : hidden_offsets[q + 1]]
        size = 0
        for r in range(offsets[q], offsets[q + 1]):
            begin, end = first_child[nodes[r]], first_child[nodes[r] + 1]
            seen = np.searchsorted(own, first_leaf[begin] if len(first_leaf) else begin)
            for child in range(begin, end):
                seen, legal = _pass(child, first_leaf, own, seen)
                if legal:
                    step = log_p[source[r], tokens[child]] if tokens[child] >= 0 else np.float32(0)
                    key = users[child] if len(users) else child
                    size = _offer(size, scores[r] + step, key, r, best[q], kept[q], parents[q])
        _settle(size, best[q], kept[q], parents[q])
    return kept, parents, best


@numba.njit(cache=True, nogil=True)
def greatest(offsets, scores, width):  # type: ignore[no-untyped-def]
    """Where the `width` greatest scores of each of consecutive stretches are, best first, `[S, W]`; -1 behind the last.

    Stretch s is `scores[offsets[s]:offsets[s + 1]]`.
    """
    num = len(offsets) - 1
    places, best = np.full((num, width), -1, np.int64), np.empty(width)
    unused = np.empty(width, np.int64)
    for s in range(num):
        size = 0
        for place in range(offsets[s], offsets[s + 1]):
            size = _offer(size, scores[place], place, 0, best, places[s], unused)
        _settle(size, best, places[s], unused)
    return places


@numba.njit(cache=True, nogil=True)
def _pass(child, first_leaf, own, seen):  # type: ignore[no-untyped-def]
    """Step over the hidden beneath a child: how many of the query's `own` lie before its end, and whether it is legal.

    `seen` of them lie before its begin.
    """
    stop = first_leaf[child + 1] if len(first_leaf) else child + 1
    leaves = stop - (first_leaf[child] if len(first_leaf) else child)
    before = seen
    while seen < len(own) and own[seen] < stop:
        seen += 1
    return seen, seen - before < leaves


@numba.njit(cache=True, nogil=True)
def _worse(score, key, other_score, other_key):  # type: ignore[no-untyped-def]
    return score < other_score or (score == other_score and key > other_key)


@numba.njit(cache=True, nogil=True)
def _offer(size, score, key, parent, scores, keys, parents):  # type: ignore[no-untyped-def]
    """Put into a heap with its worst on top, in place of that where the heap is full; the size after."""
    if size < len(scores):
        place = size
        while place > 0 and _worse(score, key, scores[(place - 1) // 2], keys[(place - 1) // 2]):
            above = (place - 1) // 2
            scores[place], keys[place], parents[place] = scores[above], keys[above], parents[above]
            place = above
        scores[place], keys[place], parents[place] = score, key, parent
        return size + 1
    if _worse(scores[0], keys[0], score, key):
        _sink(size, score, key, parent, scores, keys, parents)
    return size


@numba.njit(cache=True, nogil=True)
def _sink(size, score, key, parent, scores, keys, parents):  # type: ignore[no-untyped-def]
    """Replace the top of a heap."""
    place = 0
    while 2 * place + 1 < size:
        below = 2 * place + 1
        if below + 1 < size and _worse(scores[below + 1], keys[below + 1], scores[below], keys[below]):
            below += 1
        if not _worse(scores[below], keys[below], score, key):
            break
        scores[place], keys[place], parents[place] = scores[below], keys[below], parents[below]
        place = below
    scores[place], keys[place], parents[place] = score, key, parent


@numba.njit(cache=True, nogil=True)
def _settle(size, scores, keys, parents):  # type: ignore[no-untyped-def]
    """Sort a heap, best first: its worst goes to the end, time and again."""
    for last in range(size - 1, 0, -1):
        score, key, parent = scores[last], keys[last], parents[last]
        scores[last], keys[last], parents[last] = scores[0], keys[0], parents[0]
        _sink(last, score, key, parent, scores, keys, parents)
