"""First contacts against a walk through the log."""

from pathlib import Path

import numpy as np
import pytest

from friendrec.datasets.contacts import FirstContacts
from tests.synthetic import prepared_from_events


@pytest.mark.parametrize("seed", range(5))
def test_contacts_are_the_distinct_partners_strictly_before_in_order_of_first_contact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    actor, target, time = rng.integers(0, 9, 120), rng.integers(0, 9, 120), rng.integers(0, 25, 120)
    data = prepared_from_events(actor, target, None, time)
    events = sorted((t, a, b) for a, b, t in zip(actor, target, time, strict=True) if a != b)
    users, times = (grid.ravel() for grid in np.meshgrid(np.arange(data.num_users), np.arange(27)))
    for relation, side in ((FirstContacts.contacted(data), 1), (FirstContacts.contacted_by(data), 2)):
        offsets, ids = relation.before(users, times)
        for q, (user, now) in enumerate(zip(data.user_ids[users], times, strict=True)):
            met = [event[3 - side] for event in events if event[0] < now and event[side] == user]
            assert data.user_ids[ids[offsets[q] : offsets[q + 1]]].tolist() == list(dict.fromkeys(met))
        others = rng.integers(0, data.num_users, len(users))
        expected = [o in ids[offsets[q] : offsets[q + 1]] for q, o in enumerate(others)]
        assert relation.known(users, others, times).tolist() == expected


def test_a_block_hides_both_from_each_other_and_is_no_contact(tmp_path: Path) -> None:
    data = prepared_from_events(
        [0, 1, 2, 0, 1], [1, 2, 0, 2, 0], ["say", "say", "say", "block", "say"], [1, 2, 3, 4, 5],
        roles={"block": "exclude"}, path=tmp_path,
    )  # fmt: skip
    assert [action.name for action in data.actions] == ["say"]
    row = {user: np.array([r]) for r, user in enumerate(data.user_ids.tolist())}
    blocked, contacted = FirstContacts.blocked(data), FirstContacts.contacted(data)
    for user, other in ((0, 2), (2, 0)):
        assert blocked.before(row[user], np.array([5]))[1].tolist() == row[other].tolist()
        assert blocked.before(row[user], np.array([4]))[1].tolist() == []
    assert not contacted.known(row[0], row[2], np.array([9]))[0]


def test_nobody_is_blocked_without_an_exclude_action() -> None:
    data = prepared_from_events([0, 1], [1, 0], None, [1, 2])
    assert not FirstContacts.blocked(data).known(np.array([0]), np.array([1]), np.array([9])).any()
