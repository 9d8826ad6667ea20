"""Which centroids are revived, how lists are told to be even, and centroids on disk; by hand."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from friendrec.errors import FriendrecError
from friendrec.pipeline.clustering import DEAD, revived, spread
from friendrec.pipeline.embeddings import CLUSTERS, read_centroids, write_centroids
from friendrec.pipeline.retrieval.centroids import Centroids, evened

FULL, MANY, SOME, NONE = 8.0, 6.0, 2.0, 0.0


@pytest.mark.parametrize(
    ("load", "cells", "expected"),
    [
        ([SOME, SOME, SOME], 1, []),
        ([SOME, NONE, FULL, MANY], 1, [(1, 2)]),
        ([NONE, FULL, MANY, NONE], 1, [(0, 1), (3, 2)]),  # the fullest is half as full by then
        ([NONE, FULL, SOME, NONE], 1, [(0, 1), (3, 0)]),  # whose other half is as full and stands first
        ([NONE, NONE, NONE, FULL], 1, [(0, 3), (1, 0), (2, 3)]),
        ([NONE, SOME, FULL, FULL], 2, [(0, 1)]),  # its own cell, though others are fuller
        ([NONE, SOME, FULL, NONE], 2, [(0, 1), (3, 2)]),
        ([NONE, NONE, FULL, MANY], 2, [(0, 2), (1, 0)]),  # a dead cell takes from others, then from itself
        ([NONE, NONE], 1, []),
    ],
)
def test_the_dead_halve_the_fullest_of_their_cell(
    load: list[float], cells: int, expected: list[tuple[int, int]]
) -> None:
    assert revived(load, cells) == expected


@given(st.lists(st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0, 5.0]), min_size=6, max_size=6), st.sampled_from([1, 2, 3]))
def test_nobody_is_split_to_death_and_all_that_can_live_do(load: list[float], cells: int) -> None:
    pairs = revived(load, cells)
    least, left = DEAD * sum(load) / len(load), list(load)
    for dead, donor in pairs:
        assert load[dead] < least
        left[donor] /= 2
        left[dead] = left[donor]
    assert all(left[centroid] >= least for pair in pairs for centroid in pair)
    assert len({dead for dead, _ in pairs}) == len(pairs)
    if sum(load):  # somebody has at least the mean, twenty times what one needs: six can share it
        assert min(left) >= least


def test_a_full_list_is_halved_in_place_of_the_emptiest_of_its_cell() -> None:
    """On a line: one list has users at 0 and at 4, its neighbour in the cell has one far away, other cells are left."""
    at = {0.0: 6, 4.0: 6, 50.0: 1, 90.0: 2, 99.0: 2}
    users = np.repeat(np.array([*at], np.float32), [*at.values()])[:, None]
    before = np.array([[2], [50], [90], [99]], np.float32)
    assert evened(users, before, cells=2).tolist() == [[4], [0], [90], [99]]
    assert before.tolist() == [[2], [50], [90], [99]]
    fewer = users[1:][users[1:, 0] != 4.0]
    assert evened(fewer, before, cells=2).tolist() == before.tolist()  # five of ten in four lists are no two means


def test_how_evenly_users_lie() -> None:
    assert spread(np.array([4, 4, 4, 4])) == pytest.approx({"fullest": 1, "empty": 0, "entropy": 1})
    assert spread(np.array([9, 0, 0])) == pytest.approx({"fullest": 3, "empty": 2, "entropy": 0})
    assert spread(np.array([5])) == pytest.approx({"fullest": 1, "empty": 0, "entropy": 0})
    assert spread(np.array([2, 1, 1]))["entropy"] == pytest.approx(1.5 * np.log(2) / np.log(3))


def test_centroids_come_back(tmp_path: Path) -> None:
    assert read_centroids(tmp_path) is None
    vectors = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    write_centroids(tmp_path, Centroids(vectors, cells=3))
    found = read_centroids(tmp_path)
    assert found is not None
    assert found.cells == 3
    assert np.array_equal(found.vectors, vectors)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", "another", "cells"])
def test_what_is_no_file_of_centroids_is_named(tmp_path: Path, content: bytes | str) -> None:
    if content == "another":
        np.savez(tmp_path / CLUSTERS, vectors=np.zeros((4, 3), np.float32))
    elif content == "cells":
        np.savez(tmp_path / CLUSTERS, centroids=np.zeros((4, 3), np.float32), cells=3)
    else:
        (tmp_path / CLUSTERS).write_bytes(bytes(content))  # type: ignore[arg-type]
    with pytest.raises(FriendrecError, match=r"clusters.npz holds no centroids in cells: export again"):
        read_centroids(tmp_path)
