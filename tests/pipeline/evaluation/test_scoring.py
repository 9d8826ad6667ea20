"""A recommender asked about every event: live and frozen, against one question at a time."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from friendrec.datasets.contacts import FirstContacts
from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation import scoring
from friendrec.pipeline.evaluation.baselines import baseline_ranks
from friendrec.pipeline.evaluation.scoring import recommender_ranks
from friendrec.pipeline.evaluation.tasks import LEVELS, STATES, Exclusions, scored_events
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.protocol import Queries, take_rows
from tests.pipeline.evaluation import null
from tests.pipeline.retrieval.contract import make_queries


@dataclass(frozen=True)
class RecentAnswers:
    """Knows who had contacted the actor, and prefers the latest: the baseline `contacted_by order` as a model.

    Scores are whole numbers: the place in which each user first contacted the actor.
    """

    data: PreparedData
    log: list[tuple[NDArray[np.int64], NDArray[np.int64]]]

    @property
    def retriever(self) -> ExactIndex:
        candidates = self.data.num_train_users
        return ExactIndex(np.zeros((candidates, 1), np.float32), np.arange(candidates))

    def queries(self, actors: NDArray[np.int64], as_of: NDArray[np.int64]) -> Queries:
        self.log.append((actors, as_of))
        offsets, ids = FirstContacts.contacted_by(self.data).before(actors, as_of)
        bonus = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets)) + 1.0
        kept = np.flatnonzero(ids < self.data.num_train_users)
        cut = np.searchsorted(kept, offsets)
        nobody = np.zeros(len(actors) + 1, np.int64)
        vector = np.ones((len(actors), 1), np.float32)
        return Queries(vector, cut, ids[kept], bonus[kept].astype(np.float32), nobody, nobody[:0])


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("block", [1, 7, 1024])
def test_ranks_equal_one_question_at_a_time(state: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "BLOCK_QUERIES", block)
    data = null.prepared(null.random_log(0, users=20, events=400, moments=150))
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "test", exclusions)
    model = RecentAnswers(data, [])
    advanced: list[int] = []
    ranks = recommender_ranks(data, events, exclusions, model, state, advanced.append)
    assert sum(advanced) == len(events.index)
    asked = [(a, t) for actors, times in model.log for a, t in zip(actors.tolist(), times.tolist(), strict=True)]
    assert len(set(asked)) == len(asked), "events of an actor that share a timestamp share a query"
    for e in range(len(events.index)):
        one = events.take(np.array([e]))
        as_of = one.timestamp if state == "live" else np.array([data.train_until])
        for level in range(LEVELS):
            if not events.at_level(level)[e]:
                assert np.isnan(ranks[level, e])
                continue
            queries = model.queries(one.actor, as_of).excluding(*exclusions.at(level, one.actor, one.timestamp))
            assert ranks[level, e] == model.retriever.rank(queries, one.target)[0]


def test_a_model_that_knows_what_a_baseline_knows_scores_the_same() -> None:
    """Everyone contacts an actor at most once, so the order of first contact is that of `reciprocity`."""
    rng = np.random.default_rng(0)
    pairs = np.argwhere(~np.eye(15, dtype=bool))
    actor, target = rng.permutation(pairs).T
    data = null.prepared((actor, target, np.full(len(actor), "message"), np.arange(len(actor))))
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "test", exclusions)
    for state in STATES:
        expected = baseline_ranks(data, events, exclusions, state)[0]["reciprocity"]
        np.testing.assert_array_equal(
            recommender_ranks(data, events, exclusions, RecentAnswers(data, []), state), expected
        )


@dataclass(frozen=True)
class SearchOnly:
    """An index that can be searched, and cannot rank."""

    index: ExactIndex

    def search(self, queries: Queries, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return self.index.search(queries, k)


@pytest.mark.parametrize("depth", [5, 20, 100])
def test_without_a_full_ranking_a_rank_is_the_place_among_those_found(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole ranks where ties share places within the depth; targets excluded by their own query count as allowed."""
    monkeypatch.setattr(scoring, "SEARCH_DEPTH", depth)
    rng = np.random.default_rng(depth)
    vectors = rng.integers(-9, 10, (60, 3)).astype(np.float32)
    excluded = [np.sort(rng.permutation(60)[:20]).tolist() for _ in range(50)]
    queries = make_queries(rng.standard_normal((50, 3)).astype(np.float32), excluded=excluded)
    index, targets = ExactIndex(vectors, np.arange(60)), rng.integers(0, 60, 50)
    assert any(target in mine for target, mine in zip(targets, excluded, strict=True))
    full = index.rank(queries, targets)
    ranks = scoring.target_ranks(SearchOnly(index), queries, targets)
    assert np.array_equal(scoring.target_ranks(index, queries, targets), full)
    inside = full <= depth - 0.5  # a tie that the depth cuts in two is left out of the question
    assert inside.any() and np.array_equal(ranks[inside], full[inside])
    assert np.isinf(ranks[full > depth + 0.5]).all()


def test_take_rows_gathers_jagged_rows() -> None:
    offsets, where = take_rows(np.array([0, 2, 2, 5]), np.array([2, 0, 1, 2]))
    assert offsets.tolist() == [0, 3, 5, 5, 8]
    assert where.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
