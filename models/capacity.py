"""Assignment to tokens of limited room: who is nearest stays, the others go to the nearest token that has some left."""

from collections.abc import Callable

import numba
import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 24
"""Distances held at once."""

Rows = NDArray[np.int64]


def within_capacity(
    tokens: NDArray[np.int32],
    groups: Rows,
    capacity: int,
    distances: Callable[[Rows], NDArray[np.float32]],
    num_tokens: int,
    fixed: NDArray[np.bool_] | None = None,
) -> NDArray[np.int32]:
    """Tokens `[N]` of which no more than `capacity` users of a group have the same one.

    `tokens` `[N]` are the wishes, `groups` `[N]` anything that sorts; `distances(rows)` gives those from all tokens,
    `[len(rows), num_tokens]`. Of those who wish one token the nearest keep it, `fixed` users before all others. The
    rest choose one after the other, in order of distance from their wish, so that nobody who could stay is driven out.
    Raises ValueError where a group has more users than room, or more fixed ones on a token.
    """
    _, group = np.unique(groups, return_inverse=True)
    wish = group * num_tokens + tokens
    _, wished, counts = np.unique(wish, return_inverse=True, return_counts=True)
    crowded = np.flatnonzero(counts[wished] > capacity)
    if not len(crowded):
        return tokens
    own = np.empty(len(tokens), np.float32)
    for rows in _blocks(crowded, num_tokens):
        own[rows] = distances(rows)[np.arange(len(rows)), tokens[rows]]
    stays = np.zeros(len(crowded), bool) if fixed is None else fixed[crowded]
    order = crowded[np.lexsort((own[crowded], ~stays, wish[crowded]))]
    place = np.arange(len(order)) - np.searchsorted(wish[order], wish[order])
    homeless = order[place >= capacity]
    if fixed is not None and fixed[homeless].any():
        raise ValueError(f"more than {capacity} fixed users have the same token")
    return _rehouse(
        tokens, group, capacity, distances, num_tokens, homeless[np.lexsort((own[homeless], group[homeless]))]
    )


def _rehouse(
    tokens: NDArray[np.int32],
    group: Rows,
    capacity: int,
    distances: Callable[[Rows], NDArray[np.float32]],
    num_tokens: int,
    homeless: Rows,
) -> NDArray[np.int32]:
    """Tokens with those of `homeless`, rows sorted by group, chosen anew."""
    result = tokens.copy()
    result[homeless] = -1
    members = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(group))])
    for rows in _blocks(homeless, num_tokens):
        here, local = np.unique(group[rows], return_inverse=True)
        taken = _count(result, members, starts, here, num_tokens)
        result[rows] = _choose(distances(rows), local, taken, capacity)
    if (result < 0).any():
        raise ValueError(f"a group has more users than {num_tokens} tokens of {capacity} have room for")
    return result


def _blocks(rows: Rows, num_tokens: int) -> list[Rows]:
    return np.array_split(rows, -(-len(rows) * num_tokens // BLOCK) or 1)


@numba.njit(cache=True, nogil=True)
def _count(tokens: np.ndarray, members: Rows, starts: Rows, groups: Rows, num_tokens: int) -> np.ndarray:
    """Users that have each token in each of the `groups`, `[groups, num_tokens]`; a token of -1 is none."""
    taken = np.zeros((len(groups), num_tokens), np.int32)
    for place, group in enumerate(groups):
        for member in members[starts[group] : starts[group + 1]]:
            if tokens[member] >= 0:
                taken[place, tokens[member]] += 1
    return taken


@numba.njit(cache=True, nogil=True)
def _choose(distances: np.ndarray, group: Rows, taken: np.ndarray, capacity: int) -> np.ndarray:
    """The nearest token with room for each row in turn, -1 where there is none; `taken` is counted on."""
    chosen = np.full(len(distances), -1, np.int32)
    for row in range(len(distances)):
        best = -1
        for token in range(distances.shape[1]):
            free = taken[group[row], token] < capacity
            if free and (best < 0 or distances[row, token] < distances[row, best]):
                best = token
        if best >= 0:
            taken[group[row], best] += 1
            chosen[row] = best
    return chosen
