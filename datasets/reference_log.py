"""A log by the rules of the concept repository's generator, so that its table can be made again on any seed.

An actor u is drawn with weight 1 + f_u, f being follows received so far, and a target v with weight

    (1 + f_v) · 2 if u and v are of one community · 0.1 if u follows v already        v ≠ u.

Drawing from an urn that holds every user once, and once more for each follow received, gives 1 + f; accepting a
target with its other factors over their greatest product gives the rest. So a draw costs the same at any size.

These rules hold hardly anything to learn but popularity. The presets `regular` and `4x` are the ones to learn from.
"""

from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from friendrec.datasets.simulator import DAY_US, END_US, as_timestamps, check_size

ACTIONS = ("comment", "follow", "like", "share")
FOLLOW = ACTIONS.index("follow")
ACTION_WEIGHTS = np.array([0.2, 0.4, 0.3, 0.1])
COMMUNITY_SIZE = 20
SAME_COMMUNITY, FOLLOWED = 2.0, 0.1
"""Factors of a target's weight."""
YEAR, NEAR, NEAR_SHARE = 365.0, 2.0, 0.3
"""Days of the log; a share of the events lies within so many days of the event drawn before."""


class ReferenceLog(NamedTuple):
    """A log and the communities behind it."""

    interactions: pa.Table
    """actor_id int64, target_id int64, action dictionary, timestamp us UTC; ascending in time."""
    truth: pa.Table
    """user_id int64, community int64."""


def reference_log(users: int, events: int, seed: int) -> ReferenceLog:
    """A log of exactly `events` events among users 0 to `users` - 1; the same arguments give the same tables.

    Times are drawn first, and events happen in their order.

    >>> reference_log(users=2_000, events=20_000, seed=0).interactions.num_rows
    20000
    """
    check_size(users, events, seed)
    rng = np.random.default_rng(seed)
    community = rng.integers(max(1, users // COMMUNITY_SIZE), size=users)
    action = rng.choice(len(ACTIONS), events, p=ACTION_WEIGHTS).astype(np.int8)
    time = (np.sort(draw_days(events, rng)) * DAY_US).astype(np.int64)
    actor, target = draw_pairs(community, action, rng)
    interactions = {
        "actor_id": actor,
        "target_id": target,
        "action": pa.DictionaryArray.from_arrays(action, pa.array(ACTIONS)),
        "timestamp": as_timestamps(END_US - int(YEAR) * DAY_US + time),
    }
    return ReferenceLog(pa.table(interactions), pa.table({"user_id": np.arange(users), "community": community}))


@numba.njit(cache=True)
def draw_days(events: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Days since the log's beginning in the order drawn, `[events]`: uniform in the year or near the one before."""
    days = np.empty(events)
    for i in range(events):
        first, last = 0.0, YEAR
        if i > 0 and rng.random() < NEAR_SHARE:
            first, last = max(first, days[i - 1] - NEAR), min(last, days[i - 1] + NEAR)
        days[i] = rng.uniform(first, last)
    return days


@numba.njit(cache=True)
def draw_pairs(
    community: NDArray[np.int64], action: NDArray[np.int8], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Actor and target of each event `[events]`, given its action."""
    users, events = len(community), len(action)
    urn = np.empty(users + events, np.int64)
    urn[:users] = np.arange(users)
    held = users
    followed = {np.int64(-1)}
    actors, targets = np.empty(events, np.int64), np.empty(events, np.int64)
    for i in range(events):
        u = urn[rng.integers(0, held)]
        while True:
            v = urn[rng.integers(0, held)]
            factor = SAME_COMMUNITY if community[u] == community[v] else 1.0
            if u * users + v in followed:
                factor *= FOLLOWED
            if u != v and rng.random() * SAME_COMMUNITY < factor:
                break
        if action[i] == FOLLOW:
            urn[held] = v
            held += 1
            followed.add(u * users + v)
        actors[i], targets[i] = u, v
    return actors, targets
