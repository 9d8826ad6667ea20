"""From a decoder's next-token probabilities to existing users: beam search in the trie, samples, scores of given codes.

The score of a user is log P(code) = Σ_l log P(token l | context, tokens before l) over the levels of its code. Tokens
under which no allowed user exists are masked and the others keep their probabilities, so that hiding a user changes
neither score nor order of the others. Q queries, R beams of all queries, W of each query, L levels.
"""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from friendrec.models.drawing import exponential, legal_children, run, token_distribution, winners
from friendrec.models.expansion import expand
from friendrec.models.sampling import Sampling
from friendrec.models.trie import NO_TOKEN, Jagged, Trie


class Decoder(Protocol):
    """What writes codes, token by token. Tensors come on the CPU; the decoder moves them to where it lives.

    Nothing here asks that the exponentials of a level sum to 1.
    """

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each level, `[L]`."""
        ...

    def cache(self, context: Tensor) -> Any:
        """Whatever is computed once a query, from its context, float32 `[Q, X]`."""
        ...

    def log_probabilities(self, cache: Any, row: Tensor, prefix: Tensor) -> Tensor:
        """log P of each token of level l, float32 `[R, sizes[l]]`.

        `row` int64 `[R]`, ascending: whose context, a place in the cache; `prefix` int64 `[R, l]`: the tokens before.
        R is far greater than Q, so that nothing as wide as a context should be made a row.
        """
        ...


@torch.inference_mode()
def beam_search(
    decoder: Decoder, cache: Any, trie: Trie, hidden: Jagged, width: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best `width` candidates of each query that beams of that width find: ids and log P(code), `[Q, W]`.

    Best first, ties to the lower id; -1 and -inf behind the last. `hidden` are the leaves that a query may not be
    given, ascending. As every beam has an allowed leaf beneath, as many come back as there are allowed, up to W; beams
    at least as wide as every level find the best of all. A width of 1 is greedy.
    """
    num = len(hidden[0]) - 1
    row, nodes, scores = np.arange(num), np.zeros(num, np.int64), np.zeros(num, np.float32)
    prefix = np.empty((num, 0), np.int64)
    for level in range(trie.num_levels):
        offsets, users = np.searchsorted(row, np.arange(num + 1)), trie.users_at(level)
        source, log_p = _next_tokens(decoder, cache, trie, row, nodes, prefix)
        arrays = trie.first_child_at(level), trie.tokens[level], trie.first_leaf[level], users
        kept, parents, best = expand(offsets, nodes, scores, source, log_p, *arrays, *hidden, width)
        row, place = np.nonzero(kept >= 0)
        nodes, scores, parent = kept[row, place], best[row, place], parents[row, place]
        if not len(users):
            prefix = np.column_stack([prefix[parent], trie.tokens[level][nodes]]).astype(np.int64)
    return kept, best


@torch.inference_mode()
def sample(
    decoder: Decoder,
    cache: Any,
    trie: Trie,
    hidden: Jagged,
    num_samples: int,
    sampling: Sampling,
    keys: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Distinct candidates in the order in which they are drawn, without replacement, and −log times: `[Q, S]`.

    The first is drawn by Π_l P(token l | context, tokens before l), where each factor is renormalised over the legal
    tokens that `sampling` leaves; each next by the same among those not yet drawn, so that S users come back where
    there are so many. Whom top_k or nucleus leave out follows when all others are drawn. What is found is a stochastic
    beam search (Kool et al. 2019) run as a race, see `drawing`. A query's noise comes from its key `[Q]` and the seed
    alone, whatever else is asked. -1 and -inf behind the last.
    """
    num = len(hidden[0]) - 1
    row, nodes, log_p_so_far = np.arange(num), np.zeros(num, np.int64), np.zeros(num)
    log_time = np.log(exponential(sampling.seed, keys, -1, nodes))
    prefix = np.empty((num, 0), np.int64)
    for level in range(trie.num_levels):
        source, log_p = _next_tokens(decoder, cache, trie, row, nodes, prefix)
        beam, child = legal_children(trie, level, row, nodes, hidden)
        token = trie.tokens[level][child].astype(np.int64)
        written = token != NO_TOKEN
        step = np.zeros(len(child))
        step[written] = log_p[source[beam[written]], token[written]]
        step = token_distribution(beam, step, sampling)
        noise = exponential(sampling.seed, keys[row[beam]], level, child)
        time = run(beam, step, noise, log_time, log_p_so_far)
        chosen = winners(row[beam], time, num_samples)
        beam, log_p_so_far = beam[chosen], (log_p_so_far[beam] + step)[chosen]
        row, nodes, log_time = row[beam], child[chosen], time[chosen]
        prefix = np.column_stack([prefix[beam], token[chosen]])
    ids, scores = np.full((num, num_samples), -1, np.int64), np.full((num, num_samples), -np.inf)
    place = np.arange(len(row)) - np.searchsorted(row, row)
    ids[row, place], scores[row, place] = trie.users[nodes], -log_time
    return ids, scores


@torch.inference_mode()
def score_leaves(
    decoder: Decoder, cache: Any, trie: Trie, row: NDArray[np.int64], leaves: NDArray[np.int64], most_rows: int
) -> NDArray[np.float32]:
    """log P(code) of given leaves `[M]`, each to the query `row` `[M]`: the very sums that beams would carry.

    Both ascend, `leaves` within a row, so that what shares a prefix is neighboured and the decoder is asked once a
    prefix, about `most_rows` at a time.
    """
    nodes, scores = trie.paths(leaves), np.zeros(len(leaves), np.float32)
    first = np.ones(len(leaves), bool)  # of those who share the prefix so far
    first[1:] = row[1:] != row[:-1]
    prefix = np.empty((len(leaves), 0), np.int64)
    for level in range(trie.num_levels):
        token = trie.tokens[level][nodes[:, level]].astype(np.int64)
        above = nodes[:, level - 1] if level else np.zeros(len(leaves), np.int64)
        starts = np.flatnonzero(first)
        for begin in range(0, len(starts), most_rows):
            asked = starts[begin : begin + most_rows]
            some = slice(asked[0], starts[begin + most_rows] if begin + most_rows < len(starts) else None)
            source, log_p = _next_tokens(decoder, cache, trie, row[asked], above[asked], prefix[asked])
            of_prefix = source[np.cumsum(first[some]) - 1]
            goes_on = token[some] != NO_TOKEN
            scores[some][goes_on] += log_p[of_prefix[goes_on], token[some][goes_on]]
        first[1:] |= nodes[1:, level] != nodes[:-1, level]
        prefix = np.column_stack([prefix, token])
    return scores


def _next_tokens(
    decoder: Decoder,
    cache: Any,
    trie: Trie,
    row: NDArray[np.int64],
    nodes: NDArray[np.int64],
    prefix: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """log P of the tokens below each beam, `[·, size]`, and which of its rows is the beam's, `[R]`.

    `nodes` are those of the level above, at which the beams are. Who has no token below, for its code has ended, is
    not asked about.
    """
    level = prefix.shape[1]
    goes_on = trie.tokens[level][trie.first_child_at(level)[nodes + 1] - 1] != NO_TOKEN
    source = np.cumsum(goes_on) - goes_on
    if not goes_on.any():
        return source, np.empty((0, trie.sizes[level]), np.float32)
    asked = (torch.from_numpy(part[goes_on]) for part in (row, prefix))
    return source, decoder.log_probabilities(cache, *asked).float().cpu().numpy()
