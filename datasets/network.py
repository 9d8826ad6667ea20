"""Who is who and who knows whom in a simulated friend network: its parameters, its users, and its state at an instant.

The state is a function of the events so far and of nothing else that chance decides, so that whoever reads the log can
rebuild it: `growth` moves it on while it draws events, `oracle` while it replays them.

A user is an index in order of joining; the tables carry a random permutation of it. Times are days of the activity
clock (`clock`) since the start.
"""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

ACTIONS = ("accept", "block", "message", "request")
ACCEPT, BLOCK, MESSAGE, REQUEST = range(4)
ASKED, ASKED_BY, FRIENDS, BLOCKED = range(4)
"""States of a contact, as its owner sees it: a request sent, a request received, accepted, over for good."""

RECENT = 8
"""Partners of the last messages, and friends made last, that a user remembers."""


class NetworkParameters(NamedTuple):
    """What drives the network: probabilities, unless another unit is given. Delays are on the activity clock."""

    days: float = 180.0
    """Expected length of the log, in days."""
    founders: float = 0.4
    """Share of users who are there from the first day; the others join evenly over the first 95 % of the days."""
    community_size: float = 30.0
    """Mean number of users in a community; sizes themselves vary (gamma, shape 4)."""
    loyalty: float = 0.7
    """A user has the interest that the own community shares (else a random one); the same for the city."""
    rhythm: float = 0.85
    """Swing of a day: the rate of everything is 1 + rhythm at its height, 1 - rhythm in the dead of night."""
    activity_tail: float = 1.8
    """Exponent of the power law of activity: P(activity > x) ~ x ** -tail."""
    activity_most: float = 60.0
    """Where that power law is cut off, in multiples of the least activity."""
    newcomer: float = 15.0
    """What joining adds to a user's rate of visits, in multiples of an average user's ..."""
    newcomer_days: float = 3.0
    """... fading with this time constant, in days."""
    stay: float = 0.3
    """Mean number of further visits that an event sets off by its actor: sessions."""
    stay_days: float = 0.01
    """Mean of their exponential delay, in days."""
    request: float = 0.5
    """A visitor with friends asks someone new instead of messaging a friend (one without friends always does)."""
    triadic: float = 0.25
    """A request goes to a friend of a friend, both friendships among the last made."""
    community: float = 0.55
    """A request goes into the own community."""
    scene: float = 0.1
    """A request goes to anybody of the same interest and city; what remains goes anywhere. A part that finds nobody
    leaves its share to the next."""
    preferential: float = 0.15
    """Appeal of a friend's friend or a neighbour grows by this share with each friend they have."""
    same_interest: float = 4.0
    """Factor of appeal where the interest is the same ..."""
    same_city: float = 4.0
    """... and where the city is."""
    fresh: float = 5.0
    """Appeal grows by up to this share with how lately somebody was active ..."""
    fresh_days: float = 1.0
    """... fading with this time constant, in days."""
    accept_inside: float = 0.6
    """A request inside a community is accepted."""
    accept_outside: float = 0.3
    """A request between communities is accepted."""
    accept_median: float = 0.5
    """Median of the log-normal delay of an acceptance, in days."""
    accept_sigma: float = 1.2
    """Spread of the log of that delay."""
    lapse_days: float = 30.0
    """A request lapses after so many days: it is no longer accepted, and either side may ask anew."""
    greet: float = 0.5
    """Mean number of messages with which an accepted requester thanks, after the delay of an answer."""
    reply: float = 0.4
    """Mean number of answers to a message."""
    answer_days: float = 0.1
    """Mean of the exponential delay of an answer, in days."""
    repeat: float = 0.7
    """A visitor's message goes to one of the partners of the last messages instead of any friend."""
    block_request: float = 0.04
    """Mean number of blocks that meet a request; who has no other friend blocks nobody ..."""
    block_message: float = 0.01
    """... and that meet a message. Both after the delay of an answer."""


class Population(NamedTuple):
    """The users, in order of joining, and their traits."""

    user_id: NDArray[np.int64]  # [users] a permutation
    joined: NDArray[np.float64]  # [users] days since the start
    community: NDArray[np.int64]  # [users]
    interest: NDArray[np.int64]  # [users]
    city: NDArray[np.int64]  # [users]
    activity: NDArray[np.float64]  # [users] rate of visits, relative


class Groups(NamedTuple):
    """A partition of the users: the present members of group g are `member[first[g] : first[g] + size[g]]`."""

    of: NDArray[np.int64]  # [users]
    first: NDArray[np.int64]  # [groups]
    size: NDArray[np.int64]  # [groups]
    member: NDArray[np.int64]  # [users]


class Network(NamedTuple):
    """The state. Contacts are a linked list a user inside flat arrays: contact c of one user is mirrored by c ^ 1."""

    population: Population
    communities: Groups
    scenes: Groups  # same interest and city
    present: NDArray[np.int64]  # [1] users who have joined
    newest: NDArray[np.int32]  # [users] the user's latest contact, or -1
    older: NDArray[np.int32]  # [contacts] the contact before, or -1
    peer: NDArray[np.int32]  # [contacts]
    state: NDArray[np.int8]  # [contacts]
    asked: NDArray[np.float64]  # [contacts] when the pair's last request was sent
    used: NDArray[np.int64]  # [1] contacts in use
    friends: NDArray[np.int32]  # [users] how many
    made: NDArray[np.int32]  # [users] friendships so far, those over included
    friend: NDArray[np.int32]  # [users, RECENT] a ring of the friends made last
    messages: NDArray[np.int32]  # [users] sent and received so far
    partner: NDArray[np.int32]  # [users, RECENT] a ring of the last messages' contacts
    active: NDArray[np.float64]  # [users] time of the last own event
    known: NDArray[np.bool_]  # [users] scratch: see `choices`
    option: NDArray[np.int32]  # [options] scratch
    share: NDArray[np.float64]  # [options] scratch


def empty_network(population: Population, events: int) -> Network:
    """Before anybody has joined, with room for so many events."""
    users, contacts = len(population.joined), 2 * events  # a request makes at most one pair
    communities = groups(population.community)
    options = users + RECENT**2 + int(np.bincount(population.community).max())
    return Network(
        population=population,
        communities=communities,
        scenes=groups(population.interest * (1 + population.city.max()) + population.city),
        present=np.zeros(1, np.int64),
        newest=np.full(users, -1, np.int32),
        older=np.empty(contacts, np.int32),
        peer=np.empty(contacts, np.int32),
        state=np.empty(contacts, np.int8),
        asked=np.empty(contacts),
        used=np.zeros(1, np.int64),
        friends=np.zeros(users, np.int32),
        made=np.zeros(users, np.int32),
        friend=np.empty((users, RECENT), np.int32),
        messages=np.zeros(users, np.int32),
        partner=np.empty((users, RECENT), np.int32),
        active=np.full(users, -np.inf),
        known=np.zeros(users, np.bool_),
        option=np.empty(options, np.int32),
        share=np.empty(options),
    )


def groups(of: NDArray[np.int64]) -> Groups:
    """The partition, with nobody present."""
    sizes = np.bincount(of)
    return Groups(of, np.cumsum(sizes) - sizes, np.zeros(len(sizes), np.int64), np.empty(len(of), np.int64))


def visit_rate(population: Population, events: int, p: NetworkParameters) -> float:
    """Visits a day of a user of activity 1, for about so many events in `p.days`."""
    presence = np.maximum(p.days - population.joined, 0)
    newcomers = (population.joined > 0) * p.newcomer * p.newcomer_days * -np.expm1(-presence / p.newcomer_days)
    visits = (population.activity * presence + newcomers).sum()
    return float(events / events_per_visit(p) / visits)


def events_per_visit(p: NetworkParameters) -> float:
    """Expected events that a visit sets off, its own included, acceptance taken as inside the community.

    Means of a branching process: x = 1 + A x for what a visit, a request, an acceptance and a message set off in all.
    """
    children = np.array(
        [
            [0.0, p.request, 0.0, 1 - p.request],
            [p.stay, 0.0, p.accept_inside, 0.0],
            [p.stay, 0.0, 0.0, p.greet],
            [p.stay, 0.0, 0.0, p.reply],
        ]
    )
    return float(np.linalg.solve(np.eye(4) - children, np.array([0.0, 1.0, 1.0, 1.0]))[0])


# -------------------------------------------------------------------------------------- how the state moves on


@numba.njit(cache=True)
def admit(net: Network) -> int:
    """Let the next user join."""
    user = net.present[0]
    enter(net.communities, user)
    enter(net.scenes, user)
    net.present[0] += 1
    return int(user)


@numba.njit(cache=True)
def enter(partition: Groups, user: int) -> None:
    group = partition.of[user]
    partition.member[partition.first[group] + partition.size[group]] = user
    partition.size[group] += 1


@numba.njit(cache=True)
def find(net: Network, u: int, v: int) -> int:
    """The contact of u with v, or -1."""
    contact = net.newest[u]
    while contact >= 0 and net.peer[contact] != v:
        contact = net.older[contact]
    return int(contact)


@numba.njit(cache=True)
def meet(net: Network, u: int, v: int) -> int:
    """The contact of u with v, made where there is none."""
    contact = find(net, u, v)
    if contact < 0:
        contact = net.used[0]
        net.used[0] += 2
        for side, x, y in ((contact, u, v), (contact + 1, v, u)):
            net.peer[side] = y
            net.older[side] = net.newest[x]
            net.newest[x] = side
    return int(contact)


@numba.njit(cache=True)
def possible(net: Network, action: int, contact: int) -> bool:
    """Whether the contact's owner may take an answering action now: what is between the two has to allow it."""
    state = net.state[contact]
    if action == ACCEPT:
        return bool(state == ASKED_BY)
    if action == MESSAGE:
        return bool(state == FRIENDS)
    others = net.friends[net.peer[contact ^ 1]] - (state == FRIENDS)
    return bool(state != BLOCKED and others > 0)  # so somebody always has a friend left, and the network lives on


@numba.njit(cache=True)
def apply(net: Network, action: int, contact: int, now: float) -> None:
    """Note an event by the contact's owner towards its peer."""
    u, v = net.peer[contact ^ 1], net.peer[contact]
    net.active[u] = now
    if action == REQUEST:
        net.state[contact], net.state[contact ^ 1] = ASKED, ASKED_BY
        net.asked[contact] = net.asked[contact ^ 1] = now
    elif action == ACCEPT:
        net.state[contact] = net.state[contact ^ 1] = FRIENDS
        for x, y in ((u, v), (v, u)):
            net.friend[x, net.made[x] % RECENT] = y
            net.made[x] += 1
            net.friends[x] += 1
    elif action == BLOCK:
        if net.state[contact] == FRIENDS:
            net.friends[u] -= 1
            net.friends[v] -= 1
        net.state[contact] = net.state[contact ^ 1] = BLOCKED
    else:
        for side, x in ((contact, u), (contact ^ 1, v)):
            net.partner[x, net.messages[x] % RECENT] = side
            net.messages[x] += 1


# --------------------------------------------------------------------------------- what an event may set off


@numba.njit(cache=True)
def acceptance(net: Network, u: int, v: int, p: NetworkParameters) -> float:
    """Probability that a request between u and v is accepted, if it does not lapse before."""
    inside = net.population.community[u] == net.population.community[v]
    return p.accept_inside if inside else p.accept_outside


@numba.njit(cache=True)
def answers(action: int, p: NetworkParameters) -> float:
    """Mean number of messages with which the target answers an event."""
    if action == MESSAGE:
        return p.reply
    return p.greet if action == ACCEPT else 0.0


@numba.njit(cache=True)
def blocks(action: int, p: NetworkParameters) -> float:
    """Mean number of blocks with which the target meets an event."""
    if action == REQUEST:
        return p.block_request
    return p.block_message if action == MESSAGE else 0.0
