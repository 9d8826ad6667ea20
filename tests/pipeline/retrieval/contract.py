"""What every retriever must do, as tests: subclass `RetrieverContract`, give `build`, and all of them run on it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from friendrec.pipeline.retrieval.protocol import Queries, Retriever


def brute_force(
    vectors: NDArray[np.float32], queries: Queries, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The protocol in its own words, one query and one candidate at a time."""
    ids = np.full((len(queries), k), -1, np.int64)
    best = np.full((len(queries), k), -np.inf, np.float32)
    for q in range(len(queries)):
        named = slice(queries.sparse_offsets[q], queries.sparse_offsets[q + 1])
        bonus = dict(zip(queries.sparse_ids[named].tolist(), queries.sparse_bonus[named].tolist(), strict=True))
        excluded = set(queries.exclude_ids[queries.exclude_offsets[q] : queries.exclude_offsets[q + 1]].tolist())
        allowed = [v for v in range(len(vectors)) if v not in excluded]
        scored = sorted((-(float(vectors[v] @ queries.vector[q]) + bonus.get(v, 0.0)), v) for v in allowed)[:k]
        for place, (score, v) in enumerate(scored):
            ids[q, place], best[q, place] = v, -score
    return ids, best


def jagged(rows: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets and ids of rows."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return offsets, np.array([v for row in rows for v in row], np.int64)


def make_queries(
    vector: NDArray[np.float32], named: list[dict[int, float]] | None = None, excluded: list[list[int]] | None = None
) -> Queries:
    """Queries from a bonus by candidate and a list of exclusions a row."""
    named, excluded = named or [{} for _ in vector], excluded or [[] for _ in vector]
    sparse_offsets, sparse_ids = jagged([list(row) for row in named])
    bonus = np.array([value for row in named for value in row.values()], np.float32)
    return Queries(vector.astype(np.float32), sparse_offsets, sparse_ids, bonus, *jagged(excluded))


def random_problem(seed: int, num_queries: int = 7, num_candidates: int = 40) -> tuple[NDArray[np.float32], Queries]:
    """Small whole numbers: inner products are exact and ties are many."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (num_candidates, 5)).astype(np.float32)
    some = lambda most: rng.permutation(num_candidates)[: rng.integers(0, most + 1)].tolist()  # noqa: E731
    named = [{v: float(rng.integers(-12, 13)) / 2 for v in some(num_candidates // 2)} for _ in range(num_queries)]
    excluded = [some(num_candidates) for _ in range(num_queries)]
    return vectors, make_queries(rng.integers(-2, 3, (num_queries, 5)).astype(np.float32), named, excluded)


class RetrieverContract:
    """Ids and scores must equal brute force; a kind that searches approximately lowers `agreement` and says so."""

    agreement = 1.0
    """Share of the places that must be brute force's."""
    cuts_ties_by_id = True
    """Whether the last of several tied go to the lower id too; where not, another with the same score is as good."""

    def build(self, vectors: NDArray[np.float32]) -> Retriever:
        raise NotImplementedError

    def save(self, retriever: Retriever, directory: Path) -> None:
        raise NotImplementedError

    def load(self, directory: Path) -> Retriever:
        raise NotImplementedError

    def check(self, vectors: NDArray[np.float32], queries: Queries, k: int) -> None:
        ids, scores = self.build(vectors).search(queries, k)
        expected, best = brute_force(vectors, queries, k)
        assert ids.dtype == np.int64 and scores.dtype == np.float32
        assert ids.shape == scores.shape == (len(queries), k)
        agrees = ids == expected if self.cuts_ties_by_id else np.isclose(scores, best, rtol=1e-5, atol=1e-5)
        assert agrees.mean() >= self.agreement if ids.size else True
        assert np.array_equal(ids >= 0, expected >= 0), "k results come back while k allowed candidates exist"
        every, best = brute_force(vectors, queries, len(vectors))
        for q, (row, own) in enumerate(zip(ids, scores, strict=True)):
            score = dict(zip(every[q].tolist(), best[q].tolist(), strict=True)) | {-1: -np.inf}
            assert sorted(zip(-own, row, strict=True)) == list(zip(-own, row, strict=True)), "best first, lower id"
            assert len(set(row[row >= 0])) == (row >= 0).sum(), "nobody twice"
            np.testing.assert_allclose(own, [score[v] for v in row.tolist()], rtol=1e-5, atol=1e-5)

    def test_even_users_befriend_even_users(self) -> None:
        """Users of a parity all know each other but for one withheld friendship, which must come first."""
        parity = np.arange(30) % 2
        vectors = np.stack([parity == 0, parity == 1], axis=1).astype(np.float32)
        friends = [[v for v in range(30) if v % 2 == u % 2 and v != (u + 4) % 30] for u in range(30)]
        ids, _ = self.build(vectors).search(make_queries(vectors, excluded=friends), 1)
        assert ids[:, 0].tolist() == [(u + 4) % 30 for u in range(30)]

    @pytest.mark.parametrize("seed", range(20))
    def test_equals_brute_force(self, seed: int) -> None:
        self.check(*random_problem(seed), k=1 + seed % 12)

    def test_batch_equals_single(self) -> None:
        vectors, queries = random_problem(0, num_queries=50)
        retriever = self.build(vectors)
        ids, scores = retriever.search(queries, 6)
        for q in range(len(queries)):
            one_ids, one_scores = retriever.search(queries.take(np.array([q])), 6)
            assert one_ids[0].tolist() == ids[q].tolist()
            assert np.array_equal(one_scores[0], scores[q])

    def test_excluded_never_appears_and_others_keep_score_and_order(self) -> None:
        vectors, queries = random_problem(1, num_queries=20)
        retriever = self.build(vectors)
        nobody = queries.excluding(*jagged([[] for _ in range(len(queries))]))
        free, free_scores = retriever.search(nobody, len(vectors))
        ids, scores = retriever.search(queries, len(vectors))
        for q in range(len(queries)):
            excluded = queries.exclude_ids[queries.exclude_offsets[q] : queries.exclude_offsets[q + 1]]
            kept = ~np.isin(free[q], excluded)
            found = ids[q] >= 0
            assert not np.isin(ids[q], excluded).any()
            assert ids[q][found].tolist() == free[q][kept].tolist()
            assert np.array_equal(scores[q][found], free_scores[q][kept])

    def test_k_results_while_k_allowed_exist(self) -> None:
        """The nearest 30 of 40 are excluded: the other 10 all come back, best first, and then nobody."""
        vectors = np.arange(40, 0, -1, dtype=np.float32)[:, None]
        ids, scores = self.build(vectors).search(
            make_queries(np.ones((2, 1), np.float32), excluded=[list(range(30)), []]), 12
        )
        assert ids[0].tolist() == [*range(30, 40), -1, -1]
        assert np.array_equal(scores[0], [*range(10, 0, -1), -np.inf, -np.inf])
        assert ids[1].tolist() == list(range(12))

    def test_bonus_lifts_sinks_and_does_not_unhide(self) -> None:
        vectors = np.arange(10, 0, -1, dtype=np.float32)[:, None]
        named = [{9: 100.0, 0: -100.0, 5: 200.0}]
        ids, scores = self.build(vectors).search(make_queries(np.ones((1, 1), np.float32), named, [[5]]), 9)
        assert ids[0].tolist() == [9, 1, 2, 3, 4, 6, 7, 8, 0]
        assert scores[0, 0] == 101 and scores[0, -1] == -90

    def test_ties_go_to_the_lower_id(self) -> None:
        ids, _ = self.build(np.ones((9, 2), np.float32)).search(make_queries(np.ones((3, 2), np.float32)), 4)
        assert ids.tolist() == [[0, 1, 2, 3]] * 3

    def test_fewer_candidates_than_k_and_no_queries(self) -> None:
        vectors = np.array([[1.0], [2.0]], np.float32)
        ids, scores = self.build(vectors).search(make_queries(np.ones((1, 1), np.float32)), 5)
        assert ids.tolist() == [[1, 0, -1, -1, -1]]
        assert np.isneginf(scores[0, 2:]).all()
        assert self.build(vectors).search(make_queries(np.ones((0, 1), np.float32)), 5)[0].shape == (0, 5)

    def test_saved_and_loaded_answers_the_same(self, tmp_path: Path) -> None:
        vectors, queries = random_problem(2)
        retriever = self.build(vectors)
        self.save(retriever, tmp_path)
        for before, after in zip(retriever.search(queries, 9), self.load(tmp_path).search(queries, 9), strict=True):
            assert np.array_equal(before, after)

    @given(
        seed=st.integers(0, 2**32 - 1), queries=st.integers(0, 5), candidates=st.integers(1, 12), k=st.integers(1, 15)
    )
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    def test_equals_brute_force_on_any_small_problem(self, seed: int, queries: int, candidates: int, k: int) -> None:
        self.check(*random_problem(seed, queries, candidates), k=k)
