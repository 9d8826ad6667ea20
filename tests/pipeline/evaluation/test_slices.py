"""Which slice an event is in, by looking at the log, and that the figures of slices add up to those of the whole."""

import networkx as nx
import numpy as np
import pytest

from friendrec.datasets.contacts import FirstContacts
from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation.baselines import event_stream
from friendrec.pipeline.evaluation.intervals import bootstrap_means
from friendrec.pipeline.evaluation.ranking import score
from friendrec.pipeline.evaluation.results import results
from friendrec.pipeline.evaluation.slices import DISTANCES, degree_deciles, slicings
from friendrec.pipeline.evaluation.tasks import STATES, TASKS, Events, Exclusions, scored_events
from tests.pipeline.evaluation import null
from tests.synthetic import prepared_from_events


@pytest.fixture(scope="module")
def data() -> PreparedData:
    actor, target, _, time = null.random_log(0, users=60, events=500, moments=200)
    action = np.where(np.arange(500) % 3 == 0, "like", "say")
    return prepared_from_events(actor, target, action, time)


@pytest.fixture(scope="module")
def events(data: PreparedData) -> Events:
    return scored_events(data, "test", Exclusions.of(data))[0]


def test_every_event_is_in_the_slice_that_the_log_says(data: PreparedData, events: Events) -> None:
    cut = slicings(data, events)
    stream, times = event_stream(data), data.timestamp[data.event_entry]
    log = list(zip(stream.actor.tolist(), stream.target.tolist(), times.tolist(), strict=True))
    names = lambda name, state, e: cut[name].names[cut[name].of[state][e]]  # noqa: E731
    for state in STATES:
        for e, (actor, target, now) in enumerate(zip(events.actor, events.target, events.timestamp, strict=True)):
            past = [event for event in log if event[2] < (now if state == "live" else data.train_until)]
            train = [event for event in log if event[2] < data.train_until]
            graph = nx.Graph([event[:2] for event in past])
            graph.add_nodes_from([actor, target])
            steps = min(nx.single_source_shortest_path_length(graph, actor).get(target, 3), 3)
            assert names("distance", state, e) == DISTANCES[steps - 1]
            known = sum(actor in event[:2] for event in past)
            first, _, last = names("history_length", state, e).replace("+", "-9999").partition("-")
            assert int(first) <= known <= int(last or first)
            assert names("action", state, e) == data.actions[data.action[data.event_entry[events.index[e]]]].name
            assert names("new_actor", state, e) == ("no" if any(actor in event[:2] for event in train) else "yes")
            assert names("new_target", state, e) == ("no" if any(event[1] == target for event in train) else "yes")


def test_deciles_are_tenths_by_degree() -> None:
    """Twenty users on a star of chains: degrees are known, ties stay together."""
    pairs = [(a, b) for a in range(20) for b in range(a)]
    actor, target = np.array(pairs).T
    data = null.prepared((actor, target, np.full(len(pairs), "say"), np.arange(len(pairs))))
    met = FirstContacts.met(data)
    deciles = degree_deciles(data, met)
    candidates = np.arange(data.num_train_users)
    degree = met.degrees(candidates, np.full(len(candidates), data.train_until))
    assert (np.diff(deciles[np.argsort(degree, kind="stable")]) >= 0).all()
    assert all(len(set(deciles[degree == d])) == 1 for d in degree)
    assert 0 <= deciles.min() <= deciles.max() <= 9


def test_slices_add_up(data: PreparedData, events: Events) -> None:
    evaluation = score(data, events, Exclusions.of(data), None, baselines=True)
    metrics = results(evaluation)
    for parts in metrics["slices"].values():
        for task in TASKS:
            for state in STATES:
                figures = [part[task][state] for part in parts.values()]
                assert sum(part["events"] for part in figures) == metrics["tasks"][task]["events"]
                best = metrics["tasks"][task][state]["best_baseline"]["name"]
                whole = metrics["baselines"][best][task][state]["recall@10"] * metrics["tasks"][task]["events"]
                filled = [part for part in figures if part["events"]]
                assert sum(p["events"] * p["best_baseline_recall@10"] for p in filled) == pytest.approx(whole)
                for part in filled:
                    low, high = part["best_baseline_recall@10_ci"]
                    assert 0 <= low <= part["best_baseline_recall@10"] <= high <= 1


def test_intervals_of_a_part_are_those_of_its_events_drawn_with_the_whole() -> None:
    rng = np.random.default_rng(0)
    actors, values = rng.integers(0, 20, 200), rng.random((200, 1))
    inside = rng.random((200, 2)) < [0.5, 1]
    means = bootstrap_means(np.repeat(values, 2, axis=1), actors, inside)
    assert np.array_equal(means[:, 1:], bootstrap_means(values, actors))
    slow = np.array([
        values[chosen][inside[chosen, 0]].mean()
        for chosen in (
            np.concatenate([np.flatnonzero(actors == a) for a in rng.integers(0, 20, 20)]) for _ in range(1000)
        )
    ])  # fmt: skip
    assert np.quantile(means[:, 0], [0.025, 0.975]) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.02)
