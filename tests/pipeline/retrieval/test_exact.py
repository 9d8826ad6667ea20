"""The exact index: the shared contract, and its rank against the definition."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from friendrec.pipeline.retrieval import exact
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.exclusion import one_each, union
from friendrec.pipeline.retrieval.protocol import Queries
from tests.pipeline.retrieval.contract import RetrieverContract, jagged, make_queries, random_problem


def exact_index(vectors: NDArray[np.float32]) -> ExactIndex:
    return ExactIndex(vectors, np.arange(len(vectors)) * 10)


class TestExact(RetrieverContract):
    def build(self, vectors: NDArray[np.float32]) -> ExactIndex:
        return exact_index(vectors)

    def save(self, retriever: ExactIndex, directory: Path) -> None:  # type: ignore[override]
        retriever.save(directory)

    def load(self, directory: Path) -> ExactIndex:
        return ExactIndex.load(directory)


class TestExactInSmallBlocks(TestExact):
    """The same with three queries a block."""

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exact, "BLOCK_SCORES", 120)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_rank_is_one_plus_higher_plus_half_of_the_tied(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK_SCORES", block)
    vectors, queries = random_problem(seed, num_queries=30)
    index, targets = exact_index(vectors), np.random.default_rng(seed).integers(0, len(vectors), 30)
    scores = index.scores_of(queries, np.tile(np.arange(len(vectors)), (30, 1)))
    for q, rank in enumerate(index.rank(queries, targets)):
        excluded = set(queries.exclude_ids[queries.exclude_offsets[q] : queries.exclude_offsets[q + 1]].tolist())
        others = [scores[q, v] for v in range(len(vectors)) if v not in excluded and v != targets[q]]
        mine = scores[q, targets[q]]
        assert rank == 1 + sum(s > mine for s in others) + sum(s == mine for s in others) / 2


def test_rank_agrees_with_search() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((500, 16)).astype(np.float32)
    queries = make_queries(
        rng.standard_normal((40, 16)).astype(np.float32),
        named=[{int(v): float(rng.normal()) for v in rng.permutation(500)[:20]} for _ in range(40)],
        excluded=[rng.permutation(500)[:50].tolist() for _ in range(40)],
    )
    index = exact_index(vectors)
    ids, scores = index.search(queries, 20)
    for place in range(20):
        assert (index.rank(queries, ids[:, place]) == place + 1).all()
    assert np.array_equal(index.scores_of(queries, ids), scores)


@pytest.mark.parametrize("shards", [1, 3, 40])
def test_counts_of_shards_add_up_to_the_rank(shards: int) -> None:
    vectors, queries = random_problem(5, num_queries=30)
    targets = np.random.default_rng(5).integers(0, len(vectors), 30)
    index = exact_index(vectors)
    scores = index.scores_of(queries, targets[:, None])[:, 0]
    total = np.ones(30)
    for share in np.array_split(np.arange(len(vectors)), shards):
        first, own = int(share[0]), np.isin(targets, share)
        parts = [queries.take(np.arange(a, a + 10)).within(first, len(share)) for a in (0, 10, 20)]
        shard, local = exact_index(vectors[share]), np.where(own, targets - first, -1)
        higher, tied = shard.count_better(Queries.concatenate(parts), scores, local)
        total += higher + tied / 2
    assert total.tolist() == index.rank(queries, targets).tolist()


def test_the_file_is_a_faiss_index_of_raw_users(tmp_path: Path) -> None:
    import faiss

    vectors, queries = random_problem(0)
    exact_index(vectors).save(tmp_path)
    index = faiss.read_index(str(tmp_path / "index.faiss"))
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    expected = exact_index(vectors).search(make_queries(queries.vector), 3)[1]
    assert np.array_equal(index.search(queries.vector, 3)[0], expected)
    assert ExactIndex.load(tmp_path).user_ids.tolist() == [10 * row for row in range(len(vectors))]


def test_union_is_distinct_within_a_row_and_drops_users_who_are_no_candidates() -> None:
    offsets, ids = union(6, one_each(np.array([2, 9])), jagged([[5, 2], [7, 0]]), jagged([[5, 1], []]))
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == [[1, 2, 5], [0]]
