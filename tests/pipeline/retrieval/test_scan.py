"""The compiled parts of the scan, each against numpy."""

import numpy as np
import pytest

from friendrec.pipeline.retrieval import scan


@pytest.mark.parametrize("num", [1, 5, 30, 64])
def test_largest_columns_and_the_first_of_equals(num: int) -> None:
    scores = np.random.default_rng(0).integers(-5, 6, (50, 64)).astype(np.float32)
    expected = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :num], axis=1)
    assert np.array_equal(scan.largest(scores, num), expected)


def test_largest_of_what_is_no_number_are_columns_all_the_same() -> None:
    assert scan.largest(np.full((2, 5), np.nan, np.float32), 3).tolist() == [[0, 1, 2]] * 2


def test_every_finite_half_is_read_as_numpy_does() -> None:
    """Numbers below 2⁻¹⁴, both zeros and all: 63,488 of them."""
    every = np.arange(1 << 16, dtype=np.uint16)
    every = every[np.isfinite(every.view(np.float16))].reshape(-1, 64)
    read = scan._from_half(every, np.empty(0, np.float32), 0, len(every), np.empty(every.shape, np.float32))
    assert np.array_equal(read.view(np.uint32), every.view(np.float16).astype(np.float32).view(np.uint32))


def test_children_of_cells_are_scored_as_a_matrix_would() -> None:
    rng = np.random.default_rng(0)
    vectors, centroids = (rng.standard_normal((num, 11)).astype(np.float32) for num in (9, 21))
    cells = np.array([rng.permutation(3)[:2] for _ in range(9)])
    scores = np.empty((9, 2, 7), np.float32)
    scan.score_children(vectors, centroids, cells, scores)
    expected = np.take_along_axis((vectors @ centroids.T).reshape(9, 3, 7), cells[:, :, None], axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_who_probes_a_list() -> None:
    offsets, queries = scan.by_list(np.array([[0, 2], [2, 3], [0, 3]], np.int32), 5)
    assert offsets.tolist() == [0, 2, 2, 4, 6, 6]
    assert queries.tolist() == [0, 2, 0, 1, 1, 2]


def test_rows_are_sorted_each_for_itself() -> None:
    ids = np.array([3, 1, 2, 5, 9, 0])
    assert scan.ascending_rows(np.array([0, 3, 5, 5, 6]), ids).tolist() == [1, 2, 3, 5, 9, 0]
    assert ids.tolist() == [3, 1, 2, 5, 9, 0]


@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_the_best_of_many_by_score_and_then_by_id(k: int) -> None:
    """Negative scores, both zeros, and ties, in an order of their own."""
    rng = np.random.default_rng(k)
    ids = rng.permutation(500)
    scores = (rng.integers(-6, 7, 500) / 2 * rng.choice([-1.0, 1.0], 500)).astype(np.float32)
    keys, sizes, thresholds = best = scan.nobody(1, k)
    for v, score in zip(ids, scores, strict=True):
        if score >= thresholds[0]:
            scan._enter(0, v, score, keys, sizes, thresholds)
    found, by_score = np.empty((1, k), np.int64), np.empty((1, k), np.float32)
    scan.best_first(best, found, by_score)
    order = np.lexsort((ids, -scores))[:k]
    assert found[0].tolist() == ids[order].tolist()
    assert np.array_equal(by_score[0], scores[order])


def test_fewer_than_k_end_with_nobody() -> None:
    keys, sizes, thresholds = best = scan.nobody(2, 3)
    scan._enter(1, 7, np.float32(-2.5), keys, sizes, thresholds)
    found, scores = np.empty((2, 3), np.int64), np.empty((2, 3), np.float32)
    scan.best_first(best, found, scores)
    assert found.tolist() == [[-1, -1, -1], [7, -1, -1]]
    assert scores[1].tolist() == [-2.5, -np.inf, -np.inf] and np.isneginf(scores[0]).all()
