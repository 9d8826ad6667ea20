"""A friend network that grows event by event: the distribution of every event, given the past, is known.

The clock ticks with visits. A visitor either messages a friend or asks someone new; requests may be accepted,
acceptances greeted and messages answered, each after a delay, so these wait in a heap until their time:

    visit ──► request ──(accepted?)──► accept ──(greeted?)──► message ──(answered?)──► message ──► …
          └─► message ──(answered?)──► message ──► …

Whom a visitor asks is a mixture: a friend's friend (triadic closure), somebody of the own community, or anybody;
the last two step on to a friend of the person drawn with probability `preferential`, which prefers users in proportion
to their degree without keeping a table of degrees. Recent partners are written to again and again.

Inside this file a user is an index in order of joining; the tables carry a random permutation of it.
"""

import heapq
from typing import NamedTuple

import numba
import numpy as np

ACTIONS = ("accept", "message", "request")
ACCEPT, MESSAGE, REQUEST = range(3)
NOTHING = -1

ASKED, AWAITED, FRIENDS = range(3)
"""States of a contact: a request was in vain, will be accepted, has been accepted."""

RECENT = 8
"""Partners of the last so many messages, sent or received, that a user remembers."""
ATTEMPTS = 8
"""Draws after which a visitor who finds nobody new makes do with a known user."""


class NetworkParameters(NamedTuple):
    """What drives the network: probabilities, unless a unit is given."""

    days: float = 180.0
    """Expected length of the log, in days."""
    founders: float = 0.4
    """Share of users who are there from the first day; the others join evenly over the first 95 % of the days."""
    community_size: float = 25.0
    """Mean number of users in a community; sizes themselves vary (gamma, shape 4)."""
    activity_sigma: float = 1.2
    """Spread of the log-normal rate at which users visit."""
    newcomer_visits: float = 0.15
    """A visit is by somebody who joined in the last `newcomer_days`, all equally likely."""
    newcomer_days: float = 7.0
    """How long a newcomer is one, in days."""
    request: float = 0.5
    """A visitor with friends asks someone new instead of messaging a friend (one without friends always does)."""
    triadic: float = 0.45
    """A request goes to a friend's friend (a user without friends: to the own community)."""
    community: float = 0.47
    """A request goes into the own community; what remains goes anywhere."""
    preferential: float = 0.6
    """From the user drawn in a community, or anywhere, the request steps on to one of that user's friends."""
    accept_inside: float = 0.8
    """A request inside a community is accepted."""
    accept_outside: float = 0.4
    """A request between communities is accepted."""
    accept_median: float = 0.5
    """Median of the log-normal delay of an acceptance, in days."""
    accept_sigma: float = 1.2
    """Spread of the log of that delay."""
    greet: float = 0.5
    """An accepted requester thanks with a message, after the delay of an answer."""
    repeat: float = 0.7
    """A message goes to one of the partners of the last messages instead of any friend."""
    reply: float = 0.4
    """A message is answered."""
    reply_mean: float = 0.1
    """Mean of the exponential delay of an answer, in days."""

    @property
    def events_per_visit(self) -> float:
        """Expected events that a visit sets off, its own included (acceptance taken as inside the community)."""
        conversation = 1 / (1 - self.reply)
        accepted = self.accept_inside * (1 + self.greet * conversation)
        return self.request * (1 + accepted) + (1 - self.request) * conversation


class Population(NamedTuple):
    """The users, in order of joining, and their hidden traits."""

    user_id: np.ndarray  # int64 [users], a permutation
    joined: np.ndarray  # float64 [users], days since the start
    community: np.ndarray  # int64 [users]
    activity: np.ndarray  # float64 [users], relative rate of visits


class Graph(NamedTuple):
    """Who knows whom, as a linked list a user inside flat arrays: contact c of one user is mirrored by c ^ 1."""

    newest: np.ndarray  # int32 [users], the user's latest contact, or -1
    older: np.ndarray  # int32 [contacts], the contact before, or -1
    peer: np.ndarray  # int32 [contacts]
    state: np.ndarray  # int8 [contacts]: ASKED, AWAITED or FRIENDS
    friends: np.ndarray  # int32 [users], how many
    partner: np.ndarray  # int32 [users, RECENT], a ring of the last messages' partners
    messages: np.ndarray  # int32 [users], sent and received so far
    used: np.ndarray  # int64 [1], contacts in use


@numba.njit(cache=True)
def grow(
    population: Population, visit_rate: float, events: int, p: NetworkParameters, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The first `events` events: actor, target (int64 indices), action (int8) and time (float64, days), in order.

    `visit_rate`: visits a day and joined user.
    """
    joined, community = population.joined, population.community
    users = len(joined)
    graph = empty_graph(users, events)
    actor, target = np.empty(events, np.int64), np.empty(events, np.int64)
    action, time = np.empty(events, np.int8), np.empty(events, np.float64)

    activity = np.cumsum(population.activity)
    first_member = np.cumsum(np.bincount(community)) - np.bincount(community)
    member, members = np.empty(users, np.int64), np.zeros(len(first_member), np.int64)
    present = 0  # users who have joined
    waiting = [(0.0, 0, 0, 0) for _ in range(0)]  # heap of (time, action, actor, target)
    visit, done = 0.0, 0
    while done < events:
        if len(waiting) > 0 and waiting[0][0] <= visit:
            now, what, u, v = heapq.heappop(waiting)
        else:
            now = visit
            while present < users and joined[present] <= now:
                home = community[present]
                member[first_member[home] + members[home]] = present
                members[home] += 1
                present += 1
            visit = now + rng.exponential() / (visit_rate * present)
            u = draw_visitor(joined, activity, present, now, p, rng)
            neighbours = member[first_member[community[u]] : first_member[community[u]] + members[community[u]]]
            what, v = decide(graph, u, neighbours, present, p, rng)
            if what == NOTHING:
                continue
        actor[done], target[done], action[done], time[done] = u, v, what, now
        done += 1

        if what == REQUEST:
            accepted = rng.random() < (p.accept_inside if community[u] == community[v] else p.accept_outside)
            ask(graph, u, v, accepted)
            if accepted:
                delay = p.accept_median * np.exp(p.accept_sigma * rng.standard_normal())
                heapq.heappush(waiting, (now + delay, ACCEPT, v, u))
        elif what == ACCEPT:
            befriend(graph, u, v)
            if rng.random() < p.greet:
                heapq.heappush(waiting, (now + p.reply_mean * rng.exponential(), MESSAGE, v, u))
        else:
            remember(graph, u, v)
            remember(graph, v, u)
            if rng.random() < p.reply:
                heapq.heappush(waiting, (now + p.reply_mean * rng.exponential(), MESSAGE, v, u))
    return actor, target, action, time


@numba.njit(cache=True)
def draw_visitor(
    joined: np.ndarray, activity: np.ndarray, present: int, now: float, p: NetworkParameters, rng: np.random.Generator
) -> int:
    """A newcomer, or anyone present in proportion to activity (`activity` is its running sum)."""
    oldest_newcomer = int(np.searchsorted(joined[:present], now - p.newcomer_days))
    if oldest_newcomer < present and rng.random() < p.newcomer_visits:
        return oldest_newcomer + int(rng.random() * (present - oldest_newcomer))
    return int(np.searchsorted(activity[:present], rng.random() * activity[present - 1], side="right"))


@numba.njit(cache=True)
def decide(
    graph: Graph, u: int, neighbours: np.ndarray, present: int, p: NetworkParameters, rng: np.random.Generator
) -> tuple[int, int]:
    """What visitor u does, and to whom."""
    if graph.friends[u] > 0 and rng.random() >= p.request:
        remembered = min(graph.messages[u], RECENT)
        if remembered > 0 and rng.random() < p.repeat:
            return MESSAGE, graph.partner[u, int(rng.random() * remembered)]
        return MESSAGE, draw_friend(graph, u, rng)
    v = u
    for _ in range(ATTEMPTS):
        v = propose(graph, u, neighbours, present, p, rng)
        if v != u and find(graph, u, v) < 0:
            return REQUEST, v
    # Nobody new was found: the last one drawn gets a message, or a second request (from either side).
    contact = find(graph, u, v)
    if contact >= 0 and graph.state[contact] == FRIENDS:
        return MESSAGE, v
    if contact >= 0 and graph.state[contact] == ASKED:
        return REQUEST, v
    return NOTHING, v


@numba.njit(cache=True)
def propose(
    graph: Graph, u: int, neighbours: np.ndarray, present: int, p: NetworkParameters, rng: np.random.Generator
) -> int:
    """One draw of whom u might ask; it can be u itself or someone u knows already."""
    way = rng.random()
    if way < p.triadic and graph.friends[u] > 0:
        return int(draw_friend(graph, draw_friend(graph, u, rng), rng))
    if way < p.triadic + p.community:
        v = int(neighbours[int(rng.random() * len(neighbours))])
    else:
        v = int(rng.random() * present)
    if graph.friends[v] > 0 and rng.random() < p.preferential:
        v = draw_friend(graph, v, rng)
    return v


# ------------------------------------------------------------------------------------------------- the graph


@numba.njit(cache=True)
def empty_graph(users: int, events: int) -> Graph:
    contacts = 2 * events  # a request makes at most one pair
    return Graph(
        np.full(users, -1, np.int32),
        np.empty(contacts, np.int32),
        np.empty(contacts, np.int32),
        np.empty(contacts, np.int8),
        np.zeros(users, np.int32),
        np.empty((users, RECENT), np.int32),
        np.zeros(users, np.int32),
        np.zeros(1, np.int64),
    )


@numba.njit(cache=True)
def find(graph: Graph, u: int, v: int) -> int:
    """The contact of u with v, or -1."""
    contact = graph.newest[u]
    while contact >= 0 and graph.peer[contact] != v:
        contact = graph.older[contact]
    return int(contact)


@numba.njit(cache=True)
def draw_friend(graph: Graph, u: int, rng: np.random.Generator) -> int:
    """One of u's friends (there must be one), all equally likely."""
    skip = int(rng.random() * graph.friends[u])
    contact = graph.newest[u]
    while graph.state[contact] != FRIENDS or skip > 0:
        skip -= graph.state[contact] == FRIENDS
        contact = graph.older[contact]
    return int(graph.peer[contact])


@numba.njit(cache=True)
def ask(graph: Graph, u: int, v: int, accepted: bool) -> None:
    """Note u's request to v, the first of the pair or not, and whether it will be accepted."""
    contact = find(graph, u, v)
    if contact < 0:
        contact = graph.used[0]
        graph.used[0] += 2
        for side, x, y in ((contact, u, v), (contact + 1, v, u)):
            graph.peer[side] = y
            graph.older[side] = graph.newest[x]
            graph.newest[x] = side
    graph.state[contact] = graph.state[contact ^ 1] = AWAITED if accepted else ASKED


@numba.njit(cache=True)
def befriend(graph: Graph, u: int, v: int) -> None:
    contact = find(graph, u, v)
    graph.state[contact] = graph.state[contact ^ 1] = FRIENDS
    graph.friends[u] += 1
    graph.friends[v] += 1


@numba.njit(cache=True)
def remember(graph: Graph, u: int, v: int) -> None:
    graph.partner[u, graph.messages[u] % RECENT] = v
    graph.messages[u] += 1
