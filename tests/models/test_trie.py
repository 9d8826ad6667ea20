"""The trie: what it holds is what it was built from, in order, whatever the codes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.models.trie import Trie
from tests.models.codes import ragged_codes

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def walked(trie: Trie) -> dict[tuple[int, ...], int]:
    """Candidate by code, from the root down by the arrays of children."""
    found = {}

    def walk(level: int, node: int, code: tuple[int, ...]) -> None:
        if level == trie.num_levels:
            found[code] = int(trie.users[node])
            return
        begin, end = trie.first_child_at(level)[node : node + 2].tolist()
        for child in range(begin, end):
            walk(level + 1, child, (*code, int(trie.tokens[level][child])))

    walk(0, 0, ())
    return found


@given(seed=st.integers(0, 2**32 - 1), sizes=SIZES, num=st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_every_user_comes_back_from_its_code(seed: int, sizes: tuple[int, ...], num: int) -> None:
    codes = ragged_codes(seed, num, sizes)
    trie = Trie.build(codes, sizes)
    expected = {tuple(code): v for v, code in enumerate(codes.tolist())}
    found = walked(trie)
    assert found == expected
    assert list(found) == sorted(found), "leaves are in lexicographic order"
    assert np.array_equal(trie.codes(np.arange(len(codes))), codes)
    assert trie.users[trie.leaf_of].tolist() == list(range(len(codes)))


@given(seed=st.integers(0, 2**32 - 1), sizes=SIZES)
@settings(max_examples=50, deadline=None)
def test_the_leaves_beneath_a_node_are_those_of_its_prefix(seed: int, sizes: tuple[int, ...]) -> None:
    codes = ragged_codes(seed, 40, sizes)
    trie = Trie.build(codes, sizes)
    ordered = codes[trie.users]
    paths = trie.paths(np.arange(len(codes), dtype=np.int32))
    for level in range(len(sizes) - 1):
        for node, token in enumerate(trie.tokens[level].tolist()):
            beneath = ordered[trie.first_leaf[level][node] : trie.first_leaf[level][node + 1]]
            assert len(np.unique(beneath[:, : level + 1], axis=0)) == 1 and beneath[0, level] == token
            assert (paths[:, level] == node).sum() == len(beneath)


def test_saved_is_mapped_into_memory(tmp_path: Path) -> None:
    for sizes in ((50,), (5, 4, 6)):
        folder = tmp_path / str(len(sizes))
        folder.mkdir()
        trie = Trie.build(ragged_codes(0, 40, sizes), sizes)
        trie.save(folder)
        loaded = Trie.load(folder, sizes)
        assert isinstance(loaded.users, np.memmap) and walked(loaded) == walked(trie)
        assert loaded.nbytes == trie.nbytes
        assert {path.stat().st_size > 0 for path in folder.iterdir()} == {True}


def test_a_user_takes_few_bytes() -> None:
    """A token of two bytes, the user of a leaf and the leaf of a user, and little for the prefixes they share."""
    assert Trie.build(ragged_codes(0, 100_000, (16, 16, 4096), ended=0), (16, 16, 4096)).nbytes < 11 * 100_000
    large = Trie.build(np.array([[40_000]]), (50_000,))
    assert large.codes(np.array([0])).tolist() == [[40_000]]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[0, 1], [1, 2], [0, 1]], r"candidates 0 and 2 have the same code \[0, 1\]"),
        ([[0, -1], [1, 2], [0, -1]], r"candidates 0 and 2 have the same code \[0, -1\]"),
        ([[0, 1], [1, 3]], r"candidate 1 has the code \[1, 3\], but levels have \[2, 3\]"),
        ([[0, 1], [-1, 2]], "candidate 1 has the code"),
        ([[0, -2]], "candidate 0 has the code"),
        ([[0]], "do not fit 2 levels"),
    ],
)
def test_codes_that_are_none(codes: list[list[int]], message: str) -> None:
    with pytest.raises(FriendrecError, match=message):
        Trie.build(np.array(codes, np.int32), (2, 3))


@pytest.mark.long
def test_a_million_random_codes_come_back() -> None:
    codes: NDArray[np.int32] = ragged_codes(1, 1_000_000, (256, 256, 64), ended=0.1)
    trie = Trie.build(codes, (256, 256, 64))
    assert np.array_equal(trie.codes(np.arange(len(codes))), codes)
