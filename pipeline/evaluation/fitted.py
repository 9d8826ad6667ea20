"""Baselines fitted on the train period, which therefore exist frozen only: matrix factorisations and random walks.

`als` and `bpr` are those of the package `implicit`, an extra of this one; without it they are left out and the report
says so. Their matrix has a row for every user of the log in order of raw id, so that the seed draws what it drew for
the reference scores; users who come after the train period have nothing in it.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.prepared import OUT, PreparedData
from friendrec.pipeline.evaluation.scoring import EVERYTHING, ranks_among
from friendrec.pipeline.evaluation.tasks import LEVELS, Events, Exclusions

FITTED_BASELINES = ("als", "bpr", "personalised_pagerank")
FACTORS, RESTART, STEPS = 64, 0.15, 15
BLOCK_ACTORS = 64
"""Actors whose scores of all candidates are held at once."""

Scores = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""From actors (dense rows) `[A]` to their scores of all candidates `[A, N]`."""


def missing_baselines() -> dict[str, str]:
    """The baselines that cannot be fitted here, and why."""
    if find_spec("implicit") is not None:
        return {}
    return dict.fromkeys(("als", "bpr"), "the package implicit is not installed: pip install 'friendrec[baselines]'")


def fitted_ranks(
    data: PreparedData,
    events: Events,
    exclusions: Exclusions,
    advance: Callable[[int], None] = lambda scored: None,
    share: slice = EVERYTHING,
) -> dict[str, NDArray[np.float64]]:
    """Ranks `[LEVELS, E]` of each baseline that can be fitted; `advance` is told when one has scored the events.

    Those in `share` are fitted; the others have nan for ranks.
    """
    names = [name for name in FITTED_BASELINES if name not in missing_baselines()]
    ranks = {name: np.full((LEVELS, len(events.index)), np.nan) for name in names}
    for name in names[share]:
        scores = pagerank(data) if name == "personalised_pagerank" else factorised(data, name)
        ranks[name] = ranks_by_scores(events, exclusions, scores)
        advance(len(events.index))
    return ranks


def factorised(data: PreparedData, name: str) -> Scores:
    """Products of the factors of user and item; a user without events in the train period scores all alike."""
    from implicit.als import AlternatingLeastSquares
    from implicit.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix
    from threadpoolctl import threadpool_limits

    place = np.argsort(np.argsort(data.user_ids))  # of each dense row in order of raw id
    sent = np.flatnonzero((data.direction == OUT) & (data.timestamp < data.train_until))
    actor = np.searchsorted(data.offsets, sent, side="right") - 1
    counts = csr_matrix((np.ones(len(sent)), (place[actor], place[data.partner[sent]])), (data.num_users,) * 2)
    counts.data = np.log1p(counts.data)
    with threadpool_limits(1, "blas"):  # implicit has threads of its own
        model: Any = (
            AlternatingLeastSquares(FACTORS, regularization=0.05, alpha=10, iterations=15, random_state=0)
            if name == "als"
            else BayesianPersonalizedRanking(
                FACTORS, learning_rate=0.05, regularization=0.01, iterations=100, num_threads=1, random_state=0
            )  # several threads race, and no two fits would agree
        )
        model.fit(counts, show_progress=False)
    users, items = model.user_factors[place], model.item_factors[place[: data.num_train_users]]
    return lambda actors: users[actors] @ items.T


def pagerank(data: PreparedData) -> Scores:
    """Where a walk from the actor stands after STEPS steps, each starting over with probability RESTART.

    It walks the undirected simple graph of the train period.
    """
    num = data.num_train_users
    known = np.flatnonzero(data.timestamp < data.train_until)
    user = np.searchsorted(data.offsets, known, side="right") - 1
    pairs = np.unique(user * num + data.partner[known])
    offsets = np.searchsorted(pairs, np.arange(num + 1) * num)
    return lambda actors: _walk(offsets, pairs % num, actors).T


def ranks_by_scores(events: Events, exclusions: Exclusions, scores: Scores) -> NDArray[np.float64]:
    """Rank of each event's target at each level of exclusion, `[LEVELS, E]`; nan where no task asks."""
    actors, asked = np.unique(events.actor, return_inverse=True)
    order = np.argsort(asked, kind="stable")
    ranks = np.full((LEVELS, len(asked)), np.nan)
    for begin in range(0, len(actors), BLOCK_ACTORS):
        block = np.ascontiguousarray(scores(actors[begin : begin + BLOCK_ACTORS]))
        chosen = order[slice(*np.searchsorted(asked[order], [begin, begin + BLOCK_ACTORS]))]
        for level in range(LEVELS):
            at = chosen[events.at_level(level)[chosen]]
            hidden = exclusions.at(level, events.actor[at], events.timestamp[at])
            ranks[level, at] = ranks_among(block, asked[at] - begin, events.target[at], *hidden)
    return ranks


@numba.njit(cache=True, nogil=True)
def _walk(offsets, other, actors):  # type: ignore[no-untyped-def]
    """Visiting probabilities from each actor, `[N, A]`; 0 from an actor who is not in the graph."""
    num = len(offsets) - 1
    degrees = np.maximum(offsets[1:] - offsets[:-1], 1).astype(np.float32)
    start = np.zeros((num, len(actors)), np.float32)
    for a in range(len(actors)):
        if actors[a] < num:
            start[actors[a], a] = 1
    at = start.copy()
    for _ in range(STEPS):
        leaving = at / degrees.reshape(-1, 1)
        at = np.float32(RESTART) * start
        for v in range(num):
            for s in range(offsets[v], offsets[v + 1]):
                for a in range(len(actors)):
                    at[v, a] += np.float32(1 - RESTART) * leaving[other[s], a]
    return at
