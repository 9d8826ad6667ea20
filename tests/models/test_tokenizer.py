"""Residual k-means: against loops, a structure that is known, and scikit-learn."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans

from friendrec.models.tokenizer import CAPACITY, Codebooks, fit_residual_kmeans

RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((60, 5)).astype(np.float32)
CODEBOOKS = Codebooks(
    tuple(RNG.standard_normal((size, 5)).astype(np.float32) for size in (4, 3, 2)),
    mean=RNG.standard_normal(5).astype(np.float32),
    scale=2.5,
)


def slow_code(vector: np.ndarray, prefix: list[int]) -> list[int]:
    """Level by level the nearest centroid of what is left."""
    left = (vector.astype(np.float64) - CODEBOOKS.mean) / CODEBOOKS.scale
    code = list(prefix)
    for level, codebook in enumerate(CODEBOOKS.levels):
        if level >= len(prefix):
            code.append(min(range(len(codebook)), key=lambda k: sum((left - codebook[k]) ** 2)))
        left = left - codebook[code[level]]
    return code


@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_code_is_the_nearest_centroid_of_each_level_after_its_prefix(given: int) -> None:
    prefix = np.stack([RNG.integers(0, size, 60) for size in CODEBOOKS.sizes], axis=1)[:, :given].astype(np.int32)
    tokens = CODEBOOKS.encode(VECTORS, prefix if given else None)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [slow_code(v, p) for v, p in zip(VECTORS, prefix.tolist(), strict=True)]


def test_codes_stand_for_sums_of_centroids_from_which_distances_are_measured() -> None:
    tokens = CODEBOOKS.encode(VECTORS)
    first, second, third = CODEBOOKS.levels
    code = tokens[7]
    expected = CODEBOOKS.mean + 2.5 * (first[code[0]] + second[code[1]] + third[code[2]])
    np.testing.assert_allclose(CODEBOOKS.decode(tokens)[7], expected, rtol=1e-5)
    np.testing.assert_allclose(CODEBOOKS.decode(tokens[:, :0])[7], CODEBOOKS.mean)
    left = (VECTORS - CODEBOOKS.decode(tokens[:, :1])) / 2.5
    expected = np.square(left[:, None] - second).sum(axis=2)
    np.testing.assert_allclose(CODEBOOKS.distances(VECTORS, tokens[:, :1]), expected, rtol=1e-4, atol=1e-5)


def test_groups_within_groups_are_found() -> None:
    axes = np.eye(8, dtype=np.float32)
    place = np.arange(480) % 16
    vectors = 100 * axes[place // 4] + axes[4 + place % 4] + RNG.normal(0, 1e-3, (480, 8)).astype(np.float32)
    codebooks, tokens = fit_residual_kmeans(vectors, 2, 4, seed=0, balanced=True)
    assert len({(p // 4, t) for p, t in zip(place.tolist(), tokens[:, 0].tolist(), strict=True)}) == 4
    assert len(np.unique(tokens[:, 0])) == 4
    np.testing.assert_allclose(codebooks.decode(tokens), vectors, atol=0.02)
    assert tokens.tolist() == codebooks.encode(vectors).tolist()


@pytest.mark.parametrize("num_codebooks", [1, 2, 3, 4])
def test_every_level_uses_its_tokens_and_leaves_less(num_codebooks: int) -> None:
    vectors = RNG.standard_normal((1500, 16)).astype(np.float32) * RNG.uniform(1, 2, (1500, 1)).astype(np.float32)
    for size in (64, 128, 256):
        codebooks, tokens = fit_residual_kmeans(vectors, num_codebooks, size, seed=0)
        assert tokens.shape == (1500, num_codebooks) and codebooks.sizes == (size,) * num_codebooks
        assert min(len(np.unique(column)) for column in tokens.T) >= 0.95 * size
        errors = [np.square(vectors - codebooks.decode(tokens[:, :level])).sum() for level in range(num_codebooks + 1)]
        assert all(after < 0.9 * before for before, after in pairwise(errors))
        assert errors[1] < 1.1 * KMeans(size, n_init=1, random_state=0).fit(vectors).inertia_


def test_a_balanced_level_limits_the_users_of_a_token() -> None:
    vectors = RNG.standard_normal((400, 8)).astype(np.float32) * RNG.lognormal(0, 1, (400, 1)).astype(np.float32)
    capacity = -(-CAPACITY * 400 // 16)
    fullest = {}
    for balanced in (False, True):
        codebooks, tokens = fit_residual_kmeans(vectors, 3, 16, seed=0, balanced=balanced)
        fullest[balanced] = max(np.bincount(column).max() for column in tokens.T)
        spread = np.square(vectors - vectors.mean(axis=0)).sum()
        assert np.square(vectors - codebooks.decode(tokens)).sum() < 0.5 * spread
    assert fullest[True] <= capacity < fullest[False]


def test_vectors_that_are_all_alike_have_codes() -> None:
    vectors = np.full((40, 3), 7, np.float32)
    codebooks, tokens = fit_residual_kmeans(vectors, 2, 8, seed=0)
    np.testing.assert_allclose(codebooks.decode(tokens), vectors)


def test_one_seed_gives_one_file(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        fit_residual_kmeans(VECTORS, 2, 8, seed=seed)[0].save(tmp_path / f"{name}.npz")
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b != c


def test_codebooks_are_opened_as_they_were_saved(tmp_path: Path) -> None:
    CODEBOOKS.save(tmp_path / "codebooks.npz")
    opened = Codebooks.load(tmp_path / "codebooks.npz")
    assert opened.sizes == (4, 3, 2) and opened.scale == 2.5
    assert np.array_equal(opened.decode(opened.encode(VECTORS)), CODEBOOKS.decode(CODEBOOKS.encode(VECTORS)))
