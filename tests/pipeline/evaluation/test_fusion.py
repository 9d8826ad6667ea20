"""Merged lists against fractions in dictionaries, one question at a time."""

from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation import scoring
from friendrec.pipeline.evaluation.fusion import EQUAL, WEIGHTS, fused_places, ranks_beside, weighted
from friendrec.pipeline.evaluation.ranking import score
from friendrec.pipeline.evaluation.results import ALSO, FUSION, MODEL, Evaluation, results
from friendrec.pipeline.evaluation.scoring import recommender_ranks
from friendrec.pipeline.evaluation.tasks import LEVEL, LEVELS, STATES, TASKS, Exclusions, scored_events
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.protocol import Queries
from tests.pipeline.evaluation import null
from tests.pipeline.evaluation.test_scoring import RecentAnswers, SearchOnly

CANDIDATES = 12


def padded(*lists: list[int]) -> NDArray[np.int64]:
    return np.array([[*found, *[-1] * (CANDIDATES - len(found))] for found in lists])


def place(first: list[int], second: list[int], target: int, weight: Fraction) -> float:
    """The twin: exact scores of a dictionary, 1 + higher + half of the others tied."""
    scores: dict[int, Fraction] = defaultdict(Fraction)
    for share, found in ((weight, first), (1 - weight, second)):
        for place, v in enumerate(found, 1):
            scores[v] += share * Fraction(1, 60 + place)
    if not scores[target]:
        return inf
    higher = sum(other > scores[target] for other in scores.values())
    return 1 + higher + (sum(other == scores[target] for other in scores.values()) - 1) / 2


def test_places_worked_by_hand() -> None:
    # Halves: 1 has .5/62 + .5/61, 3 has .5/61, 2 has .5/62, and 5 is in neither list.
    first, second = padded([3, 1]), padded([1, 2])
    found = {v: fused_places(first, second, np.array([v]), np.array([0.5]), CANDIDATES)[0, 0] for v in (1, 3, 2, 5)}
    assert found == {1: 1, 3: 2, 2: 3, 5: inf}
    # Nine tenths to the first: 3 has .9/61 = .01475, 1 has .9/62 + .1/61 = .01616, 2 has .1/62.
    assert [fused_places(first, second, np.array([v]), np.array([0.9]), CANDIDATES)[0, 0] for v in (1, 3)] == [1, 2]
    # All to the first: what the second alone holds is not found. None to it: the second's own order.
    assert fused_places(first, second, np.array([2]), np.array([1.0, 0.0]), CANDIDATES)[0].tolist() == [inf, 2]
    # Two that swap their places in lists of equal weight share one.
    assert fused_places(padded([7, 8]), padded([8, 7]), np.array([8]), np.array([0.5]), CANDIDATES)[0, 0] == 1.5


some_list = st.lists(st.integers(0, CANDIDATES - 1), max_size=CANDIDATES, unique=True)


@given(st.lists(st.tuples(some_list, some_list, st.integers(0, CANDIDATES - 1)), min_size=1, max_size=5))
@settings(deadline=None)
def test_places_equal_the_twin(asked: list[tuple[list[int], list[int], int]]) -> None:
    first, second, targets = zip(*asked, strict=True)
    weights = [Fraction(1, 2), Fraction(0), Fraction(1), Fraction(3, 10), Fraction(9, 10)]
    found = fused_places(
        padded(*first), padded(*second), np.array(targets), np.array([float(w) for w in weights]), CANDIDATES
    )
    for q, (one, other, target) in enumerate(asked):
        # Scores of distinct fractions that a double cannot tell apart do not occur among so few.
        assert found[q].tolist() == [place(one, other, target, weight) for weight in weights]


@dataclass(frozen=True)
class Taste:
    """A fixed liking of every candidate, the same for all actors but for a little of their own."""

    data: PreparedData

    @property
    def retriever(self) -> SearchOnly:
        vectors = np.random.default_rng(5).permuted(np.arange(float(self.data.num_train_users)))
        return SearchOnly(ExactIndex(np.stack([vectors, vectors**2 % 7], axis=1).astype(np.float32), vectors))

    def queries(self, actors: NDArray[np.int64], as_of: NDArray[np.int64]) -> Queries:
        return Queries.dense(np.stack([np.ones(len(actors)), 1 + actors % 3], axis=1).astype(np.float32))


def test_two_side_by_side_are_what_each_is_alone_and_a_merger_of_what_each_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exclusions are inside each search, so that no place of a list is taken by somebody who is hidden."""
    monkeypatch.setattr(scoring, "BLOCK_QUERIES", 7)
    monkeypatch.setattr(scoring, "SEARCH_DEPTH", 8)
    data = null.prepared(null.random_log(0, users=20, events=400, moments=150))
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "validation", exclusions)
    models = RecentAnswers(data, []), Taste(data)
    for state in STATES:
        ranks = ranks_beside(data, events, exclusions, models, state)
        for method, model in zip((MODEL, ALSO), models, strict=True):
            np.testing.assert_array_equal(ranks[method], recommender_ranks(data, events, exclusions, model, state))
        halves = [
            ranks_beside(data, events, exclusions, models, state, share=slice(which, None, 2))[FUSION]
            for which in (0, 1)
        ]
        np.testing.assert_array_equal(np.where(np.isnan(halves[0]), halves[1], halves[0]), ranks[FUSION])
        for e in range(len(events.index)):
            one = events.take(np.array([e]))
            as_of = one.timestamp if state == "live" else np.array([data.train_until])
            for level in range(LEVELS):
                if not events.at_level(level)[e]:
                    assert np.isnan(ranks[FUSION][:, level, e]).all()
                    continue
                hidden = exclusions.at(level, one.actor, one.timestamp)
                lists = []
                for model in models:
                    ids = model.retriever.search(model.queries(one.actor, as_of).excluding(*hidden), 8)[0][0]
                    assert not set(ids.tolist()) & set(hidden[1].tolist())
                    lists.append(ids[ids >= 0].tolist())
                expected = [place(*lists, int(one.target[0]), Fraction(w, 10)) for w in (0, 5, 10)]
                assert ranks[FUSION][[0, 5, 10], level, e].tolist() == expected


def test_weights_are_chosen_on_validation_and_applied_elsewhere() -> None:
    data = null.prepared(null.random_log(0, users=20, events=400, moments=150))
    exclusions = Exclusions.of(data)
    models = RecentAnswers(data, []), Taste(data)
    parts = {}
    for period in ("validation", "test"):
        events, _ = scored_events(data, period, exclusions)
        parts[period] = score(data, events, exclusions, models[0], False, also=models[1])
    # A validation period in which 0.2 is perfect for one level, everything for another, and half for the third.
    events = parts["validation"].events
    fused = np.full((len(WEIGHTS), LEVELS, len(events.index)), 50.0)
    fused[2, 0] = fused[:, 1] = fused[EQUAL, 2] = 1
    alone = dict.fromkeys(STATES, np.full((LEVELS, len(events.index)), 5.0))
    ranks = {MODEL: alone, ALSO: alone, FUSION: dict.fromkeys(STATES, fused)}
    validation = replace(parts["validation"], ranks=ranks)
    evaluation, weights = weighted(parts["test"], validation)
    chosen = [0.2, 0.5, 0.5]
    assert weights == dict.fromkeys(STATES, chosen)
    for state in STATES:
        for level, w in enumerate((2, EQUAL, EQUAL)):
            expected = parts["test"].ranks[FUSION][state][w, level]
            np.testing.assert_array_equal(evaluation.ranks[FUSION][state][level], expected)
    assert_figures(evaluation, weights)


def test_replies_are_not_given_away_for_the_other_new_links() -> None:
    """At 0.9 replies lose a half and the others win all; at 0.6 both stay, so that 0.6 it is."""
    data = null.prepared(null.random_log(0, users=40, events=800))
    events, _ = scored_events(data, "validation", Exclusions.of(data))
    replies, others = (np.flatnonzero(events.of_task(task)) for task in ("reply", "unprompted_link"))
    assert 1 < len(replies) < len(others)
    fused = np.full((len(WEIGHTS), LEVELS, len(events.index)), 50.0)
    fused[6, 1, replies] = fused[9, 1, replies[::2]] = fused[9, 1, others] = fused[6, 1, others[::2]] = 1
    alone = np.full((LEVELS, len(events.index)), 50.0)
    alone[1, replies] = alone[1, others[::2]] = 1
    ranks = {MODEL: dict.fromkeys(STATES, alone), ALSO: dict.fromkeys(STATES, alone)}
    evaluation = Evaluation(events, ranks | {FUSION: dict.fromkeys(STATES, fused)})
    _, weights = weighted(evaluation, evaluation)
    assert weights["live"][1] == 0.6
    recall = {w: (fused[w, 1, events.is_new] <= 10).mean() for w in (6, 9)}
    assert recall[9] > recall[6], "by new links alone 0.9 would be the best"


def assert_figures(evaluation: Evaluation, weights: dict[str, list[float]]) -> None:
    said = results(evaluation, "taste", weights)
    assert list(said["beside"]) == ["taste", "fusion"]
    assert said["baselines"] == {}
    for task in TASKS:
        for state in STATES:
            recall = {
                method: float((evaluation.of(method, task, state) <= 10).mean()) for method in (MODEL, ALSO, FUSION)
            }
            fusion, better = said["beside"]["fusion"][task][state], max(recall[MODEL], recall[ALSO])
            assert said["tasks"][task][state]["recall@10"] == recall[MODEL]
            assert said["beside"]["taste"][task][state]["recall@10"] == recall[ALSO]
            assert "mrr" not in fusion and "recall@100" in fusion, "places beyond the lists are unknown"
            assert fusion["recall@10"] == recall[FUSION]
            assert fusion["difference"] == pytest.approx(recall[FUSION] - better)
            assert fusion["better"] == ("model" if recall[MODEL] >= recall[ALSO] else "taste")
            assert fusion["weight"] == weights[state][LEVEL[task]]
            assert fusion["difference_ci"][0] <= fusion["difference"] <= fusion["difference_ci"][1]
