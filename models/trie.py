"""The trie of existing codes: which token may follow which, and which users lie beneath a prefix, as plain arrays.

N candidates are the leaves, in lexicographic order of their codes; level l has one node for each distinct prefix of
l + 1 tokens, in that order too, so that the children of a node are neighbours and the leaves beneath it are a range.

    codes    level 0    level 1     level 2        users (leaf -> candidate)
    (0, 1)   node 0 ─── node 0 ──── NO_TOKEN       4       the code ends: no factor of log P
    (2, 0, 0) node 1 ── node 1 ─┬── 0              0
    (2, 0, 1)                   └── 1              3
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from friendrec.errors import FriendrecError

NO_TOKEN = -1
"""Stands after the end of a code that is shorter than others. It is the first of its siblings, and mostly alone."""

Tokens = NDArray[np.int16] | NDArray[np.int32]
Jagged = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Offsets `[Q + 1]` and values: row q is `values[offsets[q]:offsets[q + 1]]`."""


@dataclass(frozen=True)
class Trie:
    """L levels. The last has a node a leaf, so that its children and leaves need no arrays. All are read-only."""

    sizes: tuple[int, ...]  # [L] tokens that level l could have
    tokens: tuple[Tokens, ...]  # of each level: [nodes] the node's own
    first_child: tuple[NDArray[np.int32], ...]  # see `first_child_at`, which says what the last level has
    first_leaf: tuple[NDArray[np.int32], ...]  # of each level: [nodes + 1]; empty for the last
    users: NDArray[np.int32]  # [N] candidate of each leaf
    leaf_of: NDArray[np.int32]  # [N] leaf of each candidate

    def __post_init__(self) -> None:
        for array in self._arrays().values():
            array.flags.writeable = False  # as the memory-mapped are: numba compiles its kernels once

    @classmethod
    def build(cls, tokens: NDArray[np.int32], sizes: tuple[int, ...]) -> Self:
        """The trie of the codes `[N, L]` of candidates 0..N-1, NO_TOKEN where a code has ended.

        Raises FriendrecError where two candidates share a code, or a token lies outside its level.
        """
        _check(tokens, sizes)
        columns = [_compact(column, size) for column, size in zip(tokens.T, sizes, strict=True)]
        users = np.lexsort(columns[::-1])
        changes = np.zeros(max(len(users) - 1, 0), bool)
        levels, first_child, first_leaf = [], [], []
        above = np.array([0, len(users)], np.int32)  # the root
        for column in columns:
            ordered = column[users]
            changes |= ordered[1:] != ordered[:-1]
            starts = np.flatnonzero(np.concatenate([np.ones(min(len(users), 1), bool), changes])).astype(np.int32)
            levels.append(ordered[starts])
            first_child.append(np.searchsorted(starts, above).astype(np.int32))
            first_leaf.append(above := np.append(starts, np.int32(len(users))))
        if len(levels[-1]) < len(users):
            twin = int(np.flatnonzero(~changes)[0])
            code = tokens[users[twin]].tolist()
            raise FriendrecError(
                f"candidates {users[twin]} and {users[twin + 1]} have the same code {code}: make the tokens again"
            )
        first_leaf[-1] = np.empty(0, np.int32)
        if len(sizes) > 1:
            first_child.pop()
        leaf_of = np.empty(len(users), np.int32)
        leaf_of[users] = np.arange(len(users), dtype=np.int32)
        return cls(sizes, tuple(levels), tuple(first_child), tuple(first_leaf), users.astype(np.int32), leaf_of)

    def __len__(self) -> int:
        """Candidates."""
        return len(self.users)

    @property
    def num_levels(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays().values())

    def first_child_at(self, level: int) -> NDArray[np.int32]:
        """Where in a level the children of each node of the level above begin, `[nodes above + 1]`."""
        return self.first_child[level] if level < len(self.first_child) else self.first_leaf[level - 1]

    def users_at(self, level: int) -> NDArray[np.int32]:
        """The candidates that the nodes of a level are: all of the last level's, and none before."""
        return self.users if level == self.num_levels - 1 else self.users[:0]

    def paths(self, leaves: NDArray[np.int32] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The node that each leaf lies beneath, at every level: `[M, L]`."""
        inner = [np.searchsorted(first, leaves, side="right") - 1 for first in self.first_leaf[:-1]]
        return np.stack([*inner, leaves.astype(np.int64)], axis=1)

    def codes(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Codes of candidates, `[len(ids), L]`, NO_TOKEN where one has ended."""
        nodes = self.paths(self.leaf_of[ids])
        return np.stack(
            [of_level[nodes[:, level]] for level, of_level in enumerate(self.tokens)], axis=1, dtype=np.int32
        )

    def save(self, directory: Path) -> None:
        """One .npy file an array."""
        for name, array in self._arrays().items():
            np.save(directory / f"{name}.npy", array)

    @classmethod
    def load(cls, directory: Path, sizes: tuple[int, ...]) -> Self:
        """Map what `save` wrote into memory."""

        def of(name: str) -> NDArray[Any]:
            return np.load(directory / f"{name}.npy", mmap_mode="r")

        def of_levels(name: str, num: int = len(sizes)) -> tuple[NDArray[Any], ...]:
            return tuple(of(f"{name}_{level}") for level in range(num))

        first_child = of_levels("first_child", max(len(sizes) - 1, 1))
        return cls(sizes, of_levels("tokens"), first_child, of_levels("first_leaf"), of("users"), of("leaf_of"))

    def _arrays(self) -> dict[str, np.ndarray]:
        named = {"users": self.users, "leaf_of": self.leaf_of}
        for name in ("tokens", "first_child", "first_leaf"):
            named |= {f"{name}_{level}": array for level, array in enumerate(getattr(self, name))}
        return named


def _compact(column: NDArray[np.int32], size: int) -> Tokens:
    return column.astype(np.int16) if size <= np.iinfo(np.int16).max else column


def _check(tokens: NDArray[np.int32], sizes: tuple[int, ...]) -> None:
    """Tokens lie within their levels, and nothing follows the end of a code."""
    if tokens.ndim != 2 or tokens.shape[1] != len(sizes) or not len(sizes):
        raise FriendrecError(f"tokens of shape {tokens.shape} do not fit {len(sizes)} levels: make the tokens again")
    ended = tokens == NO_TOKEN
    wrong = ((tokens < 0) & ~ended) | (tokens >= np.array(sizes)) | ended[:, :1]
    wrong[:, 1:] |= ended[:, :-1] & ~ended[:, 1:]
    if wrong.any():
        row = int(np.flatnonzero(wrong.any(axis=1))[0])
        raise FriendrecError(
            f"candidate {row} has the code {tokens[row].tolist()}, but levels have {list(sizes)} tokens and a code "
            "ends once: make the tokens again"
        )
