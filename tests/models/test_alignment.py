"""Codes that stay: least squares, hysteresis and churn against their definitions."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from friendrec.models.alignment import changed_share, follow_codes, keep_codes, realign
from friendrec.models.codes import unique_codes
from friendrec.models.tokenizer import Codebooks, Tokens, Vectors, fit_residual_kmeans


def groups(num: int = 400, dim: int = 6, seed: int = 0) -> Vectors:
    """Vectors around twelve centres."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, dim)) * 3
    return (centres[rng.integers(0, 12, num)] + rng.standard_normal((num, dim))).astype(np.float32)


def turned(vectors: Vectors, seed: int = 1) -> Vectors:
    """A rotation and a shift."""
    dim = vectors.shape[1]
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]
    return (vectors @ turn + 5).astype(np.float32)


def squares(codebooks: Codebooks, vectors: Vectors, codes: Tokens) -> Vectors:
    return np.square(vectors - codebooks.decode(codes[:, : len(codebooks.sizes)])).sum(1)


def test_codebooks_that_follow_codes_are_least_squares() -> None:
    vectors, rng = groups(), np.random.default_rng(2)
    codes = rng.integers(0, 8, (400, 3)).astype(np.int32)
    start = Codebooks(tuple(np.zeros((8, 6), np.float32) for _ in range(3)), np.zeros(6, np.float32), 1.0)
    found = follow_codes(start, vectors, codes).decode(codes)
    one_hot = np.concatenate([np.eye(8)[column] for column in codes.T], axis=1)
    best = one_hot @ np.linalg.lstsq(one_hot, vectors.astype(np.float64))[0]
    np.testing.assert_allclose(found, best, atol=1e-3)


def test_a_token_that_nobody_has_stays_where_it_was() -> None:
    vectors = groups()
    codebooks, codes = fit_residual_kmeans(vectors, 2, 8, 0)
    few = vectors[codes[:, 0] != 3], codes[codes[:, 0] != 3]
    assert np.array_equal(follow_codes(codebooks, *few).levels[0][3], codebooks.levels[0][3])


def test_nobody_changes_where_the_vectors_only_turned_and_shifted() -> None:
    vectors = groups()
    codebooks, codes = fit_residual_kmeans(vectors, 3, 8, 0)
    old = unique_codes(codebooks, vectors, codes)
    moved = turned(vectors)
    assert (codebooks.encode(moved) != old).any(axis=1).mean() > 0.9
    again, wishes, fixed = realign(codebooks, moved, old, margin=0.3)
    new = unique_codes(again, moved, wishes, fixed)
    assert (new != old).any(axis=1).mean() < 0.1
    assert squares(again, moved, new).mean() <= squares(codebooks, vectors, old).mean()
    followed = follow_codes(codebooks, moved, old).decode(old)
    np.testing.assert_allclose(followed, turned(follow_codes(codebooks, vectors, old).decode(old)), atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000), margin=st.sampled_from([0.0, 0.1, 0.5]), newcomers=st.integers(0, 30),
    size=st.sampled_from([10, 30]),
)  # fmt: skip
def test_a_code_changes_only_for_more_than_the_margin(seed: int, margin: float, newcomers: int, size: int) -> None:
    vectors = groups(80, 3, seed)
    codebooks, codes = fit_residual_kmeans(vectors, 2, size, 0)  # of 100 codes for 80 users some give way
    rng = np.random.default_rng(seed)
    old = unique_codes(codebooks, vectors, codes)
    vectors = vectors + rng.standard_normal(vectors.shape).astype(np.float32)
    known = np.arange(80) >= newcomers
    old[~known] = -1
    wishes, fixed = keep_codes(codebooks, vectors, old, margin)
    new = unique_codes(codebooks, vectors, wishes, fixed)
    assert len(np.unique(new, axis=0)) == 80
    assert not fixed[~known].any() and np.array_equal(new[fixed], old[fixed])
    before, after = squares(codebooks, vectors[known], old[known]), squares(codebooks, vectors[known], new[known])
    left = (new[known] != old[known]).any(axis=1)
    assert (after[left] < (1 - margin) * before[left]).all()
    # whoever stays had no such code, or somebody gave way to others, who may have come to it
    wanted = codebooks.encode(vectors)
    better = squares(codebooks, vectors[known], wanted[known]) < (1 - margin) * before
    claims = [{tuple(wish), tuple(code)} - {(-1, -1)} for wish, code in zip(wanted.tolist(), old.tolist(), strict=True)]
    first = Counter(token for codes in claims for token in {code[0] for code in codes})
    if max(first.values()) <= size:
        claimed = Counter(code for codes in claims for code in codes)
        crowded = {code[0] for code, users in claimed.items() if users > 1}
        assert set(wanted[known][better & ~left][:, 0].tolist()) <= crowded


def test_numbered_codes_stay_as_they_are() -> None:
    vectors = groups(60)
    codebooks, codes = fit_residual_kmeans(vectors, 1, 8, 0)
    old = unique_codes(codebooks, vectors, codes)
    assert old.shape == (60, 2)
    wishes, fixed = keep_codes(codebooks, vectors, old, 0.1)
    assert fixed.all() and np.array_equal(unique_codes(codebooks, vectors, wishes, fixed), old)


def test_churn_counts_whole_codes_and_levels() -> None:
    old = np.array([[0, 1], [0, 2], [3, 1], [3, 2]], np.int32)
    new = np.array([[0, 1, -1], [0, 1, 0], [2, 1, -1], [3, 2, -1]], np.int32)
    assert changed_share(old, new) == (0.5, [0.25, 0.25, 0.25])
    assert changed_share(old, old) == (0.0, [0.0, 0.0])
    assert changed_share(old[:0], old[:0]) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_moving_lowers_the_error(margin: float) -> None:
    vectors = groups(1000)
    codebooks, codes = fit_residual_kmeans(vectors, 2, 16, 0)
    moved = turned(vectors) + 2 * groups(1000, seed=3)
    again, wishes, fixed = realign(codebooks, moved, codes, margin)
    kept = follow_codes(codebooks, moved, codes)
    assert 0 < (~fixed).mean() < 1
    assert squares(again, moved, wishes).mean() < squares(kept, moved, codes).mean()
