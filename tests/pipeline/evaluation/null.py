"""Logs without anything to learn, and what must follow: every method scores chance; nothing leaks from t or later."""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation.tasks import LEVEL, Events, Exclusions
from tests.synthetic import prepared_from_events

NULL_TASKS = ("next_contact", "new_link", "unprompted_link")
"""`reply` is conditioned on the answer, and so is no null task."""

Log = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.str_], NDArray[np.int64]]
"""Actors, targets, actions, timestamps (µs)."""


def random_log(seed: int, users: int = 60, events: int = 6000, moments: int | None = None) -> Log:
    """Actors of uneven activity, targets uniform over all others; few `moments` make many events share a time."""
    rng = np.random.default_rng(seed)
    actor = (users * rng.random(events) ** 2).astype(np.int64)
    target = (actor + rng.integers(1, users, events)) % users
    time = np.sort(rng.integers(0, moments or 50 * events, events)) * 60_000_000
    return actor, target, np.full(events, "message"), time


def telling_log(seed: int, users: int = 60, events: int = 6000) -> Log:
    """The same, but an event's own timestamp (its seconds) tells its target: who peeks at the event scores 1."""
    actor, target, action, time = random_log(seed, users, events)
    return actor, target, action, time + (target - actor) % users * 1_000_000


def changed_from(log: Log, moment: int, keep: int, seed: int) -> Log:
    """The log with other actors and targets in every event at or after `moment`, but for the event `keep`."""
    actor, target, action, time = (column.copy() for column in log)
    rng = np.random.default_rng(seed)
    later = (time >= moment) & (np.arange(len(time)) != keep)
    users = int(max(actor.max(), target.max())) + 2
    actor[later] = rng.integers(0, users, later.sum())
    target[later] = (actor[later] + rng.integers(1, users, later.sum())) % users
    return actor, target, action, time


def prepared(log: Log) -> PreparedData:
    return prepared_from_events(*log)


def allowed(data: PreparedData, events: Events, exclusions: Exclusions, task: str) -> NDArray[np.int64]:
    """Number of candidates in the ranking of each event of a task."""
    chosen = events.take(events.of_task(task))
    offsets, _ = exclusions.at(LEVEL[task], chosen.actor, chosen.timestamp)
    return data.num_train_users - np.diff(offsets)


def assert_chance(ranks: NDArray[np.float64], candidates: NDArray[np.int64], comparisons: int, what: str) -> None:
    """The share of candidates above the target averages one half: 99 % interval, corrected for all comparisons.

    The share is exact under ties (they are shared), where recall@10 is not.
    """
    share = (ranks - 0.5) / candidates
    half_width = NormalDist().inv_cdf(1 - 0.01 / comparisons / 2) * share.std(ddof=1) / np.sqrt(len(share))
    assert abs(share.mean() - 0.5) <= half_width, f"{what}: {share.mean():.4f} ± {half_width:.4f}"
