"""A recommender asked about every scored event of a period, live or frozen."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation.tasks import LEVELS, Events, Exclusions
from friendrec.pipeline.retrieval.exclusion import rows_of
from friendrec.pipeline.retrieval.protocol import Queries, Ranker, Retriever

BLOCK_QUERIES = 1024
SEARCH_DEPTH = 100
"""Places that are asked of a retriever without a full ranking; a target beyond them has an infinite rank."""
EVERYTHING = slice(None)


class Recommender(Protocol):
    """A trained model with the index of its candidates, which are the users of the train period."""

    @property
    def retriever(self) -> Retriever: ...

    def queries(self, actors: NDArray[np.int64], as_of: NDArray[np.int64]) -> Queries:
        """What each actor (dense row) would ask for given everything strictly before `as_of` (µs)."""
        ...


def recommender_ranks(
    data: PreparedData,
    events: Events,
    exclusions: Exclusions,
    recommender: Recommender,
    state: str,
    advance: Callable[[int], None] = lambda scored: None,
    share: slice = EVERYTHING,
) -> NDArray[np.float64]:
    """Rank of each event's target at each level of exclusion, `[LEVELS, E]`; nan where no task asks.

    `advance` is told how many events each block has scored. Of the blocks those in `share` are scored; the blocks
    themselves are the same whoever scores them, and so are their ranks to the last bit. nan for the others.
    """
    ranks = np.full((LEVELS, len(events.index)), np.nan)
    for level, at, (queries,) in questions(data, events, exclusions, [recommender], state, advance, share):
        ranks[level, at] = target_ranks(recommender.retriever, queries, events.target[at])
    return ranks


def questions(
    data: PreparedData,
    events: Events,
    exclusions: Exclusions,
    recommenders: Sequence[Recommender],
    state: str,
    advance: Callable[[int], None],
    share: slice,
) -> Iterator[tuple[int, NDArray[np.int64], list[Queries]]]:
    """A level of exclusion, the events of a block that some task ranks there, and what each recommender is asked."""
    actors, as_of, query = asked(data, events, state)
    order = np.argsort(query, kind="stable")
    levels = [events.at_level(level) for level in range(LEVELS)]
    for begin in range(0, len(actors), BLOCK_QUERIES)[share]:
        end = min(begin + BLOCK_QUERIES, len(actors))
        blocks = [recommender.queries(actors[begin:end], as_of[begin:end]) for recommender in recommenders]
        chosen = order[slice(*np.searchsorted(query[order], [begin, end]))]
        for level in range(LEVELS):
            at = chosen[levels[level][chosen]]
            hidden = exclusions.at(level, events.actor[at], events.timestamp[at])
            yield level, at, [block.take(query[at] - begin).excluding(*hidden) for block in blocks]
        advance(len(chosen))


def target_ranks(retriever: Retriever, queries: Queries, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rank of each target, `[Q]`: among all candidates if the retriever can tell, else its place among those it finds.

    Found means in a search of SEARCH_DEPTH, exclusions inside and ties shared; infinite where it is not.
    """
    if isinstance(retriever, Ranker):
        return retriever.rank(queries, targets)
    return places_among(*search_with_targets(retriever, queries, targets), targets)


def search_with_targets(
    retriever: Retriever, queries: Queries, targets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The SEARCH_DEPTH best of each query, whose own target counts as allowed."""
    return retriever.search(allowing(queries, targets), SEARCH_DEPTH)


def allowing(queries: Queries, targets: NDArray[np.int64]) -> Queries:
    """The same queries, each with its own target allowed."""
    others = queries.exclude_ids != targets[rows_of(queries.exclude_offsets)]
    offsets = np.concatenate([[0], np.cumsum(others)])[queries.exclude_offsets]
    return queries.excluding(offsets, queries.exclude_ids[others])


def places_among(
    ids: NDArray[np.int64], scores: NDArray[np.floating], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Place of each target among what was found, `[Q, K]`, ties shared; infinite where it is not: `[Q]`."""
    q, place = np.nonzero(ids == targets[:, None])
    mine = scores[q, place][:, None]
    ranks = np.full(len(ids), np.inf)
    ranks[q] = (scores[q] > mine).sum(axis=1) + (1 + (scores[q] == mine).sum(axis=1)) / 2  # tied with itself as well
    return ranks


def asked(
    data: PreparedData, events: Events, state: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The distinct queries behind the events: actors, times (µs), and which of them each event asks.

    Live, a query stands at the event's timestamp; frozen, at the end of the train period, once an actor.
    """
    as_of = events.timestamp if state == "live" else np.full(len(events.actor), data.train_until)
    moments = np.stack([as_of, events.actor], axis=1)
    distinct, query = np.unique(moments, axis=0, return_inverse=True)
    return distinct[:, 1], distinct[:, 0], query.reshape(-1)


@numba.njit(cache=True, nogil=True)
def ranks_among(scores, rows, targets, hidden_offsets, hidden):  # type: ignore[no-untyped-def]
    """1 + the allowed that row `rows[q]` of `scores` puts above target q + half of the others tied with it, `[Q]`."""
    ranks = np.empty(len(rows))
    for q in range(len(rows)):
        row = scores[rows[q]]
        mine = row[targets[q]]
        higher, tied = 0, -1  # itself
        for score in row:
            higher += score > mine
            tied += score == mine
        for v in hidden[hidden_offsets[q] : hidden_offsets[q + 1]]:
            higher -= row[v] > mine
            tied -= row[v] == mine
        ranks[q] = 1 + higher + tied / 2
    return ranks
