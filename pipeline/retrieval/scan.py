"""The scan of inverted lists, compiled: which lists, how far each of their rows is, and the best k of them.

A block of queries goes through the lists together, one list after the other, so that its rows are read and converted
once for all who probe it. A row costs a query one inner product and one comparison with its k-th best so far; who is
hidden, dead or a second copy is asked only of rows that would enter. All products are summed in one order:
a score does not depend on who else asks.

Letters: B queries of a block, P probed lists of each, C lists, M rows of a segment, D dimensions.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numba
import numpy as np
from numba.extending import overload

_compiled = numba.njit(cache=True, nogil=True)
_LAST_ID = np.uint64(0xFFFFFFFF)
_SUMS_IN_ANY_ORDER = {"reassoc", "contract", "nsz"}  # infinities stay what they are


@numba.njit(cache=True, nogil=True, fastmath=_SUMS_IN_ANY_ORDER)
def _products_of_four(rows, a, b, c, d, products):
    """Inner products of rows `[n, D]` with four vectors into `[4, >= n]`, as vector instructions."""
    for r in range(len(rows)):
        to_a = to_b = to_c = to_d = np.float32(0)
        for i in range(rows.shape[1]):
            to_a += rows[r, i] * a[i]
            to_b += rows[r, i] * b[i]
            to_c += rows[r, i] * c[i]
            to_d += rows[r, i] * d[i]
        products[0, r], products[1, r], products[2, r], products[3, r] = to_a, to_b, to_c, to_d


@numba.njit(cache=True, nogil=True, fastmath=_SUMS_IN_ANY_ORDER)
def _products(rows, vector, products):
    """Inner products of rows `[n, D]` with one vector into `[>= n]`, each summed as `_products_of_four` does."""
    last = len(rows) - 1
    for r in range(0, len(rows), 4):
        q, s, t = min(r + 1, last), min(r + 2, last), min(r + 3, last)
        of_r = of_q = of_s = of_t = np.float32(0)
        for i in range(rows.shape[1]):
            of_r += rows[r, i] * vector[i]
            of_q += rows[q, i] * vector[i]
            of_s += rows[s, i] * vector[i]
            of_t += rows[t, i] * vector[i]
        products[r], products[q], products[s], products[t] = of_r, of_q, of_s, of_t


@_compiled
def score_children(vectors, centroids, cells, scores):
    """Products of queries `[B, D]` with centroids `[C, D]`, those of `cells` `[B, E]`, into `[B, E, size]`."""
    size = scores.shape[2]
    for q in range(len(vectors)):
        for e in range(cells.shape[1]):
            first = cells[q, e] * size
            _products(centroids[first : first + size], vectors[q], scores[q, e])


@_compiled
def largest(scores, num):
    """Columns of the `num` largest of each row of `scores` `[B, W]`, ascending; of equals the first."""
    columns = np.empty((len(scores), num), np.int32)
    keys, size, threshold = np.empty((1, 2 * num), np.uint64), np.empty(1, np.int64), np.empty(1, np.float32)
    for q in range(len(scores)):
        size[0], threshold[0] = 0, -np.inf
        for c in range(scores.shape[1]):
            if scores[q, c] >= threshold[0]:
                _enter(0, c, scores[q, c], keys, size, threshold)
        if size[0] < num:  # scores that are not numbers
            columns[q] = np.arange(num)
        else:
            _select(keys[0, : size[0]], num)
            for i in range(num):
                columns[q, i] = _LAST_ID - (keys[0, i] & _LAST_ID)
            columns[q].sort()
    return columns


@_compiled
def by_list(probes, num_lists):
    """Who probes each list, of `probes` `[B, P]`: offsets `[C + 1]` and queries."""
    offsets = np.zeros(num_lists + 1, np.int64)
    for c in probes.flat:
        offsets[c + 1] += 1
    offsets = np.cumsum(offsets)
    queries, filled = np.empty(probes.size, np.int64), offsets[:-1].copy()
    for q in range(len(probes)):
        for c in probes[q]:
            queries[filled[c]] = q
            filled[c] += 1
    return offsets, queries


@_compiled
def ascending_rows(offsets, ids):
    """The ids of each row of a jagged list, sorted."""
    ids = ids.copy()
    for q in range(len(offsets) - 1):
        row = ids[offsets[q] : offsets[q + 1]]
        for i in range(1, len(row)):
            if row[i - 1] > row[i]:
                row.sort()
                break
    return ids


@_compiled
def scan_segment(offsets, ids, primary, rows, scale, dead, vectors, probes, askers, hidden, best):
    """Offer to each query the live rows of the lists that it probes.

    The first six are a `Segment`, float16 as its bits in uint16. `probes` `[B, P]` ascend; `askers` is `by_list` of
    them. `hidden` are two jagged lists of ascending ids that are not offered: (offsets, ids, offsets, ids).
    `best` are what `nobody` made.
    """
    keys, sizes, thresholds = best
    first_offsets, first, second_offsets, second = hidden
    asker_offsets, queries = askers
    longest = 0
    for c in range(len(offsets) - 1):
        longest = max(longest, offsets[c + 1] - offsets[c])
    space, products = np.empty((longest, rows.shape[1]), np.float32), np.empty((4, longest), np.float32)
    for c in range(len(offsets) - 1):
        mine = queries[asker_offsets[c] : asker_offsets[c + 1]]
        begin, num = offsets[c], offsets[c + 1] - offsets[c]
        if not len(mine) or not num:
            continue
        block = _as_float32(rows, scale, begin, begin + num, space)
        for i in range(0, len(mine), 4):
            four = mine[i : i + 4]
            if len(four) == 4:
                a, b, d, e = vectors[four[0]], vectors[four[1]], vectors[four[2]], vectors[four[3]]
                _products_of_four(block, a, b, d, e, products)
            else:
                for j in range(len(four)):
                    _products(block, vectors[four[j]], products[j])
            for j in range(len(four)):
                q = four[j]
                threshold = thresholds[q]
                for r in range(num):
                    if not products[j, r] >= threshold:
                        continue
                    row = begin + r
                    if len(dead) and dead[row]:
                        continue
                    if primary[row] != c and _among(probes[q], 0, probes.shape[1], primary[row]):
                        continue
                    if _among(first, first_offsets[q], first_offsets[q + 1], ids[row]):
                        continue
                    if _among(second, second_offsets[q], second_offsets[q + 1], ids[row]):
                        continue
                    _enter(q, ids[row], products[j, r], keys, sizes, thresholds)
                    threshold = thresholds[q]


@_compiled
def scan_named(begin, primary, rows, scale, vectors, probes, named, bonus, places, excluded, best, compared):
    """Offer to each query whom it names and does not exclude: those whose row `places` tells to be of this segment.

    `begin` is the place of the segment's first row; `named` and `excluded` are (offsets, ids), the latter ascending.
    `compared` `[B]` grows by those whose first list the query does not probe.
    """
    offsets, ids = named
    exclude_offsets, exclude = excluded
    keys, sizes, thresholds = best
    space, product = np.empty((1, rows.shape[1]), np.float32), np.empty(1, np.float32)
    for q in range(len(vectors)):
        for i in range(offsets[q], offsets[q + 1]):
            row = places[ids[i]] - begin
            if not 0 <= row < len(rows) or _among(exclude, exclude_offsets[q], exclude_offsets[q + 1], ids[i]):
                continue
            _products(_as_float32(rows, scale, row, row + 1, space), vectors[q], product)
            if product[0] + bonus[i] >= thresholds[q]:
                _enter(q, ids[i], product[0] + bonus[i], keys, sizes, thresholds)
            compared[q] += not _among(probes[q], 0, probes.shape[1], primary[row])


@_compiled
def _among(ascending, low, high, wanted):
    """Whether one of `ascending[low:high]` is it: binary search."""
    end = high
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low < end and ascending[low] == wanted


@_compiled
def nobody(num_queries, k):
    """The best so far of each query: keys `[B, 2k]`, how many of them there are, and the score of the k-th `[B]`."""
    keys = np.zeros((num_queries, 2 * k), np.uint64)
    return keys, np.zeros(num_queries, np.int64), np.full(num_queries, -np.inf, np.float32)


@_compiled
def _enter(q, v, score, keys, sizes, thresholds):
    """Note a candidate; where there is no room for another, all but the best k go.

    Its key orders as it does, by score and then by lower id: a float's bits, those of negatives turned around.
    """
    bits = np.float32(score + np.float32(0)).view(np.uint32)  # no zero has a sign
    rising = bits ^ np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else bits | np.uint32(0x80000000)
    keys[q, sizes[q]] = (np.uint64(rising) << np.uint64(32)) | (_LAST_ID - np.uint64(v))
    sizes[q] += 1
    if sizes[q] == keys.shape[1]:
        k = keys.shape[1] // 2
        _select(keys[q], k)
        sizes[q] = k
        thresholds[q] = _score_of(keys[q, k - 1])


@_compiled
def _score_of(key):
    rising = np.uint32(key >> np.uint64(32))
    bits = rising ^ np.uint32(0x80000000) if rising >> np.uint32(31) else rising ^ np.uint32(0xFFFFFFFF)
    return np.uint32(bits).view(np.float32)


@_compiled
def _select(keys, k):
    """Move the k largest to the front, the least of them last (Hoare's quickselect)."""
    low, high = 0, len(keys) - 1
    while low < high:
        pivot, i, j = keys[(low + high) >> 1], low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i, j = i + 1, j - 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break


@_compiled
def best_first(best, ids, scores):
    """Write the best k of each query into `ids` and `scores` `[B, k]`, best first; -1 and -inf where there are none."""
    keys, sizes, _ = best
    k = ids.shape[1]
    for q in range(len(keys)):
        found = min(k, sizes[q])
        if sizes[q] > k:
            _select(keys[q, : sizes[q]], k)
        keys[q, :found].sort()
        for i in range(found):
            key = keys[q, found - 1 - i]
            ids[q, i], scores[q, i] = _LAST_ID - (key & _LAST_ID), _score_of(key)
        ids[q, found:], scores[q, found:] = -1, -np.inf


def _as_float32(rows, scale, begin, end, space):
    """Rows `begin:end` as float32, in `space` where they are stored otherwise: what `_convert` compiles."""
    raise NotImplementedError


@overload(_as_float32)
def _convert(rows, scale, begin, end, space):
    if rows.dtype == numba.float32:
        return lambda rows, scale, begin, end, space: rows[begin:end]
    return _from_half if rows.dtype == numba.uint16 else _from_int8


def _from_half(rows, scale, begin, end, space):
    """The bias of the exponent differs by 112; numbers below 2⁻¹⁴ come out right too (Giesen: half to float)."""
    bits = space.view(np.uint32)
    for r in range(end - begin):
        for i in range(rows.shape[1]):
            half = np.uint32(rows[begin + r, i])
            bits[r, i] = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | ((half & np.uint32(0x8000)) << np.uint32(16))
        for i in range(rows.shape[1]):
            space[r, i] *= np.float32(2.0**112)
    return space[: end - begin]


def _from_int8(rows, scale, begin, end, space):
    for r in range(end - begin):
        for i in range(rows.shape[1]):
            space[r, i] = np.float32(rows[begin + r, i]) * scale[begin + r]
    return space[: end - begin]
