"""Baselines against their definitions, against the reference scores, and against chance; and none looks ahead."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation.baselines import BASELINES, PAIR_SCORES, baseline_ranks, event_stream
from friendrec.pipeline.evaluation.metrics import summary
from friendrec.pipeline.evaluation.tasks import LEVEL, LEVELS, PERIODS, STATES, TASKS, Exclusions, scored_events
from tests.pipeline.evaluation import null
from tests.pipeline.evaluation.test_tasks import ACTIONS
from tests.synthetic import prepared_from_events, prepared_from_parquet


def score(name: str, past: list[tuple[int, int, int]], window: int, actor: int, candidate: int) -> int:
    """The definitions of the baselines, word by word, over the events (actor, target, time) so far; 0 is never."""
    sent = [t for a, b, t in past if a == candidate]
    received = [t for a, b, t in past if b == candidate]
    to = [t for a, b, t in past if (a, b) == (actor, candidate)]
    back = [t for a, b, t in past if (a, b) == (candidate, actor)]
    met = {
        user: {a + b - user for a, b, t in past if user in (a, b)} for user in {u for a, b, t in past for u in (a, b)}
    }
    shared = met.get(actor, set()) & met.get(candidate, set())
    return {
        "popularity": len(received),
        "recent_popularity": sum(b == candidate for a, b, t in past[max(0, len(past) - window) :]),
        "last_received": max(received, default=0),
        "last_sent": max(sent, default=0),
        "last_active": max(sent + received, default=0),
        "recent_contacts": max(to, default=0),
        "contact_frequency": len(to),
        "reciprocity": max(back, default=0),
        "last_interaction": max(to + back, default=0),
        "common_neighbours": len(shared),
        "adamic_adar": round(1e6 * sum(1 / np.log(len(met[user])) for user in shared if len(met[user]) > 1)),
    }[name]


def key(names: tuple[str, ...], *context: object) -> list[int]:
    """What candidates are sorted by: scores up to the first pair score that is not 0."""
    values: list[int] = []
    for name in names:
        decided = any(values[i] and names[i] in PAIR_SCORES for i in range(len(values)))
        values.append(0 if decided else score(name, *context))  # type: ignore[arg-type]
    return values


def small_log(seed: int) -> PreparedData:
    """Nine users, 90 events at few distinct times, of which some users come late."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(1, 40, 90))
    actor, target = (rng.integers(0, 6 + time // 13) for _ in range(2))
    return prepared_from_events(actor, target, None, time, splits=(60, 80))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("seed", range(4))
def test_ranks_equal_the_definitions(seed: int, state: str) -> None:
    data = small_log(seed)
    exclusions = Exclusions.of(data)
    stream = event_stream(data)
    times = data.timestamp[data.event_entry]
    everything = list(zip(stream.actor.tolist(), stream.target.tolist(), times.tolist(), strict=True))
    for period in PERIODS:
        events, _ = scored_events(data, period, exclusions)
        ranks, allowed = baseline_ranks(data, events, exclusions, state)
        for e, (actor, target, now) in enumerate(zip(events.actor, events.target, events.timestamp, strict=True)):
            past = [x for x in everything if x[2] < (now if state == "live" else data.train_until)]
            for level in range(LEVELS):
                if not events.at_level(level)[e]:
                    assert all(np.isnan(ranks[name][level, e]) for name in BASELINES)
                    continue
                hidden = exclusions.at(level, events.actor[e : e + 1], events.timestamp[e : e + 1])[1].tolist()
                others = [v for v in range(data.num_train_users) if v not in hidden and v != target]
                assert allowed[level, e] == len(others) + 1
                for name, names in BASELINES.items():
                    context = past, data.num_train_events // 10, actor
                    mine = key(names, *context, target)
                    theirs = [key(names, *context, v) for v in others]
                    expected = 1 + sum(k > mine for k in theirs) + sum(k == mine for k in theirs) / 2
                    assert ranks[name][level, e] == expected, (name, level, e)


def test_blocks_hide_from_baselines_too(tmp_path: Path) -> None:
    """Users 1, 2, 3 are tied for 0; who is blocked leaves the ranking, contact or not."""
    log = [(4, v, "say", 1) for v in (1, 2, 3)] + [(0, 4, "say", 2), (0, 2, "block", 3), (0, 4, "block", 3)]
    actor, target, action, time = zip(*log, (0, 1, "say", 4), (0, 3, "say", 5), strict=True)
    data = prepared_from_events(actor, target, action, time, roles={"block": "exclude"}, splits=(70, 84), path=tmp_path)
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "validation", exclusions)
    ranks, allowed = baseline_ranks(data, events, exclusions, "live")
    assert allowed[0].tolist() == [2]
    assert ranks["popularity"][0].tolist() == [1.5]
    assert ranks["recent_contacts"][0].tolist() == [1.5]


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
    """To the last digit that baselines.json gives."""
    reference = json.loads((shared_data / "baselines.json").read_text())["sets"][name]
    data = prepared_from_parquet(shared_data / f"{name}.parquet", ACTIONS.get(name))
    exclusions = Exclusions.of(data)
    for period in PERIODS:
        events, _ = scored_events(data, period, exclusions)
        for state in STATES:
            for baseline, ranks in baseline_ranks(data, events, exclusions, state)[0].items():
                for task in TASKS:
                    found = summary(ranks[LEVEL[task]][events.of_task(task)])
                    for metric, value in found.items():
                        rounding = 0.051 if metric == "mean_rank" else 5.1e-5
                        expected = reference[period][state][task][baseline][metric]
                        assert value == pytest.approx(expected, abs=rounding), (period, state, task, baseline, metric)


@pytest.mark.parametrize(
    "log",
    [null.random_log(0), null.random_log(1, moments=1500), null.telling_log(2)],
    ids=["random", "tied", "telling"],
)
def test_baselines_score_chance_where_there_is_nothing_to_know(log: null.Log) -> None:
    data = null.prepared(log)
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "test", exclusions)
    comparisons = len(BASELINES) * len(STATES) * len(null.NULL_TASKS)
    for state in STATES:
        ranks, _ = baseline_ranks(data, events, exclusions, state)
        for task in null.NULL_TASKS:
            candidates = null.allowed(data, events, exclusions, task)
            for name in BASELINES:
                placed = ranks[name][LEVEL[task], events.of_task(task)]
                null.assert_chance(placed, candidates, comparisons, f"{name}, {task}, {state}")


@given(seed=st.integers(0, 2**20), place=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_nothing_at_or_after_an_event_moves_its_rank(seed: int, place: float) -> None:
    actor, target, _, time = null.random_log(seed, users=12, events=150, moments=60)
    action = np.array([f"event{k:03}" for k in range(150)])
    log = actor, target, action, time
    first = int(np.searchsorted(time, time[120]))
    chosen = first + int(place * (150 - first))
    ranks = [_ranks_of(log, chosen), _ranks_of(null.changed_from(log, int(time[chosen]), chosen, seed), chosen)]
    assert ranks[0] == ranks[1]


def _ranks_of(log: null.Log, chosen: int) -> dict[str, list[float]]:
    """Live and frozen ranks of one event, at every level, by each baseline; empty where it is not scored."""
    data = null.prepared(log)
    exclusions = Exclusions.of(data)
    found: dict[str, list[float]] = {}
    for period in PERIODS:
        events, _ = scored_events(data, period, exclusions)
        codes = data.action[data.event_entry[events.index]]
        here = np.array([data.actions[code].name == f"event{chosen:03}" for code in codes])
        for state in STATES:
            ranks, _ = baseline_ranks(data, events, exclusions, state)
            for name in BASELINES if here.any() else ():
                found[f"{name}, {state}"] = np.nan_to_num(ranks[name][:, here], nan=-1).ravel().tolist()
    return found
