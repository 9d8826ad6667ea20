"""A run searched in full, and by the best lists alone, so that a share of all vectors is compared: what is found then.

Runs with clusters are searched by their own lists, the others by as many lists of k-means, the best that FAISS makes.
What counts as compared is told by `contenders.py`.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.models.two_tower import TwoTower
from friendrec.pipeline.evaluation.contenders import WAYS, Clusters, FaissLists, k_means
from friendrec.pipeline.evaluation.frontier import agreement, asked, sampled_events
from friendrec.pipeline.evaluation.scoring import BLOCK_QUERIES, places_among
from friendrec.pipeline.inference import Recommender, centroids_of, open_recommender
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.protocol import Queries

SHARES = {"100 %": 1.0, "10 %": 0.1, "1 %": 0.01}
"""Of the vectors, to be compared at most, on average over the queries; the first is the exact search."""
SAMPLE = 1000
"""Queries on which the number of lists for a share is chosen."""
DEPTH = 10
EVERY = 1 << 62

Lists = Clusters | FaissLists
Advance = Callable[[int, int], None]
"""Is told how many are done, of how many."""


def nobody(done: int, of: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Searches:
    """What a run finds at each share: S of them, the exact search first."""

    hits: NDArray[np.float64]  # [S, E] whether the target is among the first ten; nan where no list fits in the share
    compared: NDArray[np.float64]  # [S] mean share of the vectors compared; nan likewise
    nprobe: NDArray[np.int64]  # [S] lists looked into; 0 where all vectors are compared, or no list fits
    least: NDArray[np.float64]  # [] share that a single list takes
    actors: NDArray[np.int64]  # [E] of the events: live new links of the validation period

    def save(self, directory: Path) -> None:
        np.savez_compressed(directory / "searches.npz", **vars(self))

    @classmethod
    def load(cls, directory: Path) -> Self:
        with np.load(directory / "searches.npz") as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def searched(run: str | Path, data: str | Path, advance: Advance = nobody) -> Searches:
    """Ask a run about every event at every share; `advance` is told how many of how many events are done."""
    recommender = open_recommender(run, data)
    exact = exact_of(recommender)
    events, total = sampled_events(recommender.data, recommender.exclusions, EVERY)
    sample = asked(recommender, sampled_events(recommender.data, recommender.exclusions, SAMPLE)[0])
    lists = lists_of(recommender, sample)
    nprobe, least = choose(lists, sample, len(exact))
    hits, compared = np.full((2, len(SHARES), total), np.nan)
    for rows in np.split(np.arange(total), range(BLOCK_QUERIES, total, BLOCK_QUERIES)):
        queries, targets = asked(recommender, events.take(rows)), events.target[rows]
        hits[0, rows], compared[0, rows] = exact.rank(queries, targets) <= DEPTH, 1
        for level in np.flatnonzero(nprobe):
            effort = int(nprobe[level])
            hits[level, rows] = places_among(*lists.search(queries, DEPTH, effort), targets) <= DEPTH
            compared[level, rows] = lists.compared(queries, DEPTH, effort) / len(exact)
        advance(int(rows[-1]) + 1, total)
    return Searches(hits, compared.mean(axis=1), nprobe, np.array(least), events.actor)


def exact_of(recommender: Recommender) -> ExactIndex:
    """The index of the run's own vectors, all of which are compared."""
    assert isinstance(recommender.retriever, ExactIndex)
    return recommender.retriever


def lists_of(recommender: Recommender, queries: Queries) -> Lists:
    """Lists of the run's own vectors: its clusters, or those of k-means that find most of the best for `queries`."""
    exact, config = exact_of(recommender), recommender.config.model
    assert isinstance(recommender.model, TwoTower)
    if config.clusters == "off":
        number = replace(config, clusters="residual").clusters_of(len(exact))
        expected, effort = exact.search(queries, DEPTH), max(1, number // 10)
        made = [FaissLists.flat(exact.vectors, *k_means(way, exact.vectors, number)) for way in WAYS]
        return max(made, key=lambda lists: agreement(lists.search(queries, DEPTH, effort), expected))
    centroids = centroids_of(recommender.model, recommender.packer)
    if centroids is None:
        raise FriendrecError("a run ended before its clusters were placed: train for longer, with more --minutes")
    return Clusters.of(exact.vectors, exact.user_ids, centroids)


def choose(lists: Lists, queries: Queries, candidates: int) -> tuple[NDArray[np.int64], float]:
    """For each share the most lists whose mean work is within it, 0 where not even one is; and the work of one.

    The first share, of the exact search, looks into no list.
    """

    def work(nprobe: int) -> float:
        return lists.compared(queries, DEPTH, nprobe) / candidates

    least, most = work(1), lists.efforts[-1]
    found = [0] * len(SHARES)
    for level, share in enumerate(SHARES.values()):
        if level and least <= share:
            found[level] = bisect_right(range(1, most + 1), share, key=work)
    return np.array(found), least
