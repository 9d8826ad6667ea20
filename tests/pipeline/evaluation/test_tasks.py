"""Who is asked and who is excluded, on a log small enough to check by eye, and the counts on the public logs."""

import json
from pathlib import Path

import numpy as np
import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline.evaluation.tasks import LEVEL, PERIODS, TASKS, Exclusions, scored_events
from tests.synthetic import prepared_from_events, prepared_from_parquet

ACTIONS = {"bitcoin_otc": ("trust",)}
"""Actions of a public log that its reference scores are about, where not all."""


def test_tasks_of_a_small_log() -> None:
    """Train a→b, b→c, c→a, d→a; then at one moment a→b again, a→c, c→d, b→e (e is new); later c→d again, d→c."""
    log = [
        ("a", "b", 1), ("b", "c", 2), ("c", "a", 3), ("d", "a", 4),
        ("a", "b", 9), ("a", "c", 9), ("c", "d", 9), ("b", "e", 9), ("c", "d", 10), ("d", "c", 10),
    ]  # fmt: skip
    actor, target, time = zip(*log, strict=True)
    data = prepared_from_events(actor, target, None, time, splits=(40, 100 - 1))
    assert data.num_train_users == 4
    exclusions = Exclusions.of(data)
    names = lambda rows: [data.user_ids[row] for row in rows]  # noqa: E731
    events, counts = scored_events(data, "validation", exclusions)
    pairs = list(zip(names(events.actor), names(events.target), strict=True))
    assert pairs == [("a", "b"), ("a", "c"), ("c", "d")]
    assert counts == {"events": 4, "uncovered": 1, "next_contact": 3, "new_link": 2, "reply": 1, "unprompted_link": 1}
    of_task = {task: [pair for pair, is_in in zip(pairs, events.of_task(task), strict=True) if is_in] for task in TASKS}
    assert of_task["new_link"] == [("a", "c"), ("c", "d")]
    assert of_task["reply"] == [("a", "c")]
    events, counts = scored_events(data, "test", exclusions)
    assert counts["new_link"] == counts["reply"] == 1, "c→d is old by then, and d→c answers it"
    hidden = {level: exclusions.at(level, events.actor[:1], events.timestamp[:1])[1] for level in set(LEVEL.values())}
    assert [sorted(names(hidden[level])) for level in range(3)] == [["c"], ["a", "c", "d"], ["a", "b", "c", "d"]]


def test_only_target_actions_are_predicted_but_all_are_contacts(tmp_path: Path) -> None:
    log = [(0, 1, "accept", 1), (1, 2, "accept", 2), (2, 0, "accept", 3), (0, 2, "request", 8), (0, 2, "accept", 9)]
    actor, target, action, time = zip(*log, strict=True)
    data = prepared_from_events(actor, target, action, time, roles={"request": "history"}, splits=(60, 99))
    _, counts = scored_events(data, "test", Exclusions.of(data))
    assert counts["events"] == counts["next_contact"] == 1
    assert counts["new_link"] == 0, "the request was the first contact"
    with pytest.raises(FriendrecError, match="nothing to score"):
        scored_events(data, "validation", Exclusions.of(data))


def test_a_blocked_target_is_no_candidate(tmp_path: Path) -> None:
    log = [(0, 1, "say", 1), (1, 2, "say", 2), (2, 0, "say", 3), (1, 0, "block", 5), (2, 1, "say", 8), (0, 1, "say", 9)]
    actor, target, action, time = zip(*log, strict=True)
    data = prepared_from_events(actor, target, action, time, roles={"block": "exclude"}, splits=(60, 61), path=tmp_path)
    exclusions = Exclusions.of(data)
    _, counts = scored_events(data, "test", exclusions)
    assert counts["events"] == 2
    assert counts["uncovered"] == counts["next_contact"] == 1


@pytest.mark.parametrize("name", ["bitcoin_otc", "collegemsg", "email_eu_core", "mathoverflow"])
def test_counts_equal_the_reference(name: str, shared_data: Path) -> None:
    reference = json.loads((shared_data / "baselines.json").read_text())["sets"][name]
    data = prepared_from_parquet(shared_data / f"{name}.parquet", ACTIONS.get(name))
    assert data.num_train_users == reference["candidates"]
    for period in PERIODS:
        assert scored_events(data, period, Exclusions.of(data))[1] == reference[period]["counts"]


def test_exclusions_are_distinct_candidates() -> None:
    rng = np.random.default_rng(0)
    data = prepared_from_events(rng.integers(0, 20, 300), rng.integers(0, 20, 300), None, rng.integers(0, 90, 300))
    exclusions = Exclusions.of(data)
    actors, times = rng.integers(0, data.num_users, 50), rng.integers(0, 100, 50)
    for level in range(3):
        offsets, ids = exclusions.at(level, actors, times)
        for q, actor in enumerate(actors):
            row = ids[offsets[q] : offsets[q + 1]].tolist()
            assert len(set(row)) == len(row)
            assert (actor in row) == (actor < data.num_train_users)
            assert all(v < data.num_train_users for v in row)
