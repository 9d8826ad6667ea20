"""Back-off against dictionaries: nobody of training moves, everybody else shares a prefix."""

from collections import Counter
from math import log

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from friendrec.models.backoff import BackOff, stand_ins
from friendrec.models.trie import NO_TOKEN
from tests.models.codes import SmallDecoder, ragged_codes

SIZES = (4, 5, 6)
LARGE = (1 << 16,) * 5  # 2⁸⁰ codes: more than an integer numbers
QUERIES = 3


def log_p(decoder: object, cache: torch.Tensor, code: list[int]) -> list[list[float]]:
    """By query, log P of each token that is written of a code."""
    rows, found = torch.arange(QUERIES), []
    for level, token in enumerate(code):
        if token != NO_TOKEN:
            prefix = torch.tensor(code[:level], dtype=torch.int64).expand(QUERIES, -1)
            found.append(decoder.log_probabilities(cache, rows, prefix)[:, token].tolist())  # type: ignore[attr-defined]
    return np.array(found).T.tolist()


def some_codes(seed: int, num: int, sizes: tuple[int, ...], ended: float) -> NDArray[np.int32]:
    """Distinct codes, of some tokens far apart where there are too many to draw from all."""
    if sizes is not LARGE:
        return ragged_codes(seed, num, sizes, ended)
    places, tokens = ragged_codes(seed, num, (3, 2, 2, 2, 6), ended), np.array([0, 65_535, 1, 32_768, 2, 40_000])
    return np.where(places < 0, NO_TOKEN, tokens[places]).astype(np.int32)


SHAPES = pytest.mark.parametrize(("sizes", "ended"), [(SIZES, 0.0), (SIZES, 0.4), (LARGE, 0.0), (LARGE, 0.4)])


@SHAPES
def test_codes_of_training_keep_theirs_and_others_share_their_prefix(sizes: tuple[int, ...], ended: float) -> None:
    codes = some_codes(1, 70, sizes, ended)
    train, new = codes[:35].tolist(), codes[35:].tolist()
    decoder = SmallDecoder(sizes)
    cache = decoder.cache(torch.from_numpy(np.random.default_rng(0).standard_normal((QUERIES, 16)).astype(np.float32)))
    backoff = BackOff.of(decoder, codes[:35])
    assert backoff.sizes == sizes
    for code in train:
        assert log_p(backoff, cache, code) == log_p(decoder, cache, code)
    users = Counter(tuple(code[:end]) for code in train for end in range(len(sizes) + 1) if NO_TOKEN not in code[:end])
    shared = Counter()
    for code in new:
        plain, found = log_p(decoder, cache, code), log_p(backoff, cache, code)
        for q in range(QUERIES):
            for level in range(len(found[q])):
                known = level == 0 or users[tuple(code[: level + 1])] > 0
                expected = plain[q][level] if known else -log(max(1, users[tuple(code[:level])]))
                assert found[q][level] == pytest.approx(expected, abs=1e-6)
                shared[known, users[tuple(code[:level])] > 1] += 1
    assert len(shared) >= 3, "prefixes of many, of nobody, and whole known ones were met"


def in_common(one: list[int], other: list[int]) -> int:
    """How many first tokens are the same."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


@SHAPES
@pytest.mark.parametrize("num", [1, 20, 40])
def test_who_stands_in_shares_the_longest_prefix(num: int, sizes: tuple[int, ...], ended: float) -> None:
    codes = some_codes(2, 70, sizes, ended)
    train, new = codes[:num].tolist(), codes[num:].tolist()
    found = stand_ins(codes[:num], codes[num:], sizes).tolist()
    for code, stand_in in zip(new, found, strict=True):
        assert stand_in in train
        assert in_common(code, stand_in) == max(in_common(code, other) for other in train)
    assert stand_ins(codes[:num], codes[:num], sizes).tolist() == train
