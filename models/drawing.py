"""Users drawn without replacement: a race down the trie, one level at a time, all queries at once.

Every user of probability P runs for a time ~ Exponential(rate P); the order of arrival is a draw without replacement.
A prefix arrives when the first user beneath it does, so that it hands its time to one child, taken by the children's
probabilities p; the others come later by an Exponential(rate P(prefix) · p) each, for the exponential has no memory.
So the first S prefixes of a level are enough to know the first S of the next. In Gumbel noise, −log of these times,
it is stochastic beam search (Kool et al. 2019). Times and probabilities are kept as logarithms, in float64.

R beams, C children of all beams, those of a beam next to each other.
"""

import numpy as np
from numpy.typing import NDArray

from friendrec.hashing import GOLDEN, splitmix64
from friendrec.models.expansion import greatest
from friendrec.models.sampling import Sampling
from friendrec.models.trie import Jagged, Trie

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

LEFT_OUT = 1e9
"""Taken from the log-probability of tokens that a filter leaves out: they come after all others, and do come."""


def legal_children(trie: Trie, level: int, row: Places, nodes: Places, hidden: Jagged) -> tuple[Places, Places]:
    """Beam and place in the level of every child that a leaf lies beneath which its query does not hide, `[C]`.

    `row` and `nodes` `[R]` are the beams' queries and their places in the level above.
    """
    begins = trie.first_child_at(level)
    begin, end = begins[nodes].astype(np.int64), begins[nodes + 1]
    counts = end - begin
    beam = np.repeat(np.arange(len(nodes)), counts)
    child = np.arange(len(beam)) + np.repeat(begin - (np.cumsum(counts) - counts), counts)
    first = trie.first_leaf[level]
    start, stop = (first[child], first[child + 1]) if len(first) else (child, child + 1)
    offsets, leaves = hidden
    keys = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * len(trie) + leaves
    of_query = row[beam] * len(trie)
    hides = np.searchsorted(keys, of_query + stop) - np.searchsorted(keys, of_query + start)
    legal = hides < stop - start
    return beam[legal], child[legal]


def token_distribution(beam: Places, log_p: Floats, sampling: Sampling) -> Floats:
    """Log-probability of each child to be drawn next, `[C]`: at the temperature, of what the filters leave.

    `top_k` first, then `nucleus` of what it leaves; ties stay with the lower token.
    """
    log_p = _normalised(beam, log_p / sampling.temperature)
    if sampling.top_k is None and sampling.nucleus is None:
        return log_p
    order = np.lexsort((-log_p, beam))  # beams stay where they are
    starts, segment = _segments(beam)
    first = starts[segment]
    rank = np.empty(len(beam), np.int64)
    rank[order] = np.arange(len(beam)) - first
    stays = rank < (sampling.top_k or len(beam))
    if sampling.nucleus is not None:
        share = np.exp(_normalised(beam, np.where(stays, log_p, -np.inf)))[order]
        before = np.cumsum(share) - share
        before -= before[first]
        stays[order] &= before < sampling.nucleus
    return np.where(stays, _normalised(beam, np.where(stays, log_p, -np.inf)), log_p - LEFT_OUT)


def run(beam: Places, log_p: Floats, noise: Floats, log_time: Floats, log_p_so_far: Floats) -> Floats:
    """Logarithm of the time at which each child arrives, `[C]`, given the beams' times and probabilities `[R]`.

    `noise` `[C]` is exponential of rate 1.
    """
    if not len(beam):
        return np.empty(0)
    arrival = np.log(noise) - log_p
    starts, segment = _segments(beam)
    first = np.minimum.reduceat(arrival, starts)[segment]
    with np.errstate(divide="ignore"):  # the first is later by 0
        later = arrival + np.log(-np.expm1(first - arrival))
    return np.logaddexp(log_time[beam], later - log_p_so_far[beam])


def winners(row: Places, log_time: Floats, num_samples: int) -> Places:
    """Which of the children are the first of their query, in the order of arrival, query by query."""
    starts, _ = _segments(row)
    chosen: Places = greatest(np.append(starts, len(row)), -log_time, num_samples)
    return chosen[chosen >= 0]


def exponential(seed: int, keys: Places, level: int, nodes: Places) -> Floats:
    """Noise of rate 1 that is a function of its arguments, by hashing them (splitmix64, Steele et al. 2014)."""
    state = np.zeros(len(nodes), np.uint64)
    for part in (np.full(len(nodes), seed), keys, np.full(len(nodes), level), nodes):
        state = splitmix64(state + GOLDEN + part.astype(np.uint64))
    return -np.log(((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def _normalised(beam: Places, log_p: Floats) -> Floats:
    """Log-probabilities that add up to 1 over the children of each beam."""
    if not len(beam):
        return log_p
    starts, segment = _segments(beam)
    greatest = np.maximum.reduceat(log_p, starts)
    total = np.add.reduceat(np.exp(log_p - greatest[segment]), starts)
    return log_p - (greatest + np.log(total))[segment]


def _segments(beam: Places) -> tuple[Places, Places]:
    """Where each beam's children begin, and which of these beginnings is each child's."""
    first = np.ones(len(beam), bool)
    first[1:] = beam[1:] != beam[:-1]
    return np.flatnonzero(first), np.cumsum(first) - 1
