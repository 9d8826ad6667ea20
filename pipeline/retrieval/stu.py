"""Friends by generation: the decoder of a run writes the codes of existing, allowed users, token by token."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.models.decoding import Decoder, beam_search, sample, score_leaves
from friendrec.models.drawing import exponential
from friendrec.models.sampling import Sampling
from friendrec.models.trie import Jagged, Trie
from friendrec.pipeline.retrieval.exclusion import rows_of, union
from friendrec.pipeline.retrieval.files import UserIds, read_meta, read_users, write_users
from friendrec.pipeline.retrieval.protocol import Queries

BEAM_WIDTH = 100
BLOCK = 1 << 22
"""Numbers that a block of queries may hold at once: log-probabilities of its beams' tokens, and contexts."""
COPIES = 16
"""Numbers that sampling holds beside for each of those tokens that exists."""


@dataclass(frozen=True)
class StuIndex:
    """N candidates by their codes; the decoder belongs to a run, which puts it in.

    The `vector` of a query is its decoder context `[X]`, and score(v) = log P(code of v) + bonus(v).
    """

    trie: Trie
    user_ids: UserIds  # [N]
    decoder: Decoder | None = None
    beam_width: int = BEAM_WIDTH
    """Prefixes kept at each level: more find the best more surely, in time that grows alike."""
    sampling: Sampling | None = None
    """Draw friends in place of the best."""

    def __post_init__(self) -> None:
        if self.decoder is not None and tuple(self.decoder.sizes) != self.trie.sizes:
            raise FriendrecError(
                f"the index holds codes of {list(self.trie.sizes)} tokens a level, the run writes "
                f"{list(self.decoder.sizes)}: make the index from the tokens that the run was trained with"
            )

    @classmethod
    def build(
        cls, tokens: NDArray[np.int32], user_ids: UserIds, sizes: tuple[int, ...], beam_width: int = BEAM_WIDTH
    ) -> Self:
        """Candidates in row order with their codes `[N, L]`; raises FriendrecError where two share one."""
        return cls(Trie.build(tokens, sizes), user_ids, beam_width=beam_width)

    def __len__(self) -> int:
        return len(self.trie)

    def codes_of(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Codes of candidates, `[len(ids), L]`, NO_TOKEN where one has ended."""
        return self.trie.codes(ids)

    def search(self, queries: Queries, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Best k allowed candidates of each query that the beams find: see `Retriever`.

        Named candidates are scored exactly, whatever the beams would have found; these look among all others. With
        `sampling` k candidates are drawn one after the other and score(v) = −log time of the race, see `sample`: the
        named run at the rate (P(code) · e^bonus)^(1 / temperature), the others at 1 in all.
        """
        decoder = self._decoder()
        ids = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        queries = replace(queries, keys=np.arange(len(queries)) if queries.keys is None else queries.keys)
        width = min(k if self.sampling else max(self.beam_width, k), len(self))
        tokens = width * max(self.trie.sizes)
        numbers = tokens + queries.vector.shape[1] + (COPIES * min(tokens, len(self)) if self.sampling else 0)
        size = max(1, BLOCK // max(1, numbers))
        for begin in range(0, len(queries) if width else 0, size):
            rows = np.arange(begin, min(begin + size, len(queries)))
            ids[rows], scores[rows] = self._search_block(decoder, queries.take(rows), k, width)
        return ids, scores

    def _search_block(
        self, decoder: Decoder, queries: Queries, k: int, width: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        excluded = queries.exclude_offsets, self.trie.leaf_of[queries.exclude_ids].astype(np.int64)
        named = queries.sparse_offsets, self.trie.leaf_of[queries.sparse_ids].astype(np.int64)
        hidden = union(len(self), excluded, named)
        row, leaves, bonus = _allowed(len(self), named, queries.sparse_bonus, excluded)
        most_rows = max(1, BLOCK // max(self.trie.sizes))
        with torch.inference_mode():
            cache = decoder.cache(torch.from_numpy(np.ascontiguousarray(queries.vector)))
        scores = score_leaves(decoder, cache, self.trie, row, leaves, most_rows) + bonus
        found: tuple[NDArray[np.int64], NDArray[Any]]
        if self.sampling is None:
            found = beam_search(decoder, cache, self.trie, hidden, width)
        else:
            assert queries.keys is not None
            found = sample(decoder, cache, self.trie, hidden, width, self.sampling, queries.keys)
            noise = exponential(self.sampling.seed, queries.keys[row], self.trie.num_levels, leaves)
            scores = scores / self.sampling.temperature - np.log(noise)
        return _best(k, found, (row, self.trie.users[leaves].astype(np.int64), scores))

    def _decoder(self) -> Decoder:
        if self.decoder is None:
            raise FriendrecError("an index of kind stu is searched by the decoder of its run: open the run with it")
        return self.decoder

    def save(self, directory: Path) -> None:
        self.trie.save(directory)
        parameters = {"metric": "log_probability", "sizes": list(self.trie.sizes), "beam_width": self.beam_width}
        write_users(directory, "stu", self.user_ids, self.trie.num_levels, **parameters)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Open what `save` wrote; the caller has checked the manifest, and puts in the decoder."""
        meta = read_meta(directory, "sizes", "beam_width")
        trie = Trie.load(directory, tuple(meta["sizes"]))
        return cls(trie, read_users(directory), beam_width=meta["beam_width"])


def _allowed(
    num: int, named: Jagged, bonus: NDArray[np.float32], excluded: Jagged
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Query, leaf and bonus of whom a query names and does not exclude, `[M]`: the first two ascend."""
    keys = rows_of(named[0]) * num + named[1]
    order = np.argsort(keys)
    order = order[~np.isin(keys[order], rows_of(excluded[0]) * num + excluded[1])]
    return keys[order] // max(num, 1), named[1][order], bonus[order]


def _best(
    k: int,
    found: tuple[NDArray[np.int64], NDArray[Any]],
    named: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k best of what was found, `[Q, W]`, and of the named, `[M]`: best first, ties to the lower id, `[Q, k]`."""
    row, place = np.nonzero(found[0] >= 0)
    row, ids, scores = (
        np.concatenate(pair) for pair in zip((row, found[0][row, place], found[1][row, place]), named, strict=True)
    )
    order = np.lexsort((ids, -scores, row))
    row, ids, scores = row[order], ids[order], scores[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < k
    best = np.full((len(found[0]), k), -1, np.int64), np.full((len(found[0]), k), -np.inf, np.float32)
    best[0][row[kept], rank[kept]], best[1][row[kept], rank[kept]] = ids[kept], scores[kept]
    return best
