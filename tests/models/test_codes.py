"""Codes that no two users share."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from friendrec.models.codes import code_numbers, num_sharing, unique_codes
from friendrec.models.tokenizer import Codebooks, fit_residual_kmeans
from friendrec.models.trie import NO_TOKEN

LINE = Codebooks(
    (np.array([[0], [10]], np.float32), np.array([[-1], [0], [2]], np.float32)), np.zeros(1, np.float32), 1.0
)
"""Codes of two tokens on the number line: -1, 0, 2 and 9, 10, 12."""


def on_a_line(*places: float) -> np.ndarray:
    return np.array(places, np.float32)[:, None]


def test_the_nearer_keeps_a_code_and_the_other_takes_the_nearest_free() -> None:
    vectors = on_a_line(0.3, 0.1, 9)
    wishes = LINE.encode(vectors)
    assert wishes.tolist() == [[0, 1], [0, 1], [1, 0]]
    assert unique_codes(LINE, vectors, wishes).tolist() == [[0, 0], [0, 1], [1, 0]]


def test_where_a_prefix_is_full_the_farthest_goes_to_another_and_chooses_there() -> None:
    vectors = on_a_line(-1, 0, 2, 4)
    wishes = LINE.encode(vectors)
    assert wishes.tolist() == [[0, 0], [0, 1], [0, 2], [0, 2]]
    assert unique_codes(LINE, vectors, wishes).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]


def test_fixed_users_stay_whoever_is_nearer() -> None:
    vectors = on_a_line(0, 0.4, 0, -1)
    wishes, fixed = LINE.encode(vectors), np.array([False, True, False, True])
    assert unique_codes(LINE, vectors, wishes, fixed).tolist() == [[0, 2], [0, 1], [1, 0], [0, 0]]


def test_where_codes_are_too_few_users_of_one_are_numbered_from_the_nearest_on() -> None:
    vectors = on_a_line(0.3, 0.1, -1, 0.2, 12, 10, 10.5, 0)
    codes = unique_codes(LINE, vectors, LINE.encode(vectors))
    assert codes.tolist() == [
        [0, 1, 3], [0, 1, 1], [0, 0, NO_TOKEN], [0, 1, 2], [1, 2, NO_TOKEN], [1, 1, 0], [1, 1, 1], [0, 1, 0],
    ]  # fmt: skip


def test_later_users_are_numbered_after_those_who_stay() -> None:
    vectors = on_a_line(0.3, 0.1, -1, 0.2, 12, 10, 10.5, 0)
    before = unique_codes(LINE, vectors, LINE.encode(vectors))
    more = np.concatenate([vectors, on_a_line(-1, -1.1, 0)])
    wishes = np.concatenate([before, np.pad(LINE.encode(more[8:]), ((0, 0), (0, 1)), constant_values=NO_TOKEN)])
    codes = unique_codes(LINE, more, wishes, np.arange(11) < 8)
    assert np.array_equal(codes[:8], before)
    assert codes[8:].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 4]]


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 4), levels=st.integers(1, 4), data=st.data())
def test_codes_are_unique_and_nobody_moves_without_need(seed: int, size: int, levels: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    codebooks = Codebooks(
        tuple(rng.standard_normal((size, 3)).astype(np.float32) / 2**level for level in range(levels)),
        np.zeros(3, np.float32),
        1.0,
    )
    num = data.draw(st.integers(1, min(2 * size**levels, 80)))
    vectors = rng.standard_normal((num, 3)).astype(np.float32)
    wishes = codebooks.encode(vectors)
    _, first = np.unique(wishes, axis=0, return_index=True)  # unique codes may be fixed
    fixed = np.isin(np.arange(num), first) & (rng.random(num) < 0.5)
    codes = unique_codes(codebooks, vectors, wishes, fixed)
    assert len({tuple(code) for code in codes.tolist()}) == num
    kept = (codes[:, :levels] == wishes).all(axis=1)
    assert kept[fixed].all()
    groups = Counter(map(tuple, wishes.tolist()))
    if num > size**levels:
        assert kept.all() and codes.shape == (num, levels + 1)
        assert codes[:, -1].max() + 1 + fixed.any() >= max(groups.values()) >= codes[:, -1].max() + 1
        alone = np.array([groups[tuple(wish)] == 1 for wish in wishes.tolist()])
        assert (codes[alone, -1] == NO_TOKEN).all()
    else:
        assert codes.shape == (num, levels) and codes.min() >= 0 and codes.max() < size
        if num == len(groups):
            assert kept.all()


def test_all_codes_are_used_up_before_users_are_numbered() -> None:
    vectors = np.random.default_rng(1).standard_normal((64, 3)).astype(np.float32)
    codebooks, tokens = fit_residual_kmeans(vectors, 3, 4, seed=0)
    assert sorted(map(tuple, unique_codes(codebooks, vectors, tokens).tolist())) == list(np.ndindex(4, 4, 4))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 5)), min_size=1, max_size=30))
def test_shared_codes_are_counted(codes: list[tuple[int, int]]) -> None:
    counts, ordered = Counter(codes), sorted(set(codes))
    assert num_sharing(np.array(codes, np.int32)) == sum(count for count in counts.values() if count > 1)
    assert code_numbers(np.array(codes, np.int32)).tolist() == [ordered.index(code) for code in codes]


@pytest.mark.long
def test_a_million_random_vectors_have_unique_codes() -> None:
    vectors = np.random.default_rng(0).standard_normal((1_000_000, 16), np.float32)
    codebooks, tokens = fit_residual_kmeans(vectors, 3, 256, seed=0)
    assert num_sharing(tokens) > 10_000
    codes = unique_codes(codebooks, vectors, tokens)
    assert codes.shape == (1_000_000, 3)
    assert len(np.unique(codes @ np.array([65536, 256, 1]))) == 1_000_000
    assert min(len(np.unique(column)) for column in codes.T) >= 0.95 * 256
