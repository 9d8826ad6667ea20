"""Codes that no user had in training: as likely as the average of those that share their longest prefix.

A softmax over all codes drives to nothing the tokens that never followed a prefix, so that a newcomer's code, however
near it lies to those of others, would never be written. Here a token that begins such a code gets

    log P(token l | tokens before l) = −log n,    n users of training beneath the prefix before l,

and the tokens after it 0: the code is as likely as the prefix is, shared out among n. All other codes keep their
log-probabilities, so that no order among the users of training moves.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from friendrec.models.codes import extended
from friendrec.models.decoding import Decoder
from friendrec.models.trie import NO_TOKEN


@dataclass(frozen=True)
class BackOff:
    """A `Decoder` around another.

    Prefixes are numbered in lexicographic order, a level at a time. The key of one is the number of that before its
    last token, times the tokens of the level, plus the token: below users × tokens, however many levels there are.
    """

    decoder: Decoder
    keys: tuple[Tensor, ...]  # of each level: [prefixes of training] int64, ascending; a prefix's number is its place
    counts: tuple[Tensor, ...]  # of each level: [prefixes] float32, users beneath

    @classmethod
    def of(cls, decoder: Decoder, tokens: NDArray[np.int32]) -> Self:
        """`tokens` `[N, L]` are the codes of the users of training, -1 after the end of a code."""
        number, keys, counts = np.zeros(len(tokens), np.int64), [], []
        for level, size in enumerate(decoder.sizes):
            goes_on = tokens[:, level] >= 0
            number, tokens = number[goes_on], tokens[goes_on]
            distinct, number, count = np.unique(
                number * size + tokens[:, level], return_inverse=True, return_counts=True
            )
            keys.append(torch.from_numpy(distinct))
            counts.append(torch.from_numpy(count.astype(np.float32)))
        return cls(decoder, tuple(keys), tuple(counts))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each level, `[L]`."""
        return self.decoder.sizes

    def cache(self, context: Tensor) -> Any:
        return self.decoder.cache(context)

    def log_probabilities(self, cache: Any, row: Tensor, prefix: Tensor) -> Tensor:
        """log P of each token of level l, float32 `[R, sizes[l]]` on the CPU."""
        log_p = self.decoder.log_probabilities(cache, row, prefix).float().cpu()
        level = prefix.shape[1]
        if level == 0:  # every token has users beneath, or no prefix to fall back on
            return log_p
        number, size = self._number(prefix), self.sizes[level]
        users = torch.where(number >= 0, self.counts[level - 1][number], 1.0)
        first = torch.searchsorted(self.keys[level], number * size)
        last = torch.searchsorted(self.keys[level], (number + 1) * size)
        beam = torch.repeat_interleave(torch.arange(len(number)), last - first)
        known = self.keys[level][torch.arange(len(beam)) + (first - (last - first).cumsum(0) + last - first)[beam]]
        written = torch.zeros_like(log_p, dtype=torch.bool)
        written[beam, known % size] = True
        return torch.where(written, log_p, -users.log()[:, None])

    def _number(self, prefix: Tensor) -> Tensor:
        """The numbers of prefixes `[R, l]`, int64 `[R]`; -1, whose keys nobody has, for those of newcomers alone."""
        number = torch.zeros(len(prefix), dtype=torch.int64)
        for keys, token, size in zip(self.keys, prefix.unbind(1), self.sizes, strict=False):
            key = number * size + token
            place = torch.searchsorted(keys, key)
            number = torch.where(torch.searchsorted(keys, key, right=True) > place, place, -1)
        return number


def stand_ins(train: NDArray[np.int32], codes: NDArray[np.int32], sizes: tuple[int, ...]) -> NDArray[np.int32]:
    """For each of `codes` `[M, L]` the one of `train` `[N, L]` that shares its longest prefix: `[M, L]`.

    It is a neighbour in lexicographic order.
    """
    number = np.zeros(len(train) + len(codes), np.int64)  # in lexicographic order, of longer and longer prefixes
    for column, size in zip(np.concatenate([train, codes]).T, sizes, strict=True):
        number = extended(number, column - NO_TOKEN, size + 1)
    order = np.argsort(number[: len(train)])
    ordered = train[order]
    after = np.searchsorted(number[order], number[len(train) :])
    near = np.stack([ordered[np.clip(place, 0, len(train) - 1)] for place in (after - 1, after)])
    shared = np.cumprod(near == codes, axis=2).sum(axis=2)
    return near[shared.argmax(axis=0), np.arange(len(codes))]
