"""Streaming baselines: eighteen hand-made scores replayed over the log, each event ranked exactly among all candidates.

A baseline is a tuple of scores, the first deciding. Scores are integers: counts, or times as the place of the timestamp
among the distinct ones, from 1; 0 is never. *Pair* scores are 0 but for the actor's own contacts, *user* scores are the
same for every actor. A tie in a pair score that is not 0 stays a tie: what comes after orders only those for whom it is
0 (so did the program that made the reference scores).

An event costs one pass over the candidates, which compares their user scores with the target's; the few contacts, who
also decide the exclusions, are then settled one by one (shared neighbours: `neighbours.py`). Live, the scores follow
the log up to the event's timestamp; frozen, they stop where the train period ends. What is excluded follows the log in
both.
"""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation.neighbours import NEIGHBOUR_BASELINES, place_by_neighbours
from friendrec.pipeline.evaluation.tasks import LEVELS, Events, Exclusions

PAIR_SCORES = ("recent_contacts", "contact_frequency", "reciprocity", "last_interaction")
USER_SCORES = ("popularity", "recent_popularity", "last_received", "last_sent", "last_active")
DIRECT_BASELINES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("popularity", "recent_popularity", "last_received", "last_sent", "last_active")},
    **{name: (name,) for name in ("recent_contacts", "contact_frequency", "reciprocity", "last_interaction")},
    "reciprocity+recent_popularity": ("reciprocity", "recent_popularity"),
    "reciprocity+last_active": ("reciprocity", "last_active"),
    "last_interaction+last_active": ("last_interaction", "last_active"),
    "hybrid": ("recent_contacts", "reciprocity", "recent_popularity"),
    "hybrid+last_active": ("recent_contacts", "reciprocity", "last_active"),
}
"""Scores of each baseline, the first deciding: pair scores, and at most one user score at the end."""
BASELINES = DIRECT_BASELINES | NEIGHBOUR_BASELINES


class Stream(NamedTuple):
    """The log in total order (n events), and a *slot* for each ordered pair of users who ever met.

    The slots of user u are `slot_offsets[u]:slot_offsets[u + 1]`, in order of the first event between the two.
    """

    actor: NDArray[np.int64]  # [n]
    target: NDArray[np.int64]  # [n]
    tick: NDArray[np.int64]  # [n] the timestamp's place among the distinct ones, from 1
    out_slot: NDArray[np.int64]  # [n] the target among the actor's slots
    in_slot: NDArray[np.int64]  # [n] the actor among the target's slots
    slot_offsets: NDArray[np.int64]  # [U + 1]
    slot_other: NDArray[np.int64]  # [P]


def baseline_ranks(
    data: PreparedData, events: Events, exclusions: Exclusions, state: str
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """Ranks `[LEVELS, E]` of each baseline (nan where no task asks), and how many candidates were allowed there."""
    scores = PAIR_SCORES + USER_SCORES
    keys = np.full((len(DIRECT_BASELINES), max(map(len, DIRECT_BASELINES.values()))), -1)
    for row, names in zip(keys, DIRECT_BASELINES.values(), strict=True):
        row[: len(names)] = [scores.index(name) for name in names]
    ranks = np.full((len(events.index), LEVELS, len(BASELINES)), np.nan)
    allowed = np.zeros((len(events.index), LEVELS), np.int64)
    _replay(
        *event_stream(data),
        events.index,
        np.stack([events.at_level(level) for level in range(LEVELS)], axis=1),
        *exclusions.blocked.before(events.actor, events.timestamp),
        data.num_train_users,
        data.num_events if state == "live" else data.num_train_events,
        data.num_train_events // 10,
        keys,
        ranks,
        allowed,
    )
    return {name: ranks[:, :, b].T for b, name in enumerate(BASELINES)}, allowed.T


def event_stream(data: PreparedData) -> Stream:
    """Lay the user-major entries out as one stream of events."""
    user = np.repeat(np.arange(data.num_users), np.diff(data.offsets))
    pairs, first, pair = np.unique(user * data.num_users + data.partner, return_index=True, return_inverse=True)
    order = np.argsort(first)  # user-major, and in time order within a user
    slot = np.empty(len(pairs), np.int64)
    slot[order] = np.arange(len(pairs))
    slot_of_entry = slot[pair]
    other = pairs[order] % max(data.num_users, 1)
    slot_offsets = np.searchsorted(pairs[order] // max(data.num_users, 1), np.arange(data.num_users + 1))
    out = data.event_entry
    actor, target = user[out], data.partner[out].astype(np.int64)
    back = np.searchsorted(pairs, target * data.num_users + actor)
    tick = 1 + np.unique(data.timestamp[out], return_inverse=True)[1]
    return Stream(actor, target, tick, slot_of_entry[out], slot[back], slot_offsets, other)


LAST_OUT, OUT_COUNT, LAST_IN, LAST_EITHER = range(4)
RECEIVED, RECENT, LAST_RECEIVED, LAST_SENT, LAST_ACTIVE = range(5)
NUM_PAIR, NUM_USER = len(PAIR_SCORES), len(USER_SCORES)


@numba.njit(cache=True, nogil=True)
def _replay(  # type: ignore[no-untyped-def]
    actor, target, tick, out_slot, in_slot, slot_offsets, slot_other,
    scored, asked, blocked_offsets, blocked, num_candidates, score_until, window, keys, ranks, allowed,
):  # fmt: skip
    """Rank the `scored` events in total order; events at or after `score_until` move exclusions but no score."""
    num_users, num_slots = len(slot_offsets) - 1, len(slot_other)
    users = np.zeros((NUM_USER, num_users), np.int64)
    pairs = np.zeros((num_slots, NUM_PAIR), np.int64)
    met = np.zeros(num_users, np.int64)  # how many of its slots each user has met
    known = np.zeros(num_users, np.int64)  # the same, as far as scores know
    contacted = np.zeros(num_slots, np.bool_)
    place = np.full(num_users, -1, np.int64)  # of a named candidate in the list below
    applied = 0
    for e in range(len(scored)):
        while tick[applied] < tick[scored[e]]:
            u, v, out, inward = actor[applied], target[applied], out_slot[applied], in_slot[applied]
            contacted[out] = True
            met[u] = max(met[u], out - slot_offsets[u] + 1)
            met[v] = max(met[v], inward - slot_offsets[v] + 1)
            if applied < score_until:
                known[u], known[v] = met[u], met[v]
                _count(users, pairs, u, v, out, inward, tick[applied])
                if applied >= window:
                    users[RECENT, target[applied - window]] -= 1
            applied += 1
        u, v = actor[scored[e]], target[scored[e]]
        slots = slot_offsets[u], slot_offsets[u] + met[u]
        hidden = blocked[blocked_offsets[e] : blocked_offsets[e + 1]]
        named, hidden_from, values = _named(
            u, slots, slot_other, contacted, hidden, num_candidates, pairs, users, place
        )
        own = np.zeros(NUM_PAIR + NUM_USER, np.int64)
        own[NUM_PAIR:] = users[:, v]
        for j in range(len(named)):
            if named[j] == v:
                own[:] = values[j]
        higher, tied = _compare_all(users, own, num_candidates)
        by_neighbours = place_by_neighbours(
            u, v, known, slot_offsets, slot_other, users[RECENT], users[LAST_ACTIVE], named, hidden_from, num_candidates
        )
        for level in range(LEVELS):
            if asked[e, level]:
                allowed[e, level] = num_candidates - (hidden_from <= level).sum()
                for b in range(len(keys)):
                    ranks[e, level, b] = _place(
                        keys[b], v, own, named, hidden_from, values, level, higher, tied, num_candidates
                    )
                ranks[e, level, len(keys) :] = by_neighbours[level]


@numba.njit(cache=True, nogil=True)
def _count(users, pairs, u, v, out, inward, now):  # type: ignore[no-untyped-def]
    """Let the scores know of the event u→v."""
    users[RECEIVED, v] += 1
    users[RECENT, v] += 1
    users[LAST_RECEIVED, v] = users[LAST_ACTIVE, v] = now
    users[LAST_SENT, u] = users[LAST_ACTIVE, u] = now
    pairs[out, LAST_OUT] = pairs[out, LAST_EITHER] = now
    pairs[out, OUT_COUNT] += 1
    pairs[inward, LAST_IN] = pairs[inward, LAST_EITHER] = now


@numba.njit(cache=True, nogil=True)
def _named(actor, slots, slot_other, contacted, blocked, num_candidates, pairs, users, place):  # type: ignore[no-untyped-def]
    """The candidates that need a look of their own: the actor, those met, those blocked.

    Returns rows, the lowest level that hides each, and all its scores; each candidate once.
    """
    capacity = 1 + slots[1] - slots[0] + len(blocked)
    named = np.empty(capacity, np.int64)
    hidden_from = np.zeros(capacity, np.int64)
    values = np.zeros((capacity, NUM_PAIR + NUM_USER), np.int64)
    count = 0
    if actor < num_candidates:
        named[count] = actor
        place[actor] = count
        count += 1
    for s in range(slots[0], slots[1]):
        if slot_other[s] < num_candidates:
            named[count] = slot_other[s]
            place[slot_other[s]] = count
            hidden_from[count] = 1 if contacted[s] else 2
            values[count, :NUM_PAIR] = pairs[s]
            count += 1
    for w in blocked:
        if w < num_candidates:
            if place[w] < 0:
                named[count] = w
                count += 1
            else:
                hidden_from[place[w]] = 0
    for j in range(count):
        place[named[j]] = -1
        values[j, NUM_PAIR:] = users[:, named[j]]
    return named[:count], hidden_from[:count], values[:count]


@numba.njit(cache=True, nogil=True)
def _compare_all(users, own, num_candidates):  # type: ignore[no-untyped-def]
    """How many candidates are higher than, and tied with, the target in each user score (itself not counted)."""
    higher, tied = np.zeros(NUM_USER, np.int64), np.full(NUM_USER, -1, np.int64)
    for score in range(NUM_USER):
        mine, above, same = own[NUM_PAIR + score], 0, 0
        row = users[score]
        for w in range(num_candidates):
            above += row[w] > mine
            same += row[w] == mine
        higher[score] += above
        tied[score] += same
    return higher, tied


@numba.njit(cache=True, nogil=True)
def _place(keys, target, own, named, hidden_from, values, level, higher, tied, num_candidates):  # type: ignore[no-untyped-def]
    """The target's rank under one baseline at one level of exclusion."""
    never, last = True, -1  # no pair score sets the target apart; the user score
    for key in keys:
        if 0 <= key < NUM_PAIR and own[key] > 0:
            never = False
        if key >= NUM_PAIR:
            last = key
    above, same = 0, 0
    if never and last < 0:
        same = num_candidates - 1
    elif never:
        above, same = higher[last - NUM_PAIR], tied[last - NUM_PAIR]
    for j in range(len(named)):
        if named[j] == target:
            continue
        if never:  # take back what the pass over all candidates said of it
            above -= last >= 0 and values[j, last] > own[last]
            same -= last < 0 or values[j, last] == own[last]
        if hidden_from[j] > level:
            sign = 0
            for key in keys:
                if key < 0 or sign != 0:
                    break
                sign = (values[j, key] > own[key]) - np.int64(values[j, key] < own[key])
                if key < NUM_PAIR and own[key] > 0:
                    break  # a pair score that is not 0 has the last word, tied or not
            above += sign > 0
            same += sign == 0
    return 1 + above + same / 2
