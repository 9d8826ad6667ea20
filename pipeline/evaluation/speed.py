"""How long a query takes on one thread, of many searches of many runs side by side."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from friendrec.pipeline.evaluation.frontier import asked, sampled_events
from friendrec.pipeline.evaluation.reduced import DEPTH, EVERY, SAMPLE, Advance, Lists, exact_of, lists_of, nobody
from friendrec.pipeline.evaluation.tasks import Events
from friendrec.pipeline.evaluation.threads import one_thread
from friendrec.pipeline.inference import Recommender, open_recommender

BLOCKS, BLOCK_SIZE, ROUNDS = 16, 64, 4
"""Blocks of queries, each of other actors, and how often every block is asked; the fastest time counts."""


@dataclass(frozen=True)
class Seconds:
    """A query of each of B blocks, by run."""

    encode: NDArray[np.float64]  # [R, B]
    search: NDArray[np.float64]  # [R, S, B]; nan where no list fits in the share
    candidates: int


def measure(runs: Sequence[str], data: str, nprobe: NDArray[np.int64], advance: Advance = nobody) -> Seconds:
    """Time encoding and search of ten friends, each run with `nprobe` `[R, S]` lists: 0 for none, first for all.

    All runs are asked the same in turns, so that what else the machine does harms all alike.
    """
    recommenders = [open_recommender(run, data) for run in runs]
    lists = [lists_of(recommender, asked(recommender, _events(recommender, SAMPLE))) for recommender in recommenders]
    blocks = _blocks(recommenders[0])
    encode = np.full((len(runs), len(blocks)), np.inf)
    search = np.full((*nprobe.shape, len(blocks)), np.inf)
    with one_thread():
        for turn in range(ROUNDS * len(blocks)):
            block = turn % len(blocks)
            for run, recommender in enumerate(recommenders):
                times = _times(recommender, lists[run], nprobe[run], blocks[block])
                encode[run, block] = min(encode[run, block], times[0])
                search[run, :, block] = np.fmin(search[run, :, block], times[1:])
            advance(turn + 1, ROUNDS * len(blocks))
    sizes = np.array([len(block.index) for block in blocks])
    search[:, 1:][nprobe[:, 1:] == 0] = np.nan
    return Seconds(encode / sizes, search / sizes, len(exact_of(recommenders[0])))


def _events(recommender: Recommender, most: int) -> Events:
    return sampled_events(recommender.data, recommender.exclusions, most)[0]


def _blocks(recommender: Recommender) -> list[Events]:
    """Events in the order of their actors, evenly spread over these."""
    events = _events(recommender, EVERY)
    by_actor = np.argsort(events.actor, kind="stable")
    size = min(BLOCKS * BLOCK_SIZE, len(by_actor))
    chosen = by_actor[np.linspace(0, len(by_actor) - 1, size).astype(np.int64)]
    return [events.take(rows) for rows in np.array_split(chosen, min(BLOCKS, size))]


def _times(recommender: Recommender, lists: Lists, nprobe: NDArray[np.int64], events: Events) -> list[float]:
    """Seconds of encoding, of the exact search, and of one by each number of lists; inf where there is none."""
    times, began = [], time.perf_counter()
    queries = asked(recommender, events)
    times.append(time.perf_counter() - began)
    for level, effort in enumerate(nprobe.tolist()):
        began = time.perf_counter()
        if level == 0:
            exact_of(recommender).search(queries, DEPTH)
        elif effort:
            lists.search(queries, DEPTH, effort)
        times.append(time.perf_counter() - began if effort or level == 0 else np.inf)
    return times
