"""Codes of those who come later, against a search through all codes."""

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from friendrec.models.codes import unique_codes
from friendrec.models.placement import codes_in_turn, widened
from friendrec.models.tokenizer import Codebooks, Tokens, Vectors, fit_residual_kmeans


def nobody(num: int) -> Tokens:
    return np.full((num, 1), -1, np.int32)


def table(seed: int, sizes: tuple[int, int], num: int) -> tuple[Codebooks, Tokens, Vectors]:
    """Random codebooks, unique codes of `num` users, and vectors of others."""
    rng = np.random.default_rng(seed)
    levels = tuple(rng.standard_normal((size, 3)).astype(np.float32) for size in sizes)
    codes = np.array(list(product(*map(range, sizes))), np.int32)
    taken = codes[rng.permutation(len(codes))[:num]]
    return Codebooks(levels, np.zeros(3, np.float32), 1.0), taken, rng.standard_normal((9, 3)).astype(np.float32)


def twin(codebooks: Codebooks, taken: Tokens, vector: Vectors) -> tuple[int, ...]:
    """Level by level the nearest token under which some code is still free."""
    free = set(product(*map(range, codebooks.sizes))) - {tuple(code) for code in taken.tolist()}
    code: tuple[int, ...] = ()
    rest = vector.copy()
    for level in codebooks.levels:
        legal = sorted({other[len(code)] for other in free if other[: len(code)] == code})
        nearest = min(legal, key=lambda token: float(np.square(rest - level[token]).sum()))
        rest, code = rest - level[nearest], (*code, nearest)
    return code


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), num=st.integers(0, 15), width=st.integers(2, 6))
def test_each_takes_the_nearest_code_that_is_free_when_it_comes(seed: int, num: int, width: int) -> None:
    codebooks, taken, vectors = table(seed, (4, width), min(num, 4 * width - 5))
    late = vectors[: min(9, 4 * width - len(taken))]
    added = codes_in_turn(codebooks, late, taken, nobody(len(late)))
    for row in range(len(late)):
        before = np.concatenate([taken, added[:row]])
        assert tuple(added[row].tolist()) == twin(codebooks, before, late[row])
    fewer = codes_in_turn(codebooks, late[:3], taken, nobody(len(late[:3])))
    assert np.array_equal(fewer, added[:3]), "who comes later has changed who came before"


def test_a_code_of_before_stays_unless_somebody_has_it() -> None:
    codebooks, taken, vectors = table(0, (4, 5), 8)
    own = codes_in_turn(codebooks, vectors[:4], taken, nobody(4))
    free = np.array([c for c in product(range(4), range(5)) if c not in set(map(tuple, taken.tolist()))], np.int32)
    far = free[[not (own == code).all(1).any() for code in free]][0]
    old = np.stack([far, taken[0], [-1, -1], far]).astype(np.int32)
    added = codes_in_turn(codebooks, vectors[:4], taken, old)
    assert np.array_equal(added[0], far)
    assert len(np.unique(np.concatenate([taken, added]), axis=0)) == 12


def test_where_codes_are_too_few_they_are_numbered() -> None:
    codebooks = Codebooks((np.array([[0.0], [10.0]], np.float32),), np.zeros(1, np.float32), 1.0)
    vectors = np.array([[1.0], [2.0], [11.0], [3.0]], np.float32)
    added = codes_in_turn(codebooks, vectors, np.array([[0]], np.int32), nobody(4))
    assert added.tolist() == [[1, -1], [0, 0], [1, 0], [0, 1]], "the first has the last free code"


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    taken_share=st.floats(0, 1),
    wide=st.sampled_from([(False, False), (False, True), (True, False), (True, True)]),
    had_one=st.sampled_from([0.0, 0.3]),
    cut=st.integers(0, 9),
)
def test_who_comes_later_changes_nobody(
    seed: int, taken_share: float, wide: tuple[bool, bool], had_one: float, cut: int
) -> None:
    """Any table, with numbers (`wide`) or without, that may be full before, while or after the newcomers come."""
    sizes, rng = (3, 4), np.random.default_rng(seed)
    codebooks, _, vectors = table(seed, sizes, 0)
    taken, old = (_random_codes(rng, sizes, numbers) for numbers in wide)
    taken, old = taken[: round(taken_share * len(taken))], old[:9]
    old[rng.random(len(old)) >= had_one] = -1
    added = codes_in_turn(codebooks, vectors, taken, old)
    before = {tuple(code) for code in widened(taken, 3).tolist()}
    for row, code in enumerate(map(tuple, widened(added, 3).tolist())):
        own, near = tuple(widened(old, 3)[row].tolist()), tuple(codebooks.encode(vectors[row : row + 1])[0].tolist())
        shared = [other[2] for other in before if other[:2] == near]
        if own[0] != -1 and own not in before:
            assert code == own
        elif wide[0] or len(before) >= 12 or any(other[2] != -1 for other in before):
            assert code == (*near, max(shared) + 1 if shared else -1)
        else:
            assert code == (
                *twin(codebooks, np.array(sorted(before), np.int32).reshape(-1, 3)[:, :2], vectors[row]),
                -1,
            )
        before.add(code)
    assert len(before) == len(taken) + 9, "no code is had twice"
    fewer = codes_in_turn(codebooks, vectors[:cut], taken, old[:cut])
    assert np.array_equal(widened(fewer, 3), widened(added, 3)[:cut])
    assert {fewer.shape[1], added.shape[1]} <= {3} if wide[0] else fewer.shape[1] <= added.shape[1]


def _random_codes(rng: np.random.Generator, sizes: tuple[int, ...], numbers: bool) -> Tokens:
    """All codes in random order; with `numbers` 0 and 1 too, and with none."""
    codes = np.array(list(product(*map(range, sizes), *([range(-1, 2)] if numbers else []))), np.int32)
    return rng.permutation(codes)


def test_numbers_go_on_where_those_of_the_table_end() -> None:
    vectors = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    codebooks, codes = fit_residual_kmeans(vectors[:40], 1, 8, 0)
    taken = unique_codes(codebooks, vectors[:40], codes)
    added = codes_in_turn(codebooks, vectors[40:], taken, nobody(20))
    assert np.array_equal(added[:, 0], codebooks.encode(vectors[40:])[:, 0])
    assert len(np.unique(np.concatenate([taken, added]), axis=0)) == 60
    again = codes_in_turn(codebooks, vectors[40:], taken, added[::-1])  # whatever they had, nobody else has it
    assert np.array_equal(again, added[::-1])
