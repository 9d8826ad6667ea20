"""Back-off against dictionaries: nobody of training moves, everybody else shares a prefix."""

from collections import Counter
from math import log

import numpy as np
import pytest
import torch

from friendrec.models.backoff import BackOff, stand_ins
from friendrec.models.trie import NO_TOKEN
from tests.models.codes import SmallDecoder, ragged_codes

SIZES = (4, 5, 6)
QUERIES = 3


def log_p(decoder: object, cache: torch.Tensor, code: list[int]) -> list[list[float]]:
    """By query, log P of each token that is written of a code."""
    rows, found = torch.arange(QUERIES), []
    for level, token in enumerate(code):
        if token != NO_TOKEN:
            prefix = torch.tensor(code[:level], dtype=torch.int64).expand(QUERIES, -1)
            found.append(decoder.log_probabilities(cache, rows, prefix)[:, token].tolist())  # type: ignore[attr-defined]
    return np.array(found).T.tolist()


@pytest.mark.parametrize("ended", [0.0, 0.4])
def test_codes_of_training_keep_theirs_and_others_share_their_prefix(ended: float) -> None:
    codes = ragged_codes(1, 70, SIZES, ended)
    train, new = codes[:35].tolist(), codes[35:].tolist()
    decoder = SmallDecoder(SIZES)
    cache = decoder.cache(torch.from_numpy(np.random.default_rng(0).standard_normal((QUERIES, 16)).astype(np.float32)))
    backoff = BackOff.of(decoder, codes[:35])
    assert backoff.sizes == SIZES
    for code in train:
        assert log_p(backoff, cache, code) == log_p(decoder, cache, code)
    users = Counter(tuple(code[:end]) for code in train for end in range(4) if NO_TOKEN not in code[:end])
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


@pytest.mark.parametrize("ended", [0.0, 0.4])
@pytest.mark.parametrize("num", [1, 20, 40])
def test_who_stands_in_shares_the_longest_prefix(num: int, ended: float) -> None:
    codes = ragged_codes(2, 70, SIZES, ended)
    train, new = codes[:num].tolist(), codes[num:].tolist()
    found = stand_ins(codes[:num], codes[num:], SIZES).tolist()
    for code, stand_in in zip(new, found, strict=True):
        assert stand_in in train
        assert in_common(code, stand_in) == max(in_common(code, other) for other in train)
    assert stand_ins(codes[:num], codes[:num], SIZES).tolist() == train
