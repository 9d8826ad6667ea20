"""Inverted lists and graphs: the shared contract, their recall, and what they promise where they find too few."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.pipeline.retrieval.approximate import ApproximateIndex, calibrate, default_lists, recall_of
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.kinds import load_index
from friendrec.pipeline.retrieval.protocol import Queries
from tests.pipeline.retrieval.contract import RetrieverContract, brute_force, jagged, make_queries, random_problem


class Approximate(RetrieverContract):
    cuts_ties_by_id = False

    def save(self, retriever: ApproximateIndex, directory: Path) -> None:  # type: ignore[override]
        retriever.save(directory)

    def load(self, directory: Path) -> ApproximateIndex:
        index = load_index(directory)
        assert isinstance(index, ApproximateIndex)
        return index


class TestLists(Approximate):
    """As many lists as so few candidates get by default: one."""

    def build(self, vectors: NDArray[np.float32]) -> ApproximateIndex:
        return ApproximateIndex.ivf(vectors, np.arange(len(vectors)))


class TestShortLists(Approximate):
    """Four lists, of which a query looks at three: some candidates are missed."""

    agreement = 0.0

    def test_candidates_are_missed(self) -> None:
        vectors, queries = random_problem(0, num_queries=50)
        expected, _ = brute_force(vectors, queries, 5)
        assert 0.5 < (self.build(vectors).search(queries, 5)[0] == expected).mean() < 1

    def build(self, vectors: NDArray[np.float32]) -> ApproximateIndex:
        return ApproximateIndex.ivf(vectors, np.arange(len(vectors)), nlist=4, nprobe=3)


class TestGraph(Approximate):
    """So few candidates are all walked past."""

    def build(self, vectors: NDArray[np.float32]) -> ApproximateIndex:
        return ApproximateIndex.hnsw(vectors, np.arange(len(vectors)))


def clustered(num: int, dimensions: int = 16, seed: int = 0) -> NDArray[np.float32]:
    """Vectors around 30 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((30, dimensions))
    return (centres[rng.integers(0, 30, num)] + 0.4 * rng.standard_normal((num, dimensions))).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    return clustered(4_000)


@pytest.fixture(scope="module", params=["ivf", "hnsw"])
def index(request: pytest.FixtureRequest, vectors: NDArray[np.float32]) -> ApproximateIndex:
    build = ApproximateIndex.ivf if request.param == "ivf" else ApproximateIndex.hnsw
    return build(vectors, np.arange(len(vectors)))


@pytest.mark.parametrize("wanted", [0.9, 0.99])
def test_calibration_reaches_the_recall_on_other_queries(
    index: ApproximateIndex, vectors: NDArray[np.float32], wanted: float
) -> None:
    exact = ExactIndex(vectors, index.user_ids)
    calibrated = calibrate(index, exact, clustered(200, seed=1), wanted)
    assert calibrated.recall is not None and calibrated.recall >= wanted
    asked = Queries.dense(clustered(200, seed=2))
    assert recall_of(calibrated, asked, exact.search(asked, 100)[0]) >= wanted - 0.02
    if wanted == 0.9:
        assert calibrated.effort < index.most_effort / 2, "not by looking at everything"


def test_a_recall_out_of_reach_is_told() -> None:
    """Points without any structure in many dimensions."""
    rng = np.random.default_rng(0)
    vectors, queries = rng.standard_normal((12_000, 64)).astype(np.float32), rng.standard_normal((20, 64))
    index = ApproximateIndex.hnsw(vectors, np.arange(12_000), m=4)
    with pytest.raises(FriendrecError, match=r"finds 0\.\d+ of the exact best, not 0.999.*--kind exact"):
        calibrate(index, ExactIndex(vectors, index.user_ids), queries.astype(np.float32), 0.999)


def test_exclusions_cost_no_recall(index: ApproximateIndex, vectors: NDArray[np.float32]) -> None:
    """The nearest 300 are excluded, which would fill a list of 100 three times over: the next 100 come back."""
    exact = ExactIndex(vectors, index.user_ids)
    calibrated = calibrate(index, exact, clustered(200, seed=1), 0.98)
    asked = Queries.dense(clustered(50, seed=2))
    near = exact.search(asked, 300)[0]
    asked = asked.excluding(*jagged(near.tolist()))
    assert recall_of(calibrated, asked, exact.search(asked, 100)[0]) >= 0.9


def test_named_candidates_are_exact_however_far_away(index: ApproximateIndex, vectors: NDArray[np.float32]) -> None:
    vector = clustered(1, seed=3)
    exact = ExactIndex(vectors, index.user_ids)
    far = int(np.argmin(vectors @ vector[0]))
    queries = make_queries(vector, named=[{far: 1000.0}])
    ids, scores = index.search(queries, 5)
    assert ids[0, 0] == far
    np.testing.assert_allclose(scores[0, 0], exact.search(queries, 1)[1][0, 0], rtol=1e-6)
    assert (ids[0] == far).sum() == 1


def test_too_few_found_means_that_everything_is_looked_at(vectors: NDArray[np.float32]) -> None:
    """All but twelve of the farthest are excluded, and one list or a short walk does not meet them."""
    vector = clustered(1, seed=4)
    kept = np.argsort(vectors @ vector[0])[:12]
    excluded = np.setdiff1d(np.arange(len(vectors)), kept)
    users = np.arange(len(vectors))
    for index in (ApproximateIndex.ivf(vectors, users, nprobe=1), ApproximateIndex.hnsw(vectors, users, ef=1)):
        ids, _ = index.search(make_queries(vector, excluded=[excluded.tolist()]), 10)
        assert ids[0].tolist() == kept[::-1][:10].tolist()


def test_lists_by_default() -> None:
    assert [default_lists(num) for num in (1, 100, 100_000, 1_000_000)] == [1, 2, 1264, 4000]
