"""Generation as one more kind of index: beams of an STU run, and how many token scores they take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from friendrec.models.decoding import Decoder
from friendrec.pipeline.retrieval.parts import Found
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.stu import StuIndex

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 100, 200, 400)
WIDEST = 10_000
"""Of the beams that narrower ones are held against: with so few users or fewer they find the best of all."""

SAMPLE = 100
"""Queries that are enough where each takes long."""


@dataclass
class Counting:
    """A decoder that counts the token scores it is asked for: each is a product, as a vector compared is."""

    decoder: Decoder
    scored: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.decoder.sizes

    def cache(self, context: Tensor) -> Any:
        return self.decoder.cache(context)

    def log_probabilities(self, cache: Any, row: Tensor, prefix: Tensor) -> Tensor:
        found = self.decoder.log_probabilities(cache, row, prefix)
        self.scored += found.numel()
        return found


@dataclass(frozen=True)
class Beams:
    """An effort is a width."""

    index: StuIndex

    @property
    def efforts(self) -> Sequence[int | None]:
        return [width for width in WIDTHS if width < len(self.index)]

    def search(self, queries: Queries, k: int, effort: int | None) -> Found:
        """Beams narrower than k find as many as they are, those named included."""
        assert effort is not None
        found = replace(self.index, beam_width=effort).search(queries, min(k, effort))
        missing = ((0, 0), (0, k - found[0].shape[1]))
        return np.pad(found[0], missing, constant_values=-1), np.pad(found[1], missing, constant_values=-np.inf)

    def compared(self, queries: Queries, k: int, effort: int | None) -> float:
        """Prefixes that the decoder goes on from, times the tokens of their level, those of who is named included.

        Of SAMPLE queries.
        """
        assert self.index.decoder is not None
        counting, (_, some) = Counting(self.index.decoder), taken(queries, SAMPLE)
        Beams(replace(self.index, decoder=counting)).search(some, k, effort)
        return counting.scored / len(some)

    def best(self, queries: Queries, k: int) -> Found:
        """What the widest beams find."""
        return self.search(queries, k, min(WIDEST, len(self.index)))


def taken(queries: Queries, most: int) -> tuple[NDArray[np.int64], Queries]:
    """Up to `most` of the queries, evenly spread, and which."""
    rows = np.linspace(0, len(queries) - 1, min(most, len(queries))).astype(np.int64)
    return rows, queries.take(rows)
