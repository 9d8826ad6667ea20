"""Codes and a decoder to search with, and what both mean in plain Python."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from friendrec.models.trie import Jagged, Trie


def ragged_codes(seed: int, num: int, sizes: tuple[int, ...], ended: float = 0.5) -> NDArray[np.int32]:
    """Distinct random codes in random order; a share has ended before the last level, where no other code goes on."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(int(np.prod(sizes)))[: 4 * num + 10]
    codes = np.stack(np.unravel_index(places, sizes), axis=1).astype(np.int32)
    if len(sizes) > 1:
        _, first, prefix = np.unique(codes[:, :-1], axis=0, return_index=True, return_inverse=True)
        ends = rng.random(len(first)) < ended
        codes[first[ends], -1] = -1
        codes = codes[~ends[prefix.reshape(-1)] | (codes[:, -1] < 0)]
    return codes[:num]


def jagged(rows: Iterable[Iterable[int]]) -> Jagged:
    """Offsets and values of rows."""
    rows = [list(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return offsets, np.array([v for row in rows for v in row], np.int64)


def hidden_leaves(trie: Trie, excluded: list[list[int]]) -> Jagged:
    """As a search wants them: ascending leaves in place of candidates."""
    return jagged(sorted(trie.leaf_of[row].tolist()) for row in excluded)


class SmallDecoder(nn.Module):
    """Random weights: an MLP of the context and the pooled tokens so far, one a level."""

    def __init__(self, sizes: tuple[int, ...], dim: int = 16, sharpness: float = 3.0) -> None:
        super().__init__()
        self._sizes, self.sharpness = sizes, sharpness
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encode = nn.Linear(dim, dim)
            self.tokens = nn.ModuleList(nn.Embedding(size, dim) for size in sizes)
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * dim, 24), nn.Tanh(), nn.Linear(24, s)) for s in sizes
            )
        self.encoded: list[int] = []
        """Contexts of each call of `cache`."""
        self.asked: list[tuple[int, ...]] = []
        """Every prefix it was asked about."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return self._sizes

    def cache(self, context: Tensor) -> Tensor:
        self.encoded.append(len(context))
        encoded: Tensor = self.encode(context)
        return encoded

    def log_probabilities(self, cache: Tensor, row: Tensor, prefix: Tensor) -> Tensor:
        assert (row.diff() >= 0).all(), "rows ascend"
        self.asked += [tuple(tokens) for tokens in prefix.tolist()]
        level = prefix.shape[1]
        pooled = torch.zeros(len(row), cache.shape[1])
        for before in range(level):
            pooled = pooled + self.tokens[before](prefix[:, before])
        logits = self.sharpness * self.heads[level](torch.cat([cache[row], pooled], dim=1))
        return logits.log_softmax(1)


@torch.no_grad()
def step_log_probabilities(decoder: SmallDecoder, context: Tensor, prefix: tuple[int, ...]) -> list[float]:
    """Of one query, one prefix."""
    asked = torch.tensor([prefix], dtype=torch.int64).reshape(1, len(prefix))
    found: list[float] = decoder.log_probabilities(decoder.cache(context[None]), torch.zeros(1).long(), asked)[
        0
    ].tolist()
    return found


def exhaustive(decoder: SmallDecoder, context: Tensor, codes: NDArray[np.int32]) -> list[float]:
    """log P of every code, one query: a sum over the tokens that it has."""
    steps: dict[tuple[int, ...], list[float]] = {}
    scores = []
    for code in codes.tolist():
        score = 0.0
        for level, token in enumerate(code):
            if token >= 0:
                prefix = tuple(code[:level])
                if prefix not in steps:
                    steps[prefix] = step_log_probabilities(decoder, context, prefix)
                score += steps[prefix][token]
        scores.append(score)
    return scores


def draw_probabilities(
    decoder: SmallDecoder,
    context: Tensor,
    codes: NDArray[np.int32],
    allowed: list[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    nucleus: float | None = None,
) -> dict[int, float]:
    """Probability that each candidate is drawn first, by walking down from the root; who cannot be is missing."""
    found: dict[int, float] = {}

    def walk(prefix: tuple[int, ...], probability: float, beneath: list[int]) -> None:
        level = len(prefix)
        if level == codes.shape[1]:
            (found_one,) = beneath
            found[found_one] = probability
            return
        legal = sorted({int(codes[v, level]) for v in beneath})
        log_p = step_log_probabilities(decoder, context, prefix) if legal != [-1] else []
        weights = {t: np.exp((log_p[t] if t >= 0 else 0.0) / temperature) for t in legal}
        likely = sorted(legal, key=lambda t: -weights[t])[:top_k]
        total, share, kept = sum(weights[t] for t in likely), 0.0, []
        for token in likely:
            if nucleus is None or share < nucleus:
                kept.append(token)
            share += weights[token] / total
        total = sum(weights[t] for t in kept)
        for token in kept:
            walk(
                (*prefix, token), probability * weights[token] / total, [v for v in beneath if codes[v, level] == token]
            )

    walk((), 1.0, allowed)
    return found
