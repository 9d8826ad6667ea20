"""Simulated logs of a friend network, with the truth behind them: who joins, who they are, and what they do.

The events come from `growth`; here users are drawn, the clock is set (`clock`), and everything becomes tables.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from friendrec.datasets.clock import wall_days
from friendrec.datasets.growth import grow
from friendrec.datasets.network import ACTIONS, NetworkParameters, Population, empty_network, visit_rate
from friendrec.errors import FriendrecError

DAY_US = 86_400_000_000
END_US = 20_089 * DAY_US
"""2025-01-01 UTC: every log ends in the 24 hours before it."""
MOST = 100_000_000
"""Users and events up to this number, for which one machine needs about 15 GB."""
DEFAULTS = NetworkParameters()


@dataclass(frozen=True)
class SocialLog:
    """A simulated log and the truth behind it."""

    interactions: pa.Table
    """actor_id int64, target_id int64, action dictionary, timestamp us UTC; strictly increasing in time."""
    users: pa.Table
    """user_id int64, interest string, city string, languages list<string>; by user_id."""
    truth: pa.Table
    """user_id int64, community int64, joined timestamp us UTC, activity float64; by user_id. With `users`, all that
    was drawn of the users."""


def simulate(
    users: int,
    events: int,
    seed: int,
    parameters: NetworkParameters = DEFAULTS,
    progress: NDArray[np.int64] | None = None,
) -> SocialLog:
    """A log of exactly `events` events among `users` users; the same arguments give the same tables.

    `progress[0]`, where given, counts the events up while they happen.

    >>> simulate(users=2_000, events=20_000, seed=0).interactions.num_rows
    20000
    """
    check_size(users, events, seed)
    rng = np.random.default_rng(seed)
    population = draw_population(users, parameters, rng)
    net, rate = empty_network(population, events), visit_rate(population, events, parameters)
    actor, target, action, time = grow(
        net, rate, parameters, rng, events, np.zeros(1, np.int64) if progress is None else progress
    )

    # Distinct microseconds in the same order; then whole days are added, so that hours of the day stay as they are.
    ascending = np.arange(events)
    days = wall_days(time, parameters.rhythm)
    clock = np.maximum.accumulate((days * DAY_US).astype(np.int64) - ascending) + ascending
    start = END_US - (clock[-1] // DAY_US + 1) * DAY_US
    interactions = pa.table(
        {
            "actor_id": population.user_id[actor],
            "target_id": population.user_id[target],
            "action": pa.DictionaryArray.from_arrays(action, pa.array(ACTIONS)),
            "timestamp": as_timestamps(start + clock),
        }
    )
    truth = pa.table(
        {
            "user_id": population.user_id,
            "community": population.community,
            "joined": as_timestamps(
                start + (wall_days(population.joined, parameters.rhythm) * DAY_US).astype(np.int64)
            ),
            "activity": population.activity,
        }
    )
    return SocialLog(interactions, draw_profiles(population, rng).sort_by("user_id"), truth.sort_by("user_id"))


def check_size(users: int, events: int, seed: int) -> None:
    """Refuse what no log can be simulated of."""
    _check_range("--users", users, 2, "a friend network has at least two people")
    _check_range("--events", events, 1, "an empty log teaches nothing")
    _check_range("--seed", seed, 0, "any number from 0 is a seed")


def _check_range(option: str, value: int, least: int, reason: str) -> None:
    if not least <= value <= MOST:
        raise FriendrecError(f"{option} {value}: {reason}; give {least} to {MOST:,}")


def as_timestamps(microseconds: np.ndarray) -> pa.Array:
    """int64 microseconds since 1970 -> timestamp[us, UTC]."""
    return pa.array(microseconds).cast(pa.timestamp("us", "UTC"))


def draw_population(users: int, parameters: NetworkParameters, rng: np.random.Generator) -> Population:
    """Draw who there is, in order of joining; two users at least are founders."""
    founders = max(2, round(parameters.founders * users))
    joined = np.zeros(users)
    joined[founders:] = np.sort(rng.uniform(0, 0.95 * parameters.days, max(users - founders, 0)))
    sizes = rng.gamma(4.0, size=max(1, round(users / parameters.community_size)))
    community = rng.choice(len(sizes), users, p=sizes / sizes.sum())
    interest, city = (
        draw_trait(community, len(values), parameters.loyalty, rng).astype(np.int64) for values in (INTERESTS, CITIES)
    )
    activity = np.minimum(1 + rng.pareto(parameters.activity_tail, users), parameters.activity_most)
    return Population(rng.permutation(users), joined, community, interest, city, activity)


def draw_trait(
    community: NDArray[np.int64], values: int, loyalty: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """A value for each user: a community has one of its own, which most of its members share."""
    shared = rng.integers(values, size=community.max() + 1)[community]
    return np.where(rng.random(len(community)) < loyalty, shared, rng.integers(values, size=len(community)))


INTERESTS = ("astronomy", "baking", "chess", "climbing", "films", "football", "gardening", "music", "novels", "opera")
CITIES = ("Athens", "Bergen", "Gdansk", "Ghent", "Lyon", "Porto", "Sevilla", "Turin")
LANGUAGES = ("Greek", "Norwegian", "Polish", "Dutch", "French", "Portuguese", "Spanish", "Italian")
"""The language of each city."""


def draw_profiles(population: Population, rng: np.random.Generator) -> pa.Table:
    """The users table: interest and city, and languages that come with the city."""
    users, city = len(population.user_id), population.city
    # One to three languages: the city's, and up to two others without repetition (1 to 7 steps further, distinct).
    spoken = np.stack([city, city + rng.integers(1, 4, users), city + rng.integers(4, 8, users)], axis=1) % len(CITIES)
    count = rng.choice([1, 2, 3], users, p=[0.6, 0.3, 0.1])
    offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    languages = np.array(LANGUAGES)[spoken[np.arange(3) < count[:, None]]]
    return pa.table(
        {
            "user_id": population.user_id,
            "interest": np.array(INTERESTS)[population.interest],
            "city": np.array(CITIES)[city],
            "languages": pa.ListArray.from_arrays(offsets, pa.array(languages)),
        }
    )
