"""A friend network that grows event by event, so that the distribution of every event, given the past, is known.

Users visit, at a rate of their own that is higher in their first days. A visitor messages a friend or asks someone new
(`choices`); what happens sets off more: a request may be accepted, an acceptance greeted, a message answered, either
may be met by a block, and who has just been active stays for a while:

    visit ──► request ──(accepted?)──► accept ──(greeted?)──► message ──(answered?)──► message ──► …
      ▲   └─► message ──(answered?)──► message ──► …
      └──(stays?)── any event

What is set off waits in a heap until its time, and is dropped if it has become impossible by then. How often something
is set off is Poisson and delays are exponential, so that the log alone gives the rate of what may still come; only an
acceptance, of which there is at most one a request, is a coin toss with a log-normal delay.
"""

import heapq

import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.choices import forget, message_options, request_options, request_share
from friendrec.datasets.network import (
    ACCEPT,
    BLOCK,
    MESSAGE,
    REQUEST,
    Network,
    NetworkParameters,
    acceptance,
    admit,
    answers,
    apply,
    blocks,
    meet,
    possible,
)

VISIT, NOBODY = -1, -1


@numba.njit(cache=True, nogil=True)
def grow(
    net: Network,
    rate: float,
    p: NetworkParameters,
    rng: np.random.Generator,
    events: int,
    progress: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8], NDArray[np.float64]]:
    """The first `events` events: actor, target, action and time, in order. `net` is empty and ends in their state.

    `rate`: visits a day of a user of activity 1. `progress[0]` is how many events there are, for who waits beside.
    """
    joined, activity = net.population.joined, np.cumsum(net.population.activity)
    actor, target = np.empty(events, np.int64), np.empty(events, np.int64)
    action, time = np.empty(events, np.int8), np.empty(events, np.float64)
    waiting = [(0.0, 0, 0) for _ in range(0)]  # heap of (time, action, contact of its actor; or VISIT, the visitor)
    visit, done = np.inf, 0
    while done < events:
        joining = joined[net.present[0]] if net.present[0] < len(joined) else np.inf
        if joining <= visit and (len(waiting) == 0 or joining <= waiting[0][0]):
            user = admit(net)
            if joining > 0:
                set_off(waiting, joining, rate * p.newcomer * p.newcomer_days, p.newcomer_days, VISIT, user, rng)
            visit = joining + rng.exponential() / (rate * activity[user])  # memoryless: at the new rate from now on
            continue
        if len(waiting) > 0 and waiting[0][0] <= visit:
            now, what, who = heapq.heappop(waiting)
        else:
            now, what, who = visit, VISIT, draw_visitor(activity[: net.present[0]], rng)
            visit = now + rng.exponential() / (rate * activity[net.present[0] - 1])
        if what == VISIT:
            what, contact = decide(net, who, now, p, rng)
            if contact == NOBODY:
                continue
        else:
            contact = who
            if not possible(net, what, contact):
                continue
        apply(net, what, contact, now)
        u, v = np.int64(net.peer[contact ^ 1]), np.int64(net.peer[contact])
        actor[done], target[done], action[done], time[done] = u, v, what, now
        done += 1
        progress[0] = done

        set_off(waiting, now, p.stay, p.stay_days, VISIT, u, rng)
        set_off(waiting, now, answers(what, p), p.answer_days, MESSAGE, contact ^ 1, rng)
        set_off(waiting, now, blocks(what, p), p.answer_days, BLOCK, contact ^ 1, rng)
        if what == REQUEST and rng.random() < acceptance(net, u, v, p):
            delay = p.accept_median * np.exp(p.accept_sigma * rng.standard_normal())
            if delay < p.lapse_days:
                heapq.heappush(waiting, (now + delay, ACCEPT, contact ^ 1))
    return actor, target, action, time


@numba.njit(cache=True)
def set_off(  # type: ignore[no-untyped-def]
    waiting, now: float, mean: float, mean_delay: float, what: int, who: int, rng: np.random.Generator
) -> None:
    """Let a Poisson number of things wait, each for an exponential delay."""
    if mean > 0:
        for _ in range(rng.poisson(mean)):
            heapq.heappush(waiting, (now + mean_delay * rng.exponential(), what, who))


@numba.njit(cache=True)
def draw_visitor(activity: NDArray[np.float64], rng: np.random.Generator) -> int:
    """Anyone present, in proportion to activity (given as its running sum)."""
    return int(np.searchsorted(activity, rng.random() * activity[-1], side="right"))


@numba.njit(cache=True)
def decide(net: Network, u: int, now: float, p: NetworkParameters, rng: np.random.Generator) -> tuple[int, int]:
    """What visitor u does, and with which contact (NOBODY: nobody is left to ask)."""
    if rng.random() >= request_share(net, u, p):
        return MESSAGE, draw_partner(net, u, p, rng)
    v = draw_stranger(net, u, now, p, rng)
    forget(net, u)
    return REQUEST, (NOBODY if v == NOBODY else meet(net, u, v))


@numba.njit(cache=True)
def draw_partner(net: Network, u: int, p: NetworkParameters, rng: np.random.Generator) -> int:
    """The contact of one of u's friends, of whom there must be one."""
    listed, x = message_options(net, u, p), rng.random()
    for i in range(listed):
        x -= net.share[i]
        if x < 0:
            return int(net.option[i])
    return int(net.option[listed - 1])  # the shares add up to 1 but for their rounding


@numba.njit(cache=True)
def draw_stranger(net: Network, u: int, now: float, p: NetworkParameters, rng: np.random.Generator) -> int:
    """One of those whom u may ask; leaves `net.known` marked."""
    asked = request_options(net, u, now, p)
    if asked.anywhere == 0:
        return NOBODY
    x = rng.random()
    for i in range(asked.listed):
        x -= net.share[i]
        if x < 0:
            return int(net.option[i])
    scene = net.scenes.of[u]
    in_scene = asked.in_scene > 0 and x < asked.scene_each * asked.in_scene
    while True:  # somebody is eligible, so this ends
        if in_scene:
            v = net.scenes.member[net.scenes.first[scene] + int(rng.random() * net.scenes.size[scene])]
        else:
            v = int(rng.random() * net.present[0])
        if not net.known[v]:
            return int(v)
