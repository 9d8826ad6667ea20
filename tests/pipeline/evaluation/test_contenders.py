"""Every kind that a frontier compares, against brute force over the lists it says it looks into; and what it counts."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from friendrec.pipeline.evaluation.beams import Beams
from friendrec.pipeline.evaluation.contenders import (
    REFINED,
    WAYS,
    Clusters,
    Contender,
    Exact,
    FaissGraph,
    FaissLists,
    Way,
    k_means,
    steps,
)
from friendrec.pipeline.evaluation.overfetch import ROOM, room_of, search
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.stu import StuIndex
from tests.pipeline.retrieval.contract import brute_force, make_queries
from tests.pipeline.retrieval.test_stu import Telescope

K, LISTS, NUM = 10, 12, 300
Vectors = NDArray[np.float32]


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20, 6))
    return (centres[rng.integers(0, 20, NUM)] + 0.5 * rng.standard_normal((NUM, 6))).astype(np.float32)


@pytest.fixture(scope="module")
def queries() -> Queries:
    """Of each other queries name and exclude none, few, or many; some are in both."""
    rng = np.random.default_rng(1)
    some = lambda most: rng.permutation(NUM)[: rng.integers(0, most + 1)].tolist()  # noqa: E731
    mosts = [(0, 0), (5, 0), (0, 5), (40, 200), (20, 20), (3, 290), (100, 30), (200, 290)] * 4
    named = [{v: float(rng.normal()) for v in some(most)} for most, _ in mosts]
    vector = rng.standard_normal((len(mosts), 6)).astype(np.float32)
    made = make_queries(vector, named, [some(most) for _, most in mosts])
    room, hidden = room_of(made), np.array([len(hidden_of(made, q)) for q in range(len(made))])
    assert set(room) == set(ROOM) and (hidden[room == 0] > ROOM[-1]).any()  # in blocks, and filtered
    return made


@pytest.fixture(scope="module", params=list(WAYS))
def made(request: pytest.FixtureRequest, vectors: Vectors) -> tuple[Vectors, NDArray[np.int64]]:
    return k_means(request.param, vectors, LISTS)


def hidden_of(queries: Queries, q: int) -> set[int]:
    """Whom a query excludes or names."""
    excluded = queries.exclude_ids[slice(*queries.exclude_offsets[q : q + 2])]
    return set(excluded.tolist()) | set(queries.sparse_ids[slice(*queries.sparse_offsets[q : q + 2])].tolist())


def asked_of(queries: Queries) -> list[tuple[int, int]]:
    """How many are wanted of an index of nobody in each block of the queries, and how many of them may be hidden."""
    asked = []

    def ask(vectors: Vectors, wanted: int, slack: int, selector: object) -> tuple[NDArray[np.int64], Vectors]:
        asked.append((wanted, slack))
        return np.full((len(vectors), wanted), -1), np.full((len(vectors), wanted), -np.inf, np.float32)

    search(np.zeros((10 * NUM, 6), np.float32), queries, K, K, ask)
    return asked


def test_faiss_is_asked_for_as_many_more_as_are_hidden_each_once(queries: Queries) -> None:
    sizes = ROOM.tolist()
    for q, room in enumerate(room_of(queries).tolist()):
        hidden = len(hidden_of(queries, q))
        assert room == (min(size for size in sizes if size >= hidden) if hidden <= sizes[-1] else 0)
        (asked,) = asked_of(queries.take(np.array([q])))
        assert asked == ((K, hidden) if hidden > sizes[-1] else (K + room, room))
    both = make_queries(np.zeros((2, 6), np.float32), [dict.fromkeys(range(16), 1.0), {}], [list(range(15)), []])
    assert room_of(both).tolist() == [16, 0]
    assert room_of(Queries.dense(both.vector)).tolist() == [0, 0]


def names_of(queries: Queries, q: int) -> set[int]:
    """Whom a query names and does not exclude."""
    named = queries.sparse_ids[slice(*queries.sparse_offsets[q : q + 2])]
    return set(named.tolist()) - set(queries.exclude_ids[slice(*queries.exclude_offsets[q : q + 2])].tolist())


def members(centroids: Vectors, list_of: NDArray[np.int64], queries: Queries, q: int, nprobe: int) -> set[int]:
    """Who lies in the lists of the best centroids."""
    best = np.argsort(-(centroids @ queries.vector[q]))[:nprobe]
    return set(np.flatnonzero(np.isin(list_of, best)).tolist())


def among(vectors: Vectors, queries: Queries, visible: Callable[[int], set[int]]) -> NDArray[np.float32]:
    """Scores `[Q, K]` of the best of those whom each query may see besides its exclusions."""
    best = []
    for q in range(len(queries)):
        own = queries.take(np.array([q]))
        hidden = set(range(NUM)) - visible(q) | set(own.exclude_ids.tolist())
        ids = np.array(sorted(hidden), np.int64)
        best.append(brute_force(vectors, own.excluding(np.array([0, len(ids)]), ids), K)[1])
    return np.concatenate(best)


@pytest.mark.parametrize("nprobe", [1, 3, LISTS])
def test_lists_find_the_best_of_what_they_hold_and_of_whom_is_named(
    vectors: Vectors, queries: Queries, made: tuple[Vectors, NDArray[np.int64]], nprobe: int
) -> None:
    index = FaissLists.flat(vectors, *made)
    seen = lambda q: members(*made, queries, q, nprobe) | names_of(queries, q)  # noqa: E731
    ids, scores = index.search(queries, K, nprobe)
    np.testing.assert_allclose(scores, among(vectors, queries, seen), rtol=1e-5, atol=1e-5)
    for q in range(len(queries)):
        found = ids[q][ids[q] >= 0].tolist()
        assert len(set(found)) == len(found) and set(found) <= seen(q)


@pytest.mark.parametrize("nprobe", [1, 3, LISTS])
def test_what_lists_compare_is_counted(
    vectors: Vectors, queries: Queries, made: tuple[Vectors, NDArray[np.int64]], nprobe: int
) -> None:
    plain, again = [], []
    for q in range(len(queries)):
        inside = members(*made, queries, q, nprobe)
        plain.append(LISTS + len(inside) + len(names_of(queries, q) - inside))
        again.append(min(len(inside), REFINED * (K + int(room_of(queries)[q]))))
    assert FaissLists.flat(vectors, *made).compared(queries, K, nprobe) == pytest.approx(np.mean(plain))
    coded = FaissLists.coded(vectors, *made)
    assert coded.compared(queries, K, nprobe) == pytest.approx(np.mean(plain) + np.mean(again))


def test_codes_are_compared_again_by_their_vectors(vectors: Vectors, queries: Queries) -> None:
    """So many of so few that all are, and nothing is lost."""
    index = FaissLists.coded(vectors, *k_means("plain", vectors, LISTS))
    expected = brute_force(vectors, queries, 70)[1]
    np.testing.assert_allclose(index.search(queries, 75, LISTS)[1][:, :70], expected, rtol=1e-5, atol=1e-5)


def test_a_long_walk_finds_all_and_a_short_one_less_with_less(vectors: Vectors, queries: Queries) -> None:
    graph = FaissGraph.of(vectors)
    expected = brute_force(vectors, queries, K)[1]
    np.testing.assert_allclose(graph.search(queries, K, graph.efforts[-1])[1], expected, rtol=1e-5, atol=1e-5)
    named = np.mean([len(names_of(queries, q)) for q in range(len(queries))])
    counts = [graph.compared(queries, K, effort) for effort in graph.efforts]
    assert named < counts[0] < counts[-1] and counts == sorted(counts)
    assert counts[-1] - named <= 1.3 * NUM  # each once on the lowest level, few again on those above
    assert graph.efforts[-1] == NUM and min(graph.efforts) == 4


def test_the_exact_search_compares_all(vectors: Vectors, queries: Queries) -> None:
    exact = Exact(ExactIndex(vectors, np.arange(NUM)))
    np.testing.assert_allclose(exact.search(queries, K, None)[1], brute_force(vectors, queries, K)[1], rtol=1e-5)
    assert exact.compared(queries, K, None) == NUM


def test_the_models_own_lists_are_asked_by_effort(vectors: Vectors, queries: Queries) -> None:
    centroids = Centroids(k_means("plain", vectors, LISTS)[0], cells=3)
    own = Clusters.of(vectors, np.arange(NUM), centroids)
    assert own.efforts == [1, 2, 3, 4, 6, 8, LISTS]
    counts = [own.compared(queries, K, effort) for effort in own.efforts]
    assert counts[0] < counts[-1]
    np.testing.assert_allclose(own.search(queries, K, LISTS)[1], brute_force(vectors, queries, K)[1], rtol=1e-5)


def test_token_scores_are_counted_and_narrow_beams_find_fewer() -> None:
    """16 users, two tokens of four each: the root's four, and four for each prefix kept."""
    rng = np.random.default_rng(0)
    codes = np.stack([np.arange(16) // 4, np.arange(16) % 4], axis=1).astype(np.int32)
    decoder = Telescope(codes, rng.standard_normal((16, 5)).astype(np.float32), (4, 4))
    beams: Contender = Beams(StuIndex(StuIndex.build(codes, np.arange(16), (4, 4)).trie, np.arange(16), decoder))
    queries = make_queries(rng.standard_normal((6, 5)).astype(np.float32))
    assert [beams.compared(queries, K, width) for width in (1, 2, 4, 8)] == [8, 12, 20, 20]
    ids, scores = beams.search(queries, K, 2)
    assert ids.shape == scores.shape == (6, K)
    assert ((ids >= 0).sum(axis=1) == 2).all() and np.isneginf(scores[:, 2:]).all()
    one_named = make_queries(queries.vector, [{5: 1.0}] * 6)
    assert beams.compared(one_named, K, 1) == 8 + 8  # the two prefixes of the one named


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (2, [1, 2]), (7, [1, 2, 3, 4, 6, 7]), (12, [1, 2, 3, 4, 6, 8, 12])]
)
def test_efforts_grow_by_half_or_a_third(most: int, expected: list[int]) -> None:
    assert steps(most) == expected


@pytest.mark.parametrize("way", list(WAYS))
def test_every_vector_is_in_one_list(vectors: Vectors, way: Way) -> None:
    centroids, list_of = k_means(way, vectors, LISTS)
    assert centroids.shape == (LISTS, 6) and list_of.shape == (NUM,)
    assert FaissLists.flat(vectors, centroids, list_of).load.sum() == NUM
    if way == "plain":
        distance = ((vectors[:, None] - centroids[None]) ** 2).sum(axis=2)
        assert np.array_equal(distance.argmin(axis=1), list_of)
