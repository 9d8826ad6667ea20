"""Baselines of shared neighbours, in the undirected simple graph of whoever has met: each event expanded by two hops.

    actor u ── n ── w      common_neighbours(u, w) = number of n;   adamic_adar(u, w) = Σ 1 / ln degree(n)

Every candidate's scores to the event's actor are laid out densely and compared with the target's in one pass.
Adamic–Adar counts in millionths, so that equal sums tie; unlike those of pair scores, its ties are always broken by the
score that comes after.
"""

import numba
import numpy as np

from friendrec.pipeline.evaluation.tasks import LEVELS

NEIGHBOUR_BASELINES: dict[str, tuple[str, ...]] = {
    "common_neighbours": ("common_neighbours",),
    "adamic_adar": ("adamic_adar",),
    "adamic_adar+recent_popularity": ("adamic_adar", "recent_popularity"),
    "adamic_adar+last_active": ("adamic_adar", "last_active"),
}
"""Scores of each baseline, the first deciding; the order is that of `place_by_neighbours`."""


@numba.njit(cache=True, nogil=True)
def place_by_neighbours(  # type: ignore[no-untyped-def]
    actor, target, known, slot_offsets, slot_other, recent, last_active, named, hidden_from, num_candidates
):  # fmt: skip
    """The target's rank at each level of exclusion under each baseline, `[LEVELS, 4]`.

    `known[n]` is how many of its slots a user's scores know of: its degree. `hidden_from` is the lowest level that
    hides each of the `named` candidates; nothing hides the others.
    """
    common, adamic = _two_hops(actor, known, slot_offsets, slot_other)
    level_of = np.full(num_candidates, LEVELS)
    level_of[named] = hidden_from
    above, same = np.zeros((LEVELS + 1, 4), np.int64), np.zeros((LEVELS + 1, 4), np.int64)
    for w in range(num_candidates):
        if w == target:
            continue
        level = level_of[w]
        above[level, 0] += common[w] > common[target]
        same[level, 0] += common[w] == common[target]
        if adamic[w] > adamic[target]:
            above[level, 1:] += 1
        elif adamic[w] == adamic[target]:
            same[level, 1] += 1
            above[level, 2] += recent[w] > recent[target]
            same[level, 2] += recent[w] == recent[target]
            above[level, 3] += last_active[w] > last_active[target]
            same[level, 3] += last_active[w] == last_active[target]
    ranks = np.empty((LEVELS, 4))
    for level in range(LEVELS):  # allowed is who a later level hides, or none
        ranks[level] = 1 + above[level + 1 :].sum(axis=0) + same[level + 1 :].sum(axis=0) / 2
    return ranks


@numba.njit(cache=True, nogil=True)
def _two_hops(actor, known, slot_offsets, slot_other):  # type: ignore[no-untyped-def]
    """Common neighbours and Adamic–Adar (in millionths) of the actor with every user, `[U]` each."""
    common, adamic = np.zeros(len(known), np.int64), np.zeros(len(known))
    for s in range(slot_offsets[actor], slot_offsets[actor] + known[actor]):
        neighbour = slot_other[s]
        degree = known[neighbour]
        weight = 1 / np.log(degree) if degree > 1 else 0.0  # who knows but the actor leads to nobody else
        for t in range(slot_offsets[neighbour], slot_offsets[neighbour] + degree):
            common[slot_other[t]] += 1
            adamic[slot_other[t]] += weight
    for w in range(len(adamic)):
        adamic[w] = np.rint(adamic[w] * 1e6)
    return common, adamic
