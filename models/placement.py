"""Codes for users who are added to a table of codes in which nobody else's may change.

They come one after the other, and each takes the nearest code that is free by then.
"""

from collections import Counter, defaultdict
from math import prod

import numpy as np
from numpy.typing import NDArray

from friendrec.models.tokenizer import Tokenizer, Tokens, Vectors
from friendrec.models.trie import NO_TOKEN

Code = tuple[int, ...]


def widened(tokens: Tokens, width: int) -> Tokens:
    """Codes with NO_TOKEN after them, `[N, width]`."""
    return np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=NO_TOKEN)


def codes_in_turn(tokenizer: Tokenizer, vectors: Vectors, taken: Tokens, old: Tokens) -> Tokens:
    """Codes of users who are added one after the other, so that nobody's depends on who comes later: `[M, L or L + 1]`.

    Each keeps the `old` code `[M, L or L + 1]` where there is one (not NO_TOKEN) and nobody has it, else gets the
    nearest that is free beside the codes `taken` `[N, L or L + 1]`. From where no code is free any more, or somebody
    has the level of disambiguation, the code is the nearest, and whoever shares it is numbered there.
    """
    num_levels = len(tokenizer.sizes)
    width, numbered = num_levels + 1, taken.shape[1] > num_levels
    register, wishes, codes = _Register(widened(taken, width)), tokenizer.encode(vectors), widened(old, width)
    for row, wish in enumerate(wishes):
        code = tuple(codes[row].tolist())
        numbered = numbered or len(taken) + row >= prod(tokenizer.sizes)
        if code[0] == NO_TOKEN or register.count(code):
            if numbered:
                code = register.number(tuple(wish.tolist()))
            else:
                code = (*_nearest_free(tokenizer, vectors[row : row + 1], wish, register), NO_TOKEN)
        numbered = numbered or code[-1] != NO_TOKEN
        register.add(code)
        codes[row] = code
    return codes if taken.shape[1] > num_levels or (codes[:, -1] != NO_TOKEN).any() else codes[:, :num_levels]


def _nearest_free(tokenizer: Tokenizer, vector: Vectors, wish: NDArray[np.int32], register: "_Register") -> Code:
    """Level by level the nearest token beneath which there is a free code."""
    code: Code = ()
    for level, size in enumerate(tokenizer.sizes):
        room = prod(tokenizer.sizes[level + 1 :])
        if register.count((*code, int(wish[level]))) >= room:
            distances = tokenizer.distances(vector, np.array([code], np.int32).reshape(1, level))[0]
            distances[register.children(code, size) >= room] = np.inf
            moved = np.array([(*code, distances.argmin())], np.int32)
            wish = tokenizer.encode(vector, moved)[0]
        code = (*code, int(wish[level]))
    return code


class _Register:
    """How many codes begin with any prefix: of many sorted once, and of few added since."""

    def __init__(self, tokens: Tokens) -> None:
        self.rows = np.asfortranarray(tokens[np.lexsort(tokens.T[::-1])])  # searching a strided column would copy it
        self.added: dict[Code, Counter[int]] = defaultdict(Counter)

    def _beneath(self, prefix: Code) -> slice:
        """The rows that begin so."""
        start, stop = 0, len(self.rows)
        for level, token in enumerate(prefix):
            column = self.rows[start:stop, level]
            key = column.dtype.type(token)  # one of another type would copy the column too
            start, stop = (start + int(np.searchsorted(column, key, side)) for side in ("left", "right"))
        return slice(start, stop)

    def count(self, prefix: Code) -> int:
        """Codes that begin with a prefix of at least one token."""
        beneath = self._beneath(prefix)
        return int(beneath.stop - beneath.start) + self.added[prefix[:-1]][prefix[-1]]

    def children(self, prefix: Code, size: int) -> NDArray[np.int64]:
        """Codes beneath each token that may follow."""
        counts = np.bincount(self.rows[self._beneath(prefix), len(prefix)], minlength=size)
        for token, count in self.added[prefix].items():
            counts[token] += count
        return counts

    def number(self, code: Code) -> Code:
        """The code with NO_TOKEN where nobody has it, else with a number above all that are there."""
        given = [*self.rows[self._beneath(code), len(code)].tolist(), *(t for t, n in self.added[code].items() if n)]
        return (*code, max(given) + 1 if given else NO_TOKEN)

    def add(self, code: Code) -> None:
        """Count one more code."""
        for level, token in enumerate(code):
            self.added[code[:level]][token] += 1
