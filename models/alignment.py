"""Codes that outlive a retrain: new vectors, old codes, and codebooks that move to where the vectors went.

After a retrain the vectors of the same users lie elsewhere, turned or shifted. Codebooks follow without anybody's code
changing: given all codes, the best codebooks are least squares,

    min over C_0 … C_{L-1} of  Σ_u |x(u) − Σ_l C_l[token_l(u)]|²

(the update of additive quantization; Babenko and Lempitsky 2014), solved by sweeps in which each token moves to the
mean of what the other levels leave of its users. A rotation of the old codebooks (Procrustes) is among what it finds.
Then a user's code changes only where another lowers the user's error by more than a margin.
"""

import numpy as np
from numpy.typing import NDArray

from friendrec.models.codes import unique_codes
from friendrec.models.placement import widened
from friendrec.models.tokenizer import Codebooks, Tokenizer, Tokens, Vectors, means_of_tokens, standard_units
from friendrec.models.trie import NO_TOKEN

SWEEPS = 6
ROUNDS = 2
"""Of codebooks to codes and codes to codebooks."""


def follow_codes(codebooks: Codebooks, vectors: Vectors, tokens: Tokens) -> Codebooks:
    """Codebooks for `vectors` `[N, D]` whose codes `[N, ≥ L]` are these; tokens that nobody has stay where they are.

    Mean and scale are those of the vectors.
    """
    mean, scale = standard_units(vectors)
    left = (vectors - mean) / np.float32(scale)
    levels = list(codebooks.levels)
    for level, column in enumerate(tokens.T[: len(levels)]):  # a level after the other, as in residual k-means
        levels[level] = means_of_tokens(left, column, levels[level])
        left -= levels[level][column]
    for _ in range(SWEEPS):
        for level, column in enumerate(tokens.T[: len(levels)]):
            left += levels[level][column]
            levels[level] = means_of_tokens(left, column, levels[level])
            left -= levels[level][column]
    return Codebooks(tuple(levels), mean, scale)


def realign(
    codebooks: Codebooks, vectors: Vectors, old: Tokens, margin: float
) -> tuple[Codebooks, Tokens, NDArray[np.bool_]]:
    """Codebooks for `vectors` `[N, D]` and what `keep_codes` gives, by turns. See there for `old` and `margin`."""
    known = old[:, 0] != NO_TOKEN
    codebooks = follow_codes(codebooks, vectors[known], old[known])
    for _ in range(ROUNDS - 1):
        wishes, fixed = keep_codes(codebooks, vectors, old, margin)
        codes = unique_codes(codebooks, vectors, wishes, fixed)
        codebooks = follow_codes(codebooks, vectors, codes)
    return codebooks, *keep_codes(codebooks, vectors, old, margin)


def keep_codes(tokenizer: Tokenizer, vectors: Vectors, old: Tokens, margin: float) -> tuple[Tokens, NDArray[np.bool_]]:
    """Codes `[N, L]`, or `[N, L + 1]` where the old ones are, and which of them `[N]` are old codes that stay.

    `old` is NO_TOKEN throughout for users who had none. An old code goes only where the code that the user would end
    with has a squared error below 1 − `margin` times that of the old: then the code is the tokenizer's own, and may be
    shared; `unique_codes` must leave those that stay where they are.
    """
    num_levels = len(tokenizer.sizes)
    known = np.flatnonzero(old[:, 0] != NO_TOKEN)
    bound = np.full(len(old), np.inf)  # what a new code must be below
    bound[known] = (1 - margin) * errors(tokenizer, vectors[known], old[known, :num_levels])
    wishes = np.full_like(old, NO_TOKEN)
    wishes[:, :num_levels] = own = tokenizer.encode(vectors)
    stays = errors(tokenizer, vectors, own) >= bound
    while True:
        wishes[stays] = old[stays]
        codes = unique_codes(tokenizer, vectors, wishes, stays)
        # whoever had to give way to others may be no better off than before
        back = ~stays & (errors(tokenizer, vectors, codes[:, :num_levels]) >= bound)
        if not back.any():
            return wishes, stays
        stays |= back


def errors(tokenizer: Tokenizer, vectors: Vectors, tokens: Tokens) -> NDArray[np.float32]:
    """Squared distance of each vector from what its code `[N, L]` stands for, `[N]`."""
    squares: NDArray[np.float32] = np.square(vectors - tokenizer.decode(tokens)).sum(axis=1)
    return squares


def changed_share(old: Tokens, new: Tokens) -> tuple[float, list[float]]:
    """Share of users whose code changed, whole and a level; the narrower of the two ends in NO_TOKEN."""
    width = max(old.shape[1], new.shape[1])
    changed = widened(old, width) != widened(new, width)
    if not len(changed):
        return 0.0, [0.0] * width
    return float(changed.any(axis=1).mean()), changed.mean(axis=0).tolist()
