"""The point-in-time state against a twin that walks over the events strictly before t."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from friendrec.datasets.state import PAIR_FEATURES, PointInTime
from tests.datasets.twin import HOUR, IN, OUT, Entry, Twin, logs, pair_state, prepared

ABSENT = 8.0  # log1p of the rank of what never was
NEVER = 0.1 * math.log1p(1e9)


@given(log=logs)
@settings(max_examples=30, deadline=None)
def test_ends_lie_after_the_last_entry_strictly_before(log: list) -> None:
    with prepared(log) as (data, twin):
        users, times = grid(data.num_users)
        ends = PointInTime(data).ends(users, times) - data.offsets[users]
        assert ends.tolist() == [len(twin.entries(u, t)) for u, t in zip(users, times, strict=True)]


@given(log=logs, limit=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_contacts_are_the_latest_distinct_partners_with_their_pair_state(log: list, limit: int) -> None:
    with prepared(log) as (data, twin):
        users, times = grid(data.num_users)
        contacts = PointInTime(data).contacts(users, times, limit)
        assert len(contacts.offsets) == len(users) + 1
        for q, (user, time) in enumerate(zip(users.tolist(), times.tolist(), strict=True)):
            rows = slice(contacts.offsets[q], contacts.offsets[q + 1])
            partners = twin.contacts(user, time, limit)
            assert contacts.partner[rows].tolist() == partners
            expected = [features(twin, user, time, partners, partner) for partner in partners]
            np.testing.assert_allclose(
                contacts.features[rows], np.array(expected).reshape(-1, len(PAIR_FEATURES)), rtol=1e-4, atol=1e-6
            )


def features(twin: Twin, user: int, now: int, named: list[int], partner: int) -> list[float]:
    entries = twin.entries(user, now)
    state = pair_state(entries, partner, now)
    of_named = [pair_state(entries, other, now)["last"] for other in named]
    values = {
        "rank": math.log1p(named.index(partner)),
        "last_was_partner": latest(entries, partner)[2] == IN,
    }
    for side, tag in ((OUT, "out"), (IN, "in")):
        values |= {
            f"{tag}_count": math.log1p(state["counts"][side]),
            f"has_{tag}": state["counts"][side] > 0,
            f"run_{tag}": math.log1p(state["counts"][2 + side]),
            f"since_{tag}": lag(now, state["last"][side]),
            f"since_first_{tag}": lag(now, state["first"][side]),
            f"{tag}_day": math.log1p(state["decays"][2 * side]),
            f"{tag}_month": math.log1p(state["decays"][2 * side + 1]),
            f"{tag}_rank": rank(side, of_named, named.index(partner)),
        }
    return [float(values[name]) for name in PAIR_FEATURES]


def latest(entries: list[Entry], partner: int) -> Entry:
    return [entry for entry in entries if entry[0] == partner][-1]


def lag(now: int, then: float) -> float:
    return NEVER if then == -math.inf else 0.1 * math.log1p((now - then) / 1e6)


def rank(side: int, last: list[list[float]], place: int) -> float:
    """Place among the named contacts by the last event of that side; ties go to the more recent contact."""
    if last[place][side] == -math.inf:
        return ABSENT
    order = sorted(range(len(last)), key=lambda i: (-last[i][side], i))
    return math.log1p(order.index(place))


def grid(num_users: int) -> tuple[np.ndarray, np.ndarray]:
    """Every user at, between and far after the hours of the log."""
    hours = np.array([0, 1, 2, 3, 5, 8, 12, 13, 2000]) * HOUR
    users, times = np.meshgrid(np.arange(num_users), np.concatenate([hours, hours[1:4] - HOUR // 2]))
    return users.ravel(), times.ravel()


@pytest.mark.parametrize("limit", [0, 3])
def test_no_queries_have_no_contacts(limit: int) -> None:
    with prepared([(0, 1, "a", 0), (1, 2, "a", 3)]) as (data, _):
        nobody = np.empty(0, np.int64)
        contacts = PointInTime(data).contacts(nobody, nobody, limit)
        assert contacts.offsets.tolist() == [0]
        assert contacts.features.shape == (0, len(PAIR_FEATURES))
