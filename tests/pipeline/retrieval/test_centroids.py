"""Centroids: assignment against brute force, what they refuse, and the k-means that places them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.pipeline.retrieval.centroids import Centroids, evened, hierarchical_k_means, refitted


def _normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("copies", [1, 2])
def test_assignment_equals_brute_force(copies: int) -> None:
    vectors, centroids = _normal(300, 7), _normal(12, 7, seed=1)
    distances = [[float(np.sum((vector - centroid) ** 2)) for centroid in centroids] for vector in vectors]
    assigned = Centroids(centroids, 4).assign(vectors, copies)
    assert assigned.dtype == np.int32
    assert assigned.tolist() == [sorted(range(12), key=row.__getitem__)[:copies] for row in distances]


def test_a_cell_is_the_mean_of_its_centroids() -> None:
    assert Centroids(np.array([[0, 1], [2, 3], [4, 4], [6, 8]], np.float32), 2).of_cells.tolist() == [[1, 2], [5, 6]]


def test_what_does_not_fit_is_told() -> None:
    centroids = Centroids(_normal(6, 3), 2)
    with pytest.raises(FriendrecError, match=r"shape \(5, 4\) do not fit centroids of 3 dimensions"):
        centroids.assign(_normal(5, 4))
    with pytest.raises(FriendrecError, match="not finite"):
        centroids.assign(np.full((1, 3), np.nan, np.float32))
    with pytest.raises(FriendrecError, match="7 of 6 lists"):
        centroids.assign(_normal(5, 3), copies=7)
    with pytest.raises(FriendrecError, match="6 centroids do not make 4 cells"):
        Centroids(_normal(6, 3), 4)
    with pytest.raises(FriendrecError, match="finite"):
        Centroids(np.full((4, 2), np.inf, np.float32), 2)


@pytest.mark.parametrize(("num", "lists", "cells"), [(150, 9, 3), (4_000, 64, 8), (4_000, 60, 1), (10, 9, 3)])
def test_k_means_leaves_no_list_empty_and_none_too_full(num: int, lists: int, cells: int) -> None:
    """Vectors of uneven groups: the fullest has half of all."""
    sizes = np.random.default_rng(1).multinomial(num, [0.5, 0.2, 0.2, 0.05, 0.05])
    vectors = (np.repeat(4 * _normal(5, 8, seed=2), sizes, axis=0) + _normal(num, 8)).astype(np.float32)
    centroids = hierarchical_k_means(vectors, lists, cells)
    load = np.bincount(centroids.assign(vectors)[:, 0], minlength=lists)
    assert len(centroids) == lists and centroids.cells == cells
    assert load.min() >= 1
    assert load.max() <= 4 * load.mean()


def test_a_cell_is_a_neighbourhood() -> None:
    """Groups in three places: three centroids each, in one cell."""
    places = 100 * np.eye(3, 6, dtype=np.float32)
    groups = np.repeat(places, 3, axis=0) + 10 * _normal(9, 6)
    vectors = (np.repeat(groups, 20, axis=0) + 0.01 * _normal(180, 6, seed=1)).astype(np.float32)
    centroids = hierarchical_k_means(vectors, 9, 3)
    place = np.linalg.norm(centroids.vectors[:, None] - places, axis=2).argmin(axis=1).reshape(3, 3)
    assert (place == place[:, :1]).all() and len(set(place[:, 0].tolist())) == 3
    cell = centroids.assign(vectors)[:, 0].reshape(3, 60) // 3
    assert (cell == cell[:, :1]).all()


def test_k_means_depends_on_nothing_but_which_vectors_there_are() -> None:
    vectors = _normal(500, 4)
    first = hierarchical_k_means(vectors, 16, 4, seed=3)
    again = hierarchical_k_means(vectors[np.random.default_rng(0).permutation(500)], 16, 4, seed=3)
    assert np.array_equal(first.vectors, again.vectors)
    assert not np.array_equal(first.vectors, hierarchical_k_means(vectors, 16, 4, seed=4).vectors)


@pytest.mark.parametrize("different", [1, 2, 8, 9])
def test_fewer_vectors_than_centroids_repeat(different: int) -> None:
    vectors = _normal(different, 3)
    centroids = hierarchical_k_means(vectors[np.arange(20) % different], 9, 3)
    assert {tuple(row) for row in centroids.vectors.tolist()} == {tuple(row) for row in vectors.tolist()}
    assert len(centroids) == 9


def test_lists_are_made_even_across_cells() -> None:
    """Two of three cells hold nobody, and all users are in one list of the third: every list gets its share."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((900, 4)).astype(np.float32)
    far = 100 + rng.standard_normal((9, 4)).astype(np.float32)
    far[8] = 0
    before = np.bincount(Centroids(far, 3).assign(vectors)[:, 0], minlength=9)
    assert before.max() == 900
    load = np.bincount(Centroids(evened(vectors, far, 3), 3).assign(vectors)[:, 0], minlength=9)
    assert load.min() > 0 and load.max() <= 3.5 * load.mean()


def test_k_means_goes_on_from_where_centroids_are() -> None:
    """Centroids beside nine clouds are drawn into them, three neighbours to a cell; nobody else is assigned anew."""
    rng = np.random.default_rng(0)
    means = np.array([[50 * x, 7 * y] for x in range(3) for y in range(3)], np.float32)
    vectors = (np.repeat(means, 40, axis=0) + rng.normal(0, 0.5, (360, 2))).astype(np.float32)
    found = refitted(vectors, means[rng.permutation(9)] + 1, cells=3)
    places = Centroids(found, 3).assign(means)[:, 0]
    assert sorted(places.tolist()) == list(range(9))
    np.testing.assert_allclose(found[places], vectors.reshape(9, 40, 2).mean(axis=1), atol=1e-3)
    assert [len(set(places[x * 3 : x * 3 + 3] // 3)) for x in range(3)] == [1, 1, 1]
