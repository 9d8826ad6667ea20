"""Tokens of limited room, against a loop over users."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from friendrec.models import capacity as module
from friendrec.models.capacity import within_capacity


def one_by_one(
    wishes: list[int], groups: list[int], capacity: int, distances: np.ndarray, fixed: list[bool]
) -> list[int]:
    """The definition, user by user."""
    chosen: dict[int, int] = {}
    homeless: list[int] = []
    for group, token in sorted(set(zip(groups, wishes, strict=True))):
        wishing = [u for u in range(len(wishes)) if (groups[u], wishes[u]) == (group, token)]
        wishing.sort(key=lambda u: (not fixed[u], distances[u, token]))
        chosen |= dict.fromkeys(wishing[:capacity], token)
        homeless += wishing[capacity:]
    for user in sorted(homeless, key=lambda u: distances[u, wishes[u]]):
        for token in np.argsort(distances[user]):
            if sum(groups[u] == groups[user] and t == token for u, t in chosen.items()) < capacity:
                chosen[user] = int(token)
                break
    return [chosen[user] for user in range(len(wishes))]


@settings(deadline=None)  # numba compiles
@given(
    seed=st.integers(0, 10_000),
    num_tokens=st.integers(1, 5),
    capacity=st.integers(1, 4),
    num_groups=st.integers(1, 4),
    block=st.sampled_from([1, 7, 1 << 24]),
)
def test_the_nearest_stay_and_the_others_find_the_nearest_room(
    seed: int, num_tokens: int, capacity: int, num_groups: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, capacity * num_tokens + 1, num_groups)  # up to full
    groups = rng.permutation(np.repeat(np.arange(num_groups) * 10**12, sizes))
    wishes = rng.integers(0, num_tokens, len(groups)).astype(np.int32)
    distances = rng.random((len(groups), num_tokens), np.float32)
    fixed = np.zeros(len(groups), bool)
    for group, token in set(zip(groups.tolist(), wishes.tolist(), strict=True)):
        wishing = np.flatnonzero((groups == group) & (wishes == token))
        fixed[wishing[: rng.integers(0, capacity + 1)]] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        tokens = within_capacity(wishes, groups, capacity, lambda rows: distances[rows], num_tokens, fixed)
    assert tokens.tolist() == one_by_one(wishes.tolist(), groups.tolist(), capacity, distances, fixed.tolist())
    assert (tokens == wishes)[fixed].all()
    assert np.unique(np.stack([groups, tokens]), axis=1, return_counts=True)[1].max(initial=0) <= capacity


def test_too_many_users_are_refused() -> None:
    distances = np.ones((3, 2), np.float32)
    wishes, together = np.array([0, 0, 1], np.int32), np.zeros(3, np.int64)
    with pytest.raises(ValueError, match="more users than 2 tokens of 1 have room for"):
        within_capacity(wishes, together, 1, lambda rows: distances[rows], 2)
    with pytest.raises(ValueError, match="more than 1 fixed users"):
        within_capacity(wishes, together, 1, lambda rows: distances[rows], 2, np.ones(3, bool))
