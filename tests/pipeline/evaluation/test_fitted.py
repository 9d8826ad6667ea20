"""Fitted baselines: against the reference scores, a library, and what they may know."""

import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation import fitted
from friendrec.pipeline.evaluation.fitted import FITTED_BASELINES, fitted_ranks, missing_baselines, pagerank
from friendrec.pipeline.evaluation.metrics import summary
from friendrec.pipeline.evaluation.tasks import LEVEL, LEVELS, TASKS, Exclusions, scored_events
from tests.pipeline.evaluation import null
from tests.pipeline.evaluation.test_tasks import ACTIONS
from tests.synthetic import prepared_from_parquet

TOLERANCE = {"als": 0.01, "bpr": 0.01, "personalised_pagerank": 0.0001}


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return null.prepared(null.random_log(0, users=30, events=300))


@pytest.mark.parametrize(
    "name",
    [
        "bitcoin_otc",
        "collegemsg",
        pytest.param("email_eu_core", marks=pytest.mark.long),
        pytest.param("mathoverflow", marks=pytest.mark.long),
    ],
)
def test_scores_equal_the_reference(name: str, shared_data: Path) -> None:
    """Shares within the stated tolerance, the mean rank within as much of the candidates."""
    reference = json.loads((shared_data / "baselines.json").read_text())["sets"][name]
    data = prepared_from_parquet(shared_data / f"{name}.parquet", ACTIONS.get(name))
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "test", exclusions)
    ranks = fitted_ranks(data, events, exclusions)
    assert set(ranks) == set(FITTED_BASELINES) - missing_baselines().keys()
    for task in TASKS:
        for baseline, placed in ranks.items():
            expected = reference["test"]["frozen_fitted"][task][baseline]
            for metric, value in summary(placed[LEVEL[task], events.of_task(task)]).items():
                tolerance = TOLERANCE[baseline] * (data.num_train_users if metric == "mean_rank" else 1)
                assert value == pytest.approx(expected[metric], abs=tolerance), (task, baseline, metric)


def test_pagerank_is_that_of_networkx(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until it settles; the library's `alpha` is the chance to go on."""
    monkeypatch.setattr(fitted, "STEPS", 15)
    train = data.event_entry[: data.num_train_events]
    users = np.searchsorted(data.offsets, train, side="right") - 1
    graph = nx.Graph(zip(users.tolist(), data.partner[train].tolist(), strict=True))
    for actor in (0, 7):
        expected = nx.pagerank(graph, alpha=0.85, personalization={actor: 1}, tol=1e-9)
        found = pagerank(data)(np.array([actor]))[0]
        assert np.abs(found - [expected.get(w, 0) for w in range(data.num_train_users)]).max() < 0.85**15
        assert found.sum() == pytest.approx(1, abs=1e-5)


def test_ranks_equal_a_count_by_hand(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores with many ties, blocks of three actors."""
    monkeypatch.setattr(fitted, "BLOCK_ACTORS", 3)
    table = np.random.default_rng(0).integers(0, 4, (data.num_users, data.num_train_users)).astype(np.float32)
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "test", exclusions)
    ranks = fitted.ranks_by_scores(events, exclusions, lambda actors: table[actors])
    for level in range(LEVELS):
        asking = events.at_level(level)
        assert np.isnan(ranks[level, ~asking]).all()
        for e in np.flatnonzero(asking):
            one = events.take(np.array([e]))
            hidden = exclusions.at(level, one.actor, one.timestamp)[1]
            others = np.setdiff1d(np.arange(data.num_train_users), [*hidden, one.target[0]])
            row = table[one.actor[0]]
            mine = row[one.target[0]]
            assert ranks[level, e] == 1 + (row[others] > mine).sum() + (row[others] == mine).sum() / 2


def test_nothing_after_the_train_period_moves_a_score() -> None:
    """Actors of later events swap places; the users, whose number the seed's draws depend on, stay the same."""
    log = null.random_log(3, users=20, events=400)
    data = null.prepared(log)
    actor, target, action, time = (column.copy() for column in log)
    later = time >= data.train_until
    actor[later], target[later] = target[later], actor[later]
    changed = null.prepared((actor, target, action, time))
    assert np.array_equal(data.user_ids, changed.user_ids)
    everyone = np.arange(data.num_users)
    assert np.array_equal(pagerank(data)(everyone), pagerank(changed)(everyone))
    for name in {"als", "bpr"} - missing_baselines().keys():
        scores = [fitted.factorised(d, name)(everyone) for d in (data, changed)]
        assert np.array_equal(*scores), name


def test_without_the_package_the_rest_is_there(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitted, "find_spec", lambda name: None)
    assert missing_baselines().keys() == {"als", "bpr"}
    assert all("pip install" in reason for reason in missing_baselines().values())
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "test", exclusions)
    assert set(fitted_ranks(data, events, exclusions)) == {"personalised_pagerank"}
