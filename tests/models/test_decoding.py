"""Decoding against plain Python: every code scored, beams kept by hand, probabilities walked down from the root."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

from friendrec.errors import FriendrecError
from friendrec.models.decoding import beam_search, sample, score_leaves
from friendrec.models.sampling import Sampling
from friendrec.models.trie import Trie
from tests.models.codes import (
    SmallDecoder,
    draw_probabilities,
    exhaustive,
    hidden_leaves,
    ragged_codes,
    step_log_probabilities,
)

Found = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass
class World:
    """Users with ragged codes, a decoder, and queries that each exclude some."""

    codes: NDArray[np.int32]
    trie: Trie
    decoder: SmallDecoder
    contexts: Tensor  # [Q, 16]
    excluded: list[list[int]]

    @classmethod
    def of(cls, num: int, sizes: tuple[int, ...], num_queries: int, excludes: int, seed: int = 0) -> "World":
        codes, rng = ragged_codes(seed, num, sizes), np.random.default_rng(seed)
        num = len(codes)
        excluded = [rng.permutation(num)[: rng.integers(0, excludes + 1)].tolist() for _ in range(num_queries)]
        contexts = torch.randn(num_queries, 16, generator=torch.Generator().manual_seed(seed))
        return cls(codes, Trie.build(codes, sizes), SmallDecoder(sizes), contexts, excluded)

    def allowed(self, query: int) -> list[int]:
        return [v for v in range(len(self.codes)) if v not in set(self.excluded[query])]

    def search(self, width: int, rows: slice = slice(None)) -> Found:
        cache = self.decoder.cache(self.contexts[rows])
        return beam_search(self.decoder, cache, self.trie, hidden_leaves(self.trie, self.excluded[rows]), width)

    def draw(self, num: int, sampling: Sampling, keys: NDArray[np.int64], rows: slice = slice(None)) -> Found:
        cache = self.decoder.cache(self.contexts[rows])
        hidden = hidden_leaves(self.trie, self.excluded[rows])
        return sample(self.decoder, cache, self.trie, hidden, num, sampling, keys[rows])


@pytest.fixture(scope="module")
def world() -> World:
    return World.of(300, (12, 12, 6), num_queries=20, excludes=250)


def test_full_width_equals_scoring_every_code(world: World) -> None:
    assert len(world.codes) == 300 and (world.codes[:, 2] < 0).sum() > 20 and (world.codes[:, 2] >= 0).sum() > 20
    ids, scores = world.search(300)
    for q in range(20):
        every = exhaustive(world.decoder, world.contexts[q], world.codes)
        expected = sorted(world.allowed(q), key=lambda v: (-every[v], v))
        assert ids[q, : len(expected)].tolist() == expected
        assert (ids[q, len(expected) :] == -1).all() and np.isneginf(scores[q, len(expected) :]).all()
        np.testing.assert_allclose(scores[q, : len(expected)], [every[v] for v in expected], atol=1e-5)


def kept_by_hand(world: World, query: int, width: int) -> list[tuple[int, float]]:
    """Beam search over lists of candidates."""
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    allowed = world.allowed(query)
    for level in range(world.codes.shape[1]):
        longer = []
        for prefix, score in beams:
            steps = step_log_probabilities(world.decoder, world.contexts[query], prefix) if -1 not in prefix else []
            for token in {int(world.codes[v, level]) for v in allowed if tuple(world.codes[v, :level]) == prefix}:
                longer.append(((*prefix, token), score + (steps[token] if token >= 0 else 0.0)))
        beams = sorted(longer, key=lambda beam: -beam[1])[:width]
    user = {tuple(code): v for v, code in enumerate(world.codes.tolist())}
    return [(user[code], score) for code, score in beams]


@pytest.mark.parametrize("width", [1, 2, 7, 40])
def test_narrow_beams_keep_what_a_hand_would(world: World, width: int) -> None:
    ids, scores = world.search(width)
    for q in range(20):
        expected = kept_by_hand(world, q, width)
        assert ids[q][ids[q] >= 0].tolist() == [v for v, _ in expected]
        np.testing.assert_allclose(scores[q, : len(expected)], [score for _, score in expected], atol=1e-5)


@given(seed=st.integers(0, 2**31), num=st.integers(1, 40), width=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_as_many_come_back_as_are_allowed(seed: int, num: int, width: int) -> None:
    world = World.of(num, (4, 4, 5), num_queries=3, excludes=num, seed=seed)
    ids, _ = world.search(width)
    drawn, _ = world.draw(width, Sampling(top_k=1), np.arange(3))
    for q in range(3):
        for found in (ids[q], drawn[q]):
            kept = found[found >= 0].tolist()
            assert len(set(kept)) == len(kept) == min(width, len(world.allowed(q)))
            assert set(kept) <= set(world.allowed(q))


def test_a_query_alone_finds_the_same(world: World) -> None:
    ids, scores = world.search(10)
    keys = np.arange(20) * 7
    drawn, _ = world.draw(10, Sampling(seed=3), keys)
    for q in range(20):
        rows = slice(q, q + 1)
        one_ids, one_scores = world.search(10, rows)
        assert np.array_equal(one_ids[0], ids[q])
        np.testing.assert_allclose(one_scores[0], scores[q], rtol=1e-6)
        assert np.array_equal(world.draw(10, Sampling(seed=3), keys, rows)[0][0], drawn[q])


def test_the_context_is_encoded_once_and_only_existing_prefixes_are_asked_about(world: World) -> None:
    decoder = world.decoder
    decoder.encoded, decoder.asked = [], []
    world.search(30)
    assert decoder.encoded == [20]
    existing = {tuple(code[:level]) for code in world.codes.tolist() for level in range(3) if code[level] >= 0}
    assert set(decoder.asked) <= existing, "nor about what follows a code that has ended"
    assert decoder.asked.count(()) == 20


@pytest.mark.parametrize("most_rows", [1, 7, 10_000])
def test_given_codes_are_scored_as_beams_are(world: World, most_rows: int) -> None:
    rng = np.random.default_rng(0)
    row = np.sort(rng.integers(0, 20, 200))
    leaves = np.concatenate([np.sort(rng.permutation(300)[: (row == q).sum()]) for q in range(20)])
    cache = world.decoder.cache(world.contexts)
    scores = score_leaves(world.decoder, cache, world.trie, row, leaves, most_rows)
    every = [exhaustive(world.decoder, context, world.codes) for context in world.contexts]
    expected = [every[q][v] for q, v in zip(row.tolist(), world.trie.users[leaves].tolist(), strict=True)]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    nobody = score_leaves(world.decoder, cache, world.trie, row[:0], leaves[:0], most_rows)
    assert nobody.shape == (0,)


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 2},
    {"nucleus": 0.7},
    {"temperature": 1.5, "top_k": 3, "nucleus": 0.6},
]


def few(num_draws: int) -> World:
    """Twelve users of whom three are hidden, and the same query time and again."""
    world = World.of(12, (3, 3, 3), num_queries=1, excludes=0, seed=5)
    world.decoder.sharpness = 1.5
    world.contexts, world.excluded = world.contexts.expand(num_draws, -1), [[1, 4, 6]] * num_draws
    return world


@pytest.mark.parametrize("options", SETTINGS)
def test_the_first_drawn_follow_their_probabilities(options: dict[str, float]) -> None:
    world = few(20_000)
    sampling = Sampling(seed=1, **options)  # type: ignore[arg-type]
    drawn, _ = world.draw(1, sampling, np.arange(20_000))
    probabilities = draw_probabilities(world.decoder, world.contexts[0], world.codes, world.allowed(0), **options)  # type: ignore[arg-type]
    counts = np.bincount(drawn[:, 0], minlength=12)
    assert set(np.flatnonzero(counts)) <= set(probabilities), "whom a filter leaves out is not drawn first"
    users = list(probabilities)
    expected = np.array([probabilities[v] for v in users])
    assert chisquare(counts[users], expected / expected.sum() * 20_000).pvalue > 1e-3


def test_the_next_are_drawn_from_those_left() -> None:
    """P(a, then b) = P(a) · P(b) / (1 − P(a)): a draw without replacement, in order."""
    world = few(40_000)
    drawn, scores = world.draw(2, Sampling(seed=2), np.arange(40_000))
    p = draw_probabilities(world.decoder, world.contexts[0], world.codes, world.allowed(0))
    pairs = [(a, b) for a in p for b in p if a != b]
    expected = np.array([p[a] * p[b] / (1 - p[a]) for a, b in pairs])
    counts = np.array([((drawn[:, 0] == a) & (drawn[:, 1] == b)).sum() for a, b in pairs])
    assert counts.sum() == 40_000
    assert expected.min() * 40_000 > 5
    assert chisquare(counts, expected * 40_000).pvalue > 1e-3
    assert (scores[:, 0] >= scores[:, 1]).all()


def test_seeds_and_keys_draw_different_users_and_the_same_ones_the_same(world: World) -> None:
    one, other = np.full(20, 5), np.full(20, 6)
    drawn = world.draw(5, Sampling(seed=0), one)[0]
    assert np.array_equal(world.draw(5, Sampling(seed=0), one)[0], drawn)
    assert (world.draw(5, Sampling(seed=1), one)[0] != drawn).any(axis=1).sum() > 15
    assert (world.draw(5, Sampling(seed=0), other)[0] != drawn).any(axis=1).sum() > 15


def test_near_temperature_zero_the_draw_is_greedy(world: World) -> None:
    assert np.array_equal(world.draw(1, Sampling(temperature=1e-4), np.arange(20))[0], world.search(1)[0])


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_k": 0}, {"nucleus": 0.0}, {"nucleus": 1.5}, {"seed": 2**63}]
)
def test_settings_that_draw_nobody_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(FriendrecError, match=f"{next(iter(options)).replace('_', '-')} {next(iter(options.values()))}"):
        Sampling(**options)  # type: ignore[arg-type]
