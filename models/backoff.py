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

from friendrec.models.decoding import Decoder


@dataclass(frozen=True)
class BackOff:
    """A `Decoder` around another. A prefix is known by its key, the number that its tokens are the digits of."""

    decoder: Decoder
    keys: tuple[Tensor, ...]  # of each level: [prefixes of training] int64, ascending
    counts: tuple[Tensor, ...]  # of each level: [prefixes] float32, users beneath

    @classmethod
    def of(cls, decoder: Decoder, tokens: NDArray[np.int32]) -> Self:
        """`tokens` `[N, L]` are the codes of the users of training, -1 after the end of a code."""
        key, keys, counts = np.zeros(len(tokens), np.int64), [], []
        for level, size in enumerate(decoder.sizes):
            ends = tokens[:, level] < 0
            key, tokens = (key * size + tokens[:, level])[~ends], tokens[~ends]
            distinct, count = np.unique(key, return_counts=True)
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
        key = torch.zeros(len(prefix), dtype=torch.int64)
        for token, size in zip(prefix.unbind(1), self.sizes, strict=False):
            key = key * size + token
        users = self._beneath(level - 1, key)
        first = torch.searchsorted(self.keys[level], key * self.sizes[level])
        last = torch.searchsorted(self.keys[level], (key + 1) * self.sizes[level])
        beam = torch.repeat_interleave(torch.arange(len(key)), last - first)
        known = self.keys[level][torch.arange(len(beam)) + (first - (last - first).cumsum(0) + last - first)[beam]]
        written = torch.zeros_like(log_p, dtype=torch.bool)
        written[beam, known % self.sizes[level]] = True
        return torch.where(written, log_p, -users.clamp(min=1).log()[:, None])

    def _beneath(self, level: int, key: Tensor) -> Tensor:
        """Users of training beneath prefixes, `[R]`; 0 for those of newcomers alone."""
        place = torch.searchsorted(self.keys[level], key).clamp(max=len(self.keys[level]) - 1)
        return torch.where(self.keys[level][place] == key, self.counts[level][place], 0.0)


def stand_ins(train: NDArray[np.int32], codes: NDArray[np.int32], sizes: tuple[int, ...]) -> NDArray[np.int32]:
    """For each of `codes` `[M, L]` the one of `train` `[N, L]` that shares its longest prefix: `[M, L]`.

    It is a neighbour in lexicographic order.
    """
    digits = np.cumprod([1, *(size + 1 for size in sizes[:0:-1])], dtype=np.int64)[::-1]
    ordered = train[np.argsort((train + 1) @ digits)]
    after = np.searchsorted((ordered + 1) @ digits, (codes + 1) @ digits)
    near = np.stack([ordered[np.clip(place, 0, len(train) - 1)] for place in (after - 1, after)])
    shared = np.cumprod(near == codes, axis=2).sum(axis=2)
    return near[shared.argmax(axis=0), np.arange(len(codes))]
