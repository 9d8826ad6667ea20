"""The index of clusters: the shared contract, what probing few lists leaves out, and what it says it compared."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from friendrec.pipeline.retrieval.approximate import recall_of
from friendrec.pipeline.retrieval.centroids import Centroids, hierarchical_k_means
from friendrec.pipeline.retrieval.clusters import ClusterIndex
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.kinds import load_index
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.segments import Dtype, Segment, build_segment
from tests.pipeline.retrieval.contract import RetrieverContract, brute_force, jagged, make_queries, random_problem


class OfClusters(RetrieverContract):
    lists, cells, nprobe, copies = 4, 1, 4, 1
    dtype: Dtype = "float32"

    def build(self, vectors: NDArray[np.float32]) -> ClusterIndex:
        centroids = hierarchical_k_means(vectors, self.lists, self.cells)
        return ClusterIndex.of(vectors, np.arange(len(vectors)), centroids, self.dtype, self.copies, self.nprobe)

    def save(self, retriever: ClusterIndex, directory: Path) -> None:  # type: ignore[override]
        retriever.save(directory)

    def load(self, directory: Path) -> ClusterIndex:
        index = load_index(directory)
        assert isinstance(index, ClusterIndex)
        return index


class TestEveryList(OfClusters):
    pass


class TestEveryListTwice(OfClusters):
    """Everybody is in two lists, and all are probed: nobody comes back twice."""

    copies = 2


class TestHalfPrecision(OfClusters):
    """Small whole numbers are exact in float16 too."""

    dtype: Dtype = "float16"


class FewLists(OfClusters):
    lists, cells, nprobe = 9, 1, 3
    agreement = 0.0

    def test_candidates_are_missed(self) -> None:
        vectors, queries = random_problem(0, num_queries=50, num_candidates=100)
        expected, _ = brute_force(vectors, queries, 5)
        assert 0.2 < (self.build(vectors).search(queries, 5)[0] == expected).mean() < 1


class TestFewLists(FewLists):
    pass


class TestTwoLevels(FewLists):
    cells = 3


class TestTwoLevelsTwice(FewLists):
    cells, copies = 3, 2


class TestSegments(OfClusters):
    """Every third candidate was written again, and of the old rows, which were elsewhere, nothing is seen."""

    lists, cells, copies = 4, 2, 2

    def build(self, vectors: NDArray[np.float32]) -> ClusterIndex:
        first = super().build(vectors)
        moved = np.arange(0, len(vectors), 3)
        old = vectors.copy()
        old[moved] += 5
        segments = [_segment(first.centroids, old, np.arange(len(old))), _segment(first.centroids, vectors, moved)]
        segments[0] = replace(segments[0], dead=np.isin(segments[0].ids, moved))
        return replace(first, segments=segments)


def _segment(centroids: Centroids, vectors: NDArray[np.float32], ids: NDArray[np.int64], copies: int = 2) -> Segment:
    assigned = centroids.assign(vectors[ids], copies)
    return build_segment(vectors[ids], ids.astype(np.int32), assigned, len(centroids))


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((600, 9)).astype(np.float32)


@pytest.fixture(scope="module")
def centroids(vectors: NDArray[np.float32]) -> Centroids:
    """36 in 6 cells."""
    return hierarchical_k_means(vectors, 36, 6)


def _asked(num_candidates: int, num_queries: int = 30, most: int = 40) -> Queries:
    rng = np.random.default_rng(1)
    some = lambda: rng.permutation(num_candidates)[: rng.integers(0, most)].tolist()  # noqa: E731
    named = [{v: float(rng.standard_normal()) for v in some()} for _ in range(num_queries)]
    return make_queries(rng.standard_normal((num_queries, 9)), named, [some() for _ in range(num_queries)])


def _look(
    vectors: NDArray[np.float32], centroids: Centroids, copies: int, query: Queries, k: int, nprobe: int, expanded: int
) -> tuple[list[int], int]:
    """One query in the words of the index: best cells, best lists of theirs, their rows and who is named."""
    asks, size = query.vector[0], len(centroids) // centroids.cells
    distances = np.linalg.norm(vectors[:, None] - centroids.vectors, axis=2)
    lists_of = np.argsort(distances, axis=1)[:, :copies]
    every = range(len(centroids))
    compared = 0
    if nprobe < len(centroids):
        cells = np.argsort(-centroids.vectors.reshape(centroids.cells, size, -1).mean(axis=1) @ asks)[:expanded]
        every = [c for c in every if c // size in cells]
        compared = len(every) + (centroids.cells if expanded < centroids.cells else 0)
    probed = sorted(every, key=lambda c: -float(centroids.vectors[c] @ asks))[:nprobe]
    compared += int(np.isin(lists_of, probed).sum())
    bonus = dict(zip(query.sparse_ids.tolist(), query.sparse_bonus.tolist(), strict=True))
    seen = {v for v in range(len(vectors)) if np.isin(lists_of[v], probed).any()} | set(bonus)
    allowed = seen - set(query.exclude_ids.tolist())
    compared += sum(lists_of[v, 0] not in probed for v in set(bonus) & allowed)
    best = sorted(allowed, key=lambda v: -(float(vectors[v] @ asks) + bonus.get(v, 0.0)))[:k]
    return best, compared


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(("nprobe", "expanded"), [(1, 2), (3, 4), (8, 6), (36, 6)])
def test_it_finds_and_counts_what_one_would_by_hand(
    vectors: NDArray[np.float32], centroids: Centroids, copies: int, nprobe: int, expanded: int
) -> None:
    index = ClusterIndex.of(vectors, np.arange(600), centroids, copies=copies, nprobe=nprobe)
    queries = _asked(600)
    ids, scores, compared = index.look(queries, 3)
    for q in range(len(queries)):
        best, count = _look(vectors, centroids, copies, queries.take(np.array([q])), 3, nprobe, expanded)
        if len(best) == 3:  # else twice as many lists are probed
            assert ids[q].tolist() == best
            assert compared[q] == count
    for searched, looked in zip(index.search(queries, 3), (ids, scores), strict=True):
        assert np.array_equal(searched, looked)


def test_more_lists_are_probed_while_too_few_are_found(vectors: NDArray[np.float32], centroids: Centroids) -> None:
    """One list of about 17 does not hold 40: two, four and so on are looked at, and all of it counts."""
    index = ClusterIndex.of(vectors, np.arange(600), centroids, nprobe=1)
    queries = Queries.dense(_asked(600).vector)
    ids, _, compared = index.look(queries, 40)
    for q in range(len(queries)):
        every = 0
        for nprobe, expanded in [(1, 2), (2, 4), (4, 5), (8, 6), (16, 6), (32, 6), (36, 6)]:
            best, count = _look(vectors, centroids, 1, queries.take(np.array([q])), 40, nprobe, expanded)
            every += count
            if len(best) == 40:
                break
        assert nprobe > 1
        assert ids[q].tolist() == best
        assert compared[q] == every


def test_dead_rows_are_neither_found_nor_counted(vectors: NDArray[np.float32], centroids: Centroids) -> None:
    """Who was deleted keeps a place and is nobody: not even one who is named comes back."""
    index = ClusterIndex.of(vectors, np.arange(600), centroids, nprobe=36)
    gone = np.arange(0, 600, 4)
    segment = replace(index.segments[0], dead=np.isin(index.segments[0].ids, gone))
    index = replace(index, segments=[segment])
    queries = make_queries(_asked(600).vector, named=[{0: 100.0, 1: 100.0}] * 30)
    ids, _, compared = index.look(queries, 600)
    assert (ids[:, 0] == 1).all()
    assert all(sorted(row[:450].tolist()) == np.setdiff1d(np.arange(600), gone).tolist() for row in ids)
    assert (ids[:, 450:] == -1).all()
    assert (compared == 450).all()
    assert not index.vectors_of(gone).any()


@given(seed=st.integers(0, 2**32 - 1), copies=st.integers(1, 2), writes=st.integers(1, 3), k=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_probing_every_list_is_exact_search_however_rows_are_written(
    seed: int, copies: int, writes: int, k: int
) -> None:
    """Candidates written again and again, some deleted at last; centroids that have nothing to do with them."""
    vectors, queries = random_problem(seed, num_queries=4, num_candidates=25)
    rng = np.random.default_rng(seed)
    centroids = Centroids(rng.integers(-2, 3, (6, 5)).astype(np.float32), 3)
    segments: list[Segment] = []
    for last in reversed(range(writes)):
        ids = np.arange(25) if last == writes - 1 else np.flatnonzero(rng.random(25) < 0.4)
        written = vectors if last == 0 else rng.integers(-2, 3, vectors.shape).astype(np.float32)
        segments = [_without(segment, ids) for segment in segments]
        segments.append(_segment(centroids, written, ids, copies))
    deleted = np.flatnonzero(rng.random(25) < 0.2)
    segments = [_without(segment, deleted) for segment in segments]
    index = ClusterIndex(centroids, segments, np.arange(25), effort=6)
    rows = queries.exclude_offsets
    excluded = [np.union1d(queries.exclude_ids[rows[q] : rows[q + 1]], deleted).tolist() for q in range(4)]
    expected, best = brute_force(index.vectors_of(np.arange(25)), queries.excluding(*jagged(excluded)), k)
    ids, scores = index.search(queries, k)
    assert np.array_equal(ids, expected)
    assert np.array_equal(scores, best)


def _without(segment: Segment, ids: NDArray[np.int64]) -> Segment:
    dead = segment.dead if len(segment.dead) else np.zeros(len(segment.ids), np.bool_)
    return replace(segment, dead=dead | np.isin(segment.ids, ids))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_products_are_those_of_the_rows_stored(
    vectors: NDArray[np.float32], centroids: Centroids, dtype: Dtype
) -> None:
    """All lists probed, it is the exact index of what it stored; and that is close to what it was given."""
    index = ClusterIndex.of(vectors, np.arange(600), centroids, dtype, copies=2, nprobe=36)
    stored = index.vectors_of(np.arange(600))
    most = np.abs(vectors).max(axis=1, keepdims=True)
    step = {"float32": 0.0, "float16": most * 2.0**-11, "int8": most / 127 / 2}[dtype]
    assert (np.abs(stored - vectors) <= step * 1.001).all()
    queries = _asked(600)
    ids, scores = index.search(queries, 20)
    expected, best = ExactIndex(stored, np.arange(600)).search(queries, 20)
    assert np.array_equal(ids, expected)
    np.testing.assert_allclose(scores, best, rtol=1e-5, atol=1e-5)


def test_lists_that_vectors_form_are_enough(centroids: Centroids) -> None:
    """Of vectors in 36 groups, three lists hold nearly all that a query near one of them looks for."""
    rng = np.random.default_rng(3)
    vectors = np.repeat(3 * rng.standard_normal((36, 9)), 20, axis=0) + 0.3 * rng.standard_normal((720, 9))
    vectors = vectors.astype(np.float32)
    index = ClusterIndex.of(vectors, np.arange(720), hierarchical_k_means(vectors, 36, 6), nprobe=3)
    queries = Queries.dense(vectors[::7])
    assert recall_of(index, queries, ExactIndex(vectors, np.arange(720)).search(queries, 10)[0]) > 0.9
    assert index.look(queries, 10)[2].mean() < 150


def test_no_score_depends_on_who_else_asks(vectors: NDArray[np.float32], centroids: Centroids) -> None:
    index = ClusterIndex.of(vectors, np.arange(600), centroids, nprobe=8)
    queries = _asked(600, num_queries=101)
    ids, scores = index.search(queries, 10)
    for q in range(0, 101, 10):
        alone = index.search(queries.take(np.array([q])), 10)
        assert np.array_equal(alone[0][0], ids[q])
        np.testing.assert_allclose(alone[1][0], scores[q], rtol=1e-6)
