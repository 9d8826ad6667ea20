"""The best that can be known of a simulated log: the generator's own probabilities, given the past and the truth.

By the rules of `growth`, user u turns to v at time t with a rate that is a function of the events before t:

    rate(u → v) = visits(u) · P(visit goes to v)  +  answers still due (u → v)  +  acceptance still due  (+ blocks)

    visits(u)    = rate · (activity + newcomer · e^(-(t - joined) / newcomer_days)) + Σ own events s: stay · k(t - s)
    answers due  = Σ events v → u at s: mean · k(t - s),               k(x) = e^(-x / mean delay) / mean delay
    acceptance   = a · f(t - s) / (1 - a · F(t - s)),                  f, F of the log-normal delay

Poisson numbers of what is set off make this exact: whichever event of the log caused which, the rate is the same sum.
Given that u acts at t, v is the target with probability rate(u → v) / Σ rate(u → ·).
"""

import math
from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from friendrec.datasets.choices import forget, message_options, request_options, request_share
from friendrec.datasets.clock import activity_days
from friendrec.datasets.network import (
    ACCEPT,
    ACTIONS,
    ASKED_BY,
    BLOCK,
    MESSAGE,
    REQUEST,
    Network,
    NetworkParameters,
    Population,
    acceptance,
    admit,
    answers,
    apply,
    blocks,
    empty_network,
    find,
    meet,
    possible,
    visit_rate,
)
from friendrec.datasets.simulator import CITIES, DAY_US, INTERESTS, SocialLog


class Due(NamedTuple):
    """What events so far may still set off: decayed sums of means, each as of a time of its own."""

    visits: NDArray[np.float64]  # [users] of the user
    visited: NDArray[np.float64]  # [users] as of
    answers: NDArray[np.float64]  # [contacts] of the contact's owner towards its peer
    blocks: NDArray[np.float64]  # [contacts]
    answered: NDArray[np.float64]  # [contacts] as of, for both


class Events(NamedTuple):
    """What happened, in order."""

    actor: NDArray[np.int64]  # [n] indices into the population
    target: NDArray[np.int64]  # [n]
    action: NDArray[np.int8]  # [n]
    time: NDArray[np.float64]  # [n] days


class Oracle:
    """Replays simulated events in order and tells, at any point, whom a user would turn to."""

    def __init__(self, population: Population, events: Events, parameters: NetworkParameters) -> None:
        self.population, self.events, self.parameters = population, events, parameters
        users, contacts = len(population.joined), 2 * len(events.time)
        self.rate = visit_rate(population, len(events.time), parameters)
        self.net = empty_network(population, len(events.time))
        self.due = Due(np.zeros(users), np.zeros(users), *(np.empty(contacts) for _ in range(3)))
        self.replayed = 0

    def replay(self, until: int) -> None:
        """Take note of the first `until` events of the log; what is noted stays noted."""
        _replay(self.net, self.due, self.events, self.replayed, until, self.parameters)
        self.replayed = max(self.replayed, until)

    def rates(self, user: int, day: float) -> NDArray[np.float64]:
        """Rate a day of each action towards everybody, `[actions, users]`, given the events replayed.

        `user` is an index into the population, `day` a time of the activity clock after those events.
        """
        _admit_until(self.net, day)
        return turn_to(self.net, self.due, self.rate, user, day, self.parameters)


def read_truth(log: SocialLog, parameters: NetworkParameters) -> tuple[Population, Events]:
    """Who and what there was, from the tables (`log.truth` and `log.users` are both by user_id)."""
    joined = _microseconds(log.truth["joined"])
    start = joined.min()  # founders join at midnight of the first day

    def days(timestamps: NDArray[np.int64]) -> NDArray[np.float64]:
        return activity_days((timestamps - start) / DAY_US, parameters.rhythm)

    order = np.argsort(joined, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    user_id = pa.array(log.truth["user_id"].to_numpy())
    actor, target = (place[_codes(log.interactions[name], user_id)] for name in ("actor_id", "target_id"))
    action = _codes(log.interactions["action"].cast(pa.string()), pa.array(ACTIONS)).astype(np.int8)
    interest, city = (
        _codes(log.users[name], pa.array(values))[order] for name, values in (("interest", INTERESTS), ("city", CITIES))
    )
    community, activity = (log.truth[name].to_numpy()[order] for name in ("community", "activity"))
    people = Population(user_id.to_numpy()[order], days(joined[order]), community, interest, city, activity)
    return people, Events(actor, target, action, days(_microseconds(log.interactions["timestamp"])))


def _microseconds(column: pa.ChunkedArray) -> NDArray[np.int64]:
    microseconds: NDArray[np.int64] = column.cast(pa.int64()).to_numpy()
    return microseconds


def _codes(column: pa.ChunkedArray, values: pa.Array) -> NDArray[np.int64]:
    codes: NDArray[np.int64] = pc.index_in(column, value_set=values).to_numpy().astype(np.int64)
    return codes


@numba.njit(cache=True)
def _admit_until(net: Network, now: float) -> None:
    joined = net.population.joined
    while net.present[0] < len(joined) and joined[net.present[0]] <= now:
        admit(net)


@numba.njit(cache=True)
def _replay(net: Network, due: Due, events: Events, begin: int, end: int, p: NetworkParameters) -> None:
    for i in range(begin, end):
        u, v, what, now = events.actor[i], events.target[i], events.action[i], events.time[i]
        _admit_until(net, now)
        before = net.used[0]
        contact = meet(net, u, v) if what == REQUEST else find(net, u, v)
        if net.used[0] > before:
            due.answers[before : before + 2] = due.blocks[before : before + 2] = 0
            due.answered[before : before + 2] = now
        apply(net, what, contact, now)
        due.visits[u] = due.visits[u] * np.exp((due.visited[u] - now) / p.stay_days) + p.stay
        due.visited[u] = now
        back = contact ^ 1
        fade = np.exp((due.answered[back] - now) / p.answer_days)
        due.answers[back] = due.answers[back] * fade + answers(what, p)
        due.blocks[back] = due.blocks[back] * fade + blocks(what, p)
        due.answered[back] = now


@numba.njit(cache=True)
def turn_to(net: Network, due: Due, rate: float, u: int, now: float, p: NetworkParameters) -> NDArray[np.float64]:
    """See `Oracle.rates`."""
    rates = np.zeros((len(ACTIONS), len(net.friends)))
    visits = visits_of(net, due, rate, u, now, p)
    asking = visits * request_share(net, u, p)
    asked = request_options(net, u, now, p)
    for i in range(asked.listed):
        rates[REQUEST, net.option[i]] += asking * net.share[i]
    for v in range(net.present[0]):
        if not net.known[v]:
            rates[REQUEST, v] += asking * (asked.each + asked.scene_each * (net.scenes.of[v] == net.scenes.of[u]))
    forget(net, u)
    for i in range(message_options(net, u, p)):
        rates[MESSAGE, net.peer[net.option[i]]] += (visits - asking) * net.share[i]
    contact = net.newest[u]
    while contact >= 0:
        v = net.peer[contact]
        fade = np.exp((due.answered[contact] - now) / p.answer_days) / p.answer_days
        if possible(net, MESSAGE, contact):
            rates[MESSAGE, v] += due.answers[contact] * fade
        if possible(net, BLOCK, contact):
            rates[BLOCK, v] += due.blocks[contact] * fade
        if net.state[contact] == ASKED_BY:
            rates[ACCEPT, v] += acceptance_rate(now - net.asked[contact], acceptance(net, u, v, p), p)
        contact = net.older[contact]
    return rates


@numba.njit(cache=True)
def visits_of(net: Network, due: Due, rate: float, u: int, now: float, p: NetworkParameters) -> float:
    """Visits a day of a user, as of now."""
    joined = net.population.joined[u]
    visits = rate * net.population.activity[u]
    if joined > 0:
        visits += rate * p.newcomer * np.exp((joined - now) / p.newcomer_days)
    return float(visits + due.visits[u] * np.exp((due.visited[u] - now) / p.stay_days) / p.stay_days)


@numba.njit(cache=True)
def acceptance_rate(since: float, probability: float, p: NetworkParameters) -> float:
    """Rate a day at which a request is accepted that has not been for `since` days."""
    if since <= 0 or since >= p.lapse_days:
        return 0.0
    z = np.log(since / p.accept_median) / p.accept_sigma
    density = np.exp(-z * z / 2) / (np.sqrt(2 * np.pi) * p.accept_sigma * since)
    accepted = probability * math.erfc(-z / np.sqrt(2)) / 2
    return probability * density / (1 - accepted)
