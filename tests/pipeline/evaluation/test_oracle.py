"""The oracle beside the baselines: ranked like them, never counted as one, and far above every one of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from friendrec.datasets.network import ACCEPT, MESSAGE, REQUEST
from friendrec.datasets.prepared import PreparedData, load_prepared
from friendrec.errors import FriendrecError
from friendrec.pipeline import evaluate, prepare, simulate
from friendrec.pipeline.evaluation.oracle import open_oracle, oracle_ranks
from friendrec.pipeline.evaluation.ranking import score
from friendrec.pipeline.evaluation.results import best_baseline, results
from friendrec.pipeline.evaluation.tasks import LEVEL, TASKS, Exclusions, scored_events


def prepared(root: Path, seed: int, **size: Any) -> Path:
    simulate.main(simulate.SimulateOptions(out=str(root / "log"), seed=seed, **size))
    roles = "block=exclude"
    prepare.main(prepare.PrepareOptions(interactions=str(root / "log"), roles=roles, out=str(root / "data")))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("simulated"), seed=1, users=300, events=3_000)


def figures(root: Path) -> tuple[PreparedData, dict[str, Any]]:
    """Live figures of the streaming baselines and of the oracle."""
    data = load_prepared(root / "data")
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "validation", exclusions)
    oracle = open_oracle(str(root / "log"), events, data)
    found = results(score(data, events, exclusions, None, baselines=True, oracle=oracle))
    return data, found["baselines"]


@pytest.mark.long
def test_evaluate_shows_it_beside_the_baselines(root: Path, tmp_path: Path) -> None:
    options = evaluate.EvaluateOptions(
        data=str(root / "data"), baselines=True, oracle=str(root / "log"), out=str(tmp_path / "report")
    )
    evaluate.main(options)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    for task in TASKS:
        oracle, best = metrics["baselines"]["oracle"][task], metrics["tasks"][task]["live"]["best_baseline"]["name"]
        assert best != "oracle"
        assert oracle["live"]["recall@10"] >= metrics["baselines"][best][task]["live"]["recall@10"]
        assert oracle["frozen"] == {}
    assert ">oracle</td>" in (tmp_path / "report" / "report.html").read_text()


def test_ranks_are_places_among_the_allowed(root: Path) -> None:
    """Twin: sort the allowed candidates by their rates, read from the log alone who is allowed, and count."""
    data = load_prepared(root / "data")
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "validation", exclusions)
    events = events.take(np.arange(0, len(events.index), 7))
    log = open_oracle(str(root / "log"), events, data)
    ranks = oracle_ranks(data, events, exclusions, open_oracle(str(root / "log"), events, data))
    table = pq.read_table(root / "log" / "interactions").to_pylist()
    candidates = set(data.user_ids[: data.num_train_users].tolist())
    row = {user: place for place, user in enumerate(log.oracle.population.user_id.tolist())}
    for e, (actor, target, time) in enumerate(zip(events.actor, events.target, events.timestamp, strict=True)):
        u, v = data.user_ids[actor], data.user_ids[target]
        past = [event for event in table if event["timestamp"].timestamp() * 1e6 < time - 0.5]
        sent = {event["target_id"] for event in past if event["actor_id"] == u}
        received = {event["actor_id"] for event in past if event["target_id"] == u}
        blocked = {
            other
            for event in past
            if event["action"] == "block" and u in (event["actor_id"], event["target_id"])
            for other in (event["actor_id"], event["target_id"])
        }
        log.oracle.replay(len(past))
        rates = log.oracle.rates(row[u], log.oracle.events.time[len(past)])[[ACCEPT, MESSAGE, REQUEST]].sum(axis=0)
        for level, hidden in enumerate((blocked, blocked | sent, blocked | sent | received)):
            if not np.isnan(ranks[level, e]):
                others = [rates[row[w]] for w in candidates - hidden - {u, v}]
                mine = rates[row[v]]
                expected = 1 + sum(rate > mine for rate in others) + sum(rate == mine for rate in others) / 2
                assert ranks[level, e] == expected, (e, level)
    assert (~np.isnan(ranks)).any(axis=1).all()


def test_events_that_nothing_predicts_do_not_count(root: Path, tmp_path: Path) -> None:
    """With requests as history only, nobody whom the actor could but ask is ahead of one who waits for an answer."""
    prepare.main(
        prepare.PrepareOptions(
            interactions=str(root / "log"), roles="block=exclude,request=history", out=str(tmp_path / "data")
        )
    )
    data = load_prepared(tmp_path / "data")
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "validation", exclusions)
    ranks = oracle_ranks(data, events, exclusions, open_oracle(str(root / "log"), events, data))
    waiting = exclusions.contacted_by.degrees(events.actor, events.timestamp)
    reply = events.of_task("reply")
    assert reply.sum() > 20
    assert (ranks[LEVEL["reply"], reply] <= waiting[reply]).all()


def test_another_log_is_refused(root: Path, tmp_path: Path) -> None:
    for name, options in {
        "seed": {"users": 300, "events": 3_000, "seed": 2},
        "size": {"users": 100, "events": 3_000, "seed": 1},
    }.items():
        simulate.main(simulate.SimulateOptions(out=str(tmp_path / name), **options))
        with pytest.raises(FriendrecError, match="is not the log that the data was prepared from"):
            evaluate.main(
                evaluate.EvaluateOptions(
                    data=str(root / "data"), baselines=True, oracle=str(tmp_path / name), out=str(tmp_path / "report")
                )
            )
    simulate.main(simulate.SimulateOptions(out=str(tmp_path / "rules"), preset="reference", users=50, events=300))
    with pytest.raises(FriendrecError, match="its probabilities are not known: leave it out"):
        evaluate.main(
            evaluate.EvaluateOptions(
                data=str(root / "data"), baselines=True, oracle=str(tmp_path / "rules"), out=str(tmp_path / "report")
            )
        )
    assert not (tmp_path / "report").exists()


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_heuristic_solves_the_simulator(seed: int, tmp_path: Path) -> None:
    """Popularity finds at most 0.3 of what the oracle finds, who answers and repeats 0.6, and any baseline 0.6."""
    data, baselines = figures(prepared(tmp_path, seed))
    degrees = np.bincount(_friends(tmp_path), minlength=data.num_users)
    assert np.median(degrees) < 20

    def recall(name: str) -> float:
        return float(baselines[name]["new_link"]["live"]["recall@10"])

    assert recall("oracle") > 0.6
    assert recall("popularity") <= 0.3 * recall("oracle")
    for name in ("hybrid", "hybrid+last_active", "reciprocity", "last_interaction", "reciprocity+recent_popularity"):
        assert recall(name) <= 0.6 * recall("oracle")
    best = best_baseline(baselines, "new_link", "live")
    assert best is not None
    assert recall(best) <= 0.6 * recall("oracle"), best


def _friends(root: Path) -> np.ndarray:
    """Both ends of every friendship."""
    log = pq.read_table(root / "log" / "interactions", filters=[("action", "==", "accept")])
    return np.concatenate([log["actor_id"].to_numpy(), log["target_id"].to_numpy()])
