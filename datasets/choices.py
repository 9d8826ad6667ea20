"""What a visitor of the simulated network does, as probabilities: `growth` draws from them, `oracle` ranks by them.

A visitor u messages a friend, or asks somebody new. Whom u may ask (*eligible*) is present, is not u, and has nothing
open with u. With E(·) the eligible part of a set,

    P(ask v) = triadic · T(v) + community · C(v) + scene · [v ∈ E(scene)] / |E(scene)| + rest · [v ∈ E(all)] / |E(all)|

    appeal(v) = (1 + preferential · friends(v)) · same_interest^[=] · same_city^[=] · (1 + fresh · exp(-idle(v) / days))
    T(v) ∝ appeal(v) · Σ over friends w made last of [v ∈ friends w made last] / number of the latter
    C(v) ∝ appeal(v) for the members of the own community

and a part that finds nobody leaves its share to the next. What is few is listed, option by option; the scene and the
rest, which may be a million users, are one number each.
"""

from typing import NamedTuple

import numba
import numpy as np

from friendrec.datasets.network import ASKED, ASKED_BY, FRIENDS, RECENT, Network, NetworkParameters


class Requests(NamedTuple):
    """Whom a visitor may ask: user `net.option[i]` with probability `net.share[i]` for i below `listed`.

    Besides, every eligible member of the scene with `scene_each`, and everybody eligible with `each`.
    """

    listed: int
    scene_each: float
    in_scene: int  # how many are eligible
    each: float
    anywhere: int  # how many are eligible


@numba.njit(cache=True)
def request_share(net: Network, u: int, p: NetworkParameters) -> float:
    """Probability that a visitor asks somebody new."""
    return p.request if net.friends[u] > 0 else 1.0


@numba.njit(cache=True)
def message_options(net: Network, u: int, p: NetworkParameters) -> int:
    """List the friends of u: to contact `net.option[i]` goes a message with probability `net.share[i]`.

    Returns the length of the list, which names recent partners twice.
    """
    listed, contact = 0, net.newest[u]
    while contact >= 0:
        if net.state[contact] == FRIENDS:
            net.option[listed] = contact
            listed += 1
        contact = net.older[contact]
    partners = min(net.messages[u], RECENT)
    remembered = 0
    for slot in range(partners):
        remembered += net.state[net.partner[u, slot]] == FRIENDS
    repeat = p.repeat if remembered > 0 else 0.0
    for i in range(listed):
        net.share[i] = (1 - repeat) / listed
    for slot in range(partners):
        contact = net.partner[u, slot]
        if net.state[contact] == FRIENDS:
            net.option[listed], net.share[listed] = contact, repeat / remembered
            listed += 1
    return listed


@numba.njit(cache=True)
def request_options(net: Network, u: int, now: float, p: NetworkParameters) -> Requests:
    """List whom u may ask. Afterwards `net.known` says who is not eligible, until `forget`."""
    known, in_scene = mark(net, u, now, p)
    scene = net.scenes.of[u]
    in_scene = net.scenes.size[scene] - in_scene
    anywhere = net.present[0] - known
    listed = friends_of_friends(net, u, now, p)
    left = normalise(net, 0, listed, p.triadic)
    first = listed
    home = net.communities.of[u]
    for place in range(net.communities.first[home], net.communities.first[home] + net.communities.size[home]):
        v = net.communities.member[place]
        if not net.known[v]:
            net.option[listed], net.share[listed] = v, appeal(net, u, v, now, p)
            listed += 1
    left = p.scene + normalise(net, first, listed, p.community + left)
    scene_share = left if in_scene > 0 else 0.0
    rest = 1 - p.triadic - p.community - p.scene + left - scene_share
    return Requests(listed, scene_share / max(in_scene, 1), in_scene, rest / max(anywhere, 1), anywhere)


@numba.njit(cache=True)
def friends_of_friends(net: Network, u: int, now: float, p: NetworkParameters) -> int:
    listed = 0
    for i in range(min(net.made[u], RECENT)):
        w = net.friend[u, i]
        steps = min(net.made[w], RECENT)
        for j in range(steps):
            v = np.int64(net.friend[w, j])
            if not net.known[v]:
                net.option[listed], net.share[listed] = v, appeal(net, u, v, now, p) / steps
                listed += 1
    return listed


@numba.njit(cache=True)
def normalise(net: Network, first: int, end: int, total: float) -> float:
    """Let the weights of a part sum to its share; returns the share where there is nobody to have it."""
    weight = 0.0
    for i in range(first, end):
        weight += net.share[i]
    if weight <= 0:
        return total
    for i in range(first, end):
        net.share[i] *= total / weight
    return 0.0


@numba.njit(cache=True)
def appeal(net: Network, u: int, v: int, now: float, p: NetworkParameters) -> float:
    people = net.population
    weight = 1 + p.preferential * net.friends[v]
    if people.interest[u] == people.interest[v]:
        weight *= p.same_interest
    if people.city[u] == people.city[v]:
        weight *= p.same_city
    return weight * (1 + p.fresh * np.exp((net.active[v] - now) / p.fresh_days))


@numba.njit(cache=True)
def mark(net: Network, u: int, now: float, p: NetworkParameters) -> tuple[int, int]:
    """Set `net.known` of u and of whom u has something open with; how many they are, and how many of them in u's scene.

    A request that has lapsed is not open.
    """
    net.known[u] = True
    known, in_scene = 1, 1
    contact = net.newest[u]
    while contact >= 0:
        v, state = net.peer[contact], net.state[contact]
        asking = state in (ASKED, ASKED_BY)
        if not asking or now - net.asked[contact] < p.lapse_days:
            net.known[v] = True
            known += 1
            in_scene += net.scenes.of[v] == net.scenes.of[u]
        contact = net.older[contact]
    return known, in_scene


@numba.njit(cache=True)
def forget(net: Network, u: int) -> None:
    """Undo `mark`."""
    net.known[u] = False
    contact = net.newest[u]
    while contact >= 0:
        net.known[net.peer[contact]] = False
        contact = net.older[contact]
