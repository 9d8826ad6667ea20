"""Unique codes: users who share one move to the nearest free code, and are numbered only where there are too few codes.

A prefix of l + 1 tokens has room for as many users as codes can follow it. Level by level, within each prefix, users
beyond a token's room move to the nearest token that has some, and their later tokens are chosen anew; at the last level
the room is one user, so a code is had once.
"""

from functools import partial
from math import prod

import numpy as np
from numpy.typing import NDArray

from friendrec.models.capacity import within_capacity
from friendrec.models.tokenizer import Tokenizer, Tokens, Vectors
from friendrec.models.trie import NO_TOKEN


def unique_codes(
    tokenizer: Tokenizer, vectors: Vectors, tokens: Tokens, fixed: NDArray[np.bool_] | None = None
) -> Tokens:
    """Codes `[N, L]` or `[N, L + 1]` that no two users share, from those of the tokenizer for `vectors` `[N, D]`.

    `fixed` `[N]` users keep the code that they have in `tokens`, which has L + 1 levels where theirs have; fixed codes
    must be unique already. The last level of L + 1, that of disambiguation, exists only where there are more users than
    codes: nobody is moved then, and users who share a code are numbered.
    """
    sizes, fixed = tokenizer.sizes, np.zeros(len(tokens), bool) if fixed is None else fixed
    if len(tokens) > prod(sizes) or tokens.shape[1] > len(sizes):
        return _disambiguated(tokenizer, vectors, tokens, fixed)
    codes = tokens.copy()
    group = np.zeros(len(codes), np.int64)
    for level, size in enumerate(sizes):
        room = min(prod(sizes[level + 1 :]), len(codes))
        distances = partial(_distances, tokenizer, vectors, codes[:, :level])
        chosen = within_capacity(codes[:, level], group, room, distances, size, fixed)
        moved = np.flatnonzero(chosen != codes[:, level])
        codes[:, level] = chosen
        if len(moved):
            codes[moved] = tokenizer.encode(vectors[moved], codes[moved, : level + 1])
        group = extended(group, codes[:, level], size)
    return codes


def num_sharing(tokens: Tokens) -> int:
    """Users whose code another user has too."""
    group = code_numbers(tokens)
    return int((np.bincount(group)[group] > 1).sum())


def code_numbers(tokens: Tokens) -> NDArray[np.int64]:
    """A number for each code `[N]`, equal for equal codes: below N, in lexicographic order."""
    group = np.zeros(len(tokens), np.int64)
    for column in tokens.T:
        group = extended(group, column - NO_TOKEN, int(column.max(initial=0)) - NO_TOKEN + 1)
    return group


def extended(group: NDArray[np.int64], column: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    """Numbers of prefixes that are longer by one level's tokens."""
    numbers: NDArray[np.int64] = np.unique(group * size + column, return_inverse=True)[1]
    return numbers


def _distances(tokenizer: Tokenizer, vectors: Vectors, prefix: Tokens, rows: NDArray[np.int64]) -> Vectors:
    return tokenizer.distances(vectors[rows], prefix[rows])


def _disambiguated(tokenizer: Tokenizer, vectors: Vectors, tokens: Tokens, fixed: NDArray[np.bool_]) -> Tokens:
    """`[N, L + 1]`: users of one code are numbered from 0, the nearest first; NO_TOKEN for those alone.

    Numbers that fixed users have stay theirs, as does no number at all.
    """
    num_levels = len(tokenizer.sizes)
    codes = np.full((len(tokens), num_levels + 1), NO_TOKEN, np.int32)
    codes[:, : tokens.shape[1]] = tokens
    codes[~fixed, num_levels] = NO_TOKEN
    group = code_numbers(codes[:, :num_levels])
    shared = np.flatnonzero((np.bincount(group)[group] > 1) & ~fixed)
    error = np.square(vectors[shared] - tokenizer.decode(codes[shared, :num_levels])).sum(axis=1)
    shared = shared[np.lexsort((error, group[shared]))]
    first_free = np.zeros(len(tokens), np.int64)  # of each group: above all numbers of fixed users
    np.maximum.at(first_free, group[fixed], codes[fixed, num_levels] + 1)
    place = np.arange(len(shared)) - np.searchsorted(group[shared], group[shared])
    codes[shared, num_levels] = first_free[group[shared]] + place
    return codes
