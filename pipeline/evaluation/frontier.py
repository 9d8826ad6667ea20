"""Recall against work: what each kind of index finds at each effort, of true next friends and of the exact list."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError
from friendrec.pipeline.evaluation.beams import SAMPLE, Beams, taken
from friendrec.pipeline.evaluation.contenders import Contender
from friendrec.pipeline.evaluation.scoring import allowing
from friendrec.pipeline.evaluation.tasks import LEVEL, Events, Exclusions, scored_events
from friendrec.pipeline.evaluation.threads import one_thread
from friendrec.pipeline.inference import Recommender
from friendrec.pipeline.retrieval.parts import Found
from friendrec.pipeline.retrieval.protocol import Queries

K = 100
TASK, PERIOD = "new_link", "validation"
ENOUGH = 0.12
"""Share of the vectors beyond which a sweep takes longer steps: the frontier is read up to 0.1."""
TIMED, SECONDS, REPEATS = 512, 0.25, 5
"""Queries that are timed together, fewer where they take longer than so many seconds, and how often."""
TIE = 1e-5
"""Relative difference of scores that count as tied: kernels sum in other orders."""


@dataclass(frozen=True)
class Row:
    """One kind at one effort."""

    index: str
    parameter: int | None
    share: float
    hits: NDArray[np.bool_]  # [E] whether the target is among the K found
    neighbours: float
    queries_per_second: float = 0.0
    queries_per_second_dense: float = 0.0
    """Of queries that exclude and name nobody."""

    @property
    def task_recall(self) -> float:
        return float(self.hits.mean())

    def plain(self) -> dict[str, Any]:
        """As frontier.json holds it."""
        return {
            "index": self.index,
            "parameter": self.parameter,
            "share_scored": self.share,
            f"task_recall@{K}": self.task_recall,
            f"neighbour_recall@{K}": self.neighbours,
            "queries_per_second": self.queries_per_second,
        }


@dataclass(frozen=True)
class Race:
    """A contender with the queries it is asked, and what is to be found for those in `known`."""

    name: str
    contender: Contender
    queries: Queries  # [E]
    known: NDArray[np.int64]  # [M] places in the queries
    expected: Found  # [M, K]


def sampled_events(data: PreparedData, exclusions: Exclusions, most: int) -> tuple[Events, int]:
    """Up to `most` new links of the validation period, evenly spread, and of how many."""
    events, _ = scored_events(data, PERIOD, exclusions)
    events = events.take(events.of_task(TASK))
    total = len(events.index)
    if not total:
        raise FriendrecError(f"the {PERIOD} period has no {TASK} event: use a longer log or other --splits")
    return events.take(np.linspace(0, total - 1, min(most, total)).astype(np.int64)), total


def asked(recommender: Recommender, events: Events) -> Queries:
    """A query an event, live, and whom it hides."""
    hidden = recommender.exclusions.at(LEVEL[TASK], events.actor, events.timestamp)
    queries = recommender.queries(events.actor, events.timestamp).excluding(*hidden)
    return allowing(queries, events.target)


def race_of(name: str, contender: Contender, queries: Queries, expected: Found) -> Race:
    """All queries, and what the exact search finds for them."""
    return Race(name, contender, queries, np.arange(len(queries)), expected)


def race_of_beams(index: Beams, queries: Queries, advance: Callable[[], None]) -> Race:
    """Beams against the widest, on some of the queries; `advance` is told of each of them."""
    known, some = taken(queries, SAMPLE)
    found = []
    for q in range(len(some)):
        found.append(index.best(some.take(np.array([q])), K))
        advance()
    ids, scores = (np.concatenate(part) for part in zip(*found, strict=True))
    return Race("beam", index, queries, known, (ids, scores))


def swept(race: Race, targets: NDArray[np.int64], num: int, advance: Callable[[], None] = lambda: None) -> list[Row]:
    """A row for each effort, beyond ENOUGH for those that at least double the one before, and for the last."""
    rows: list[Row] = []
    for place, effort in enumerate(race.contender.efforts):
        last = place == len(race.contender.efforts) - 1
        if not rows or rows[-1].share < ENOUGH or last or (effort or 0) >= 2 * (rows[-1].parameter or 0):
            ids, scores = race.contender.search(race.queries, K, effort)
            share = race.contender.compared(race.queries, K, effort) / num
            neighbours = agreement((ids[race.known], scores[race.known]), race.expected)
            rows.append(Row(race.name, effort, share, (ids == targets[:, None]).any(axis=1), neighbours))
        advance()
    return rows


def agreement(found: Found, expected: Found) -> float:
    """Share of the expected `[Q, K]` that was found, or in whose place others were that tie with the last of them."""
    (ids, scores), (right, best) = found, expected
    width = int(max(ids.max(initial=0), right.max(initial=0))) + 1
    keys = [np.where(part >= 0, part + np.arange(len(part))[:, None] * width, -1) for part in (ids, right)]
    wanted = (right >= 0).sum(axis=1)
    last = best[np.arange(len(right)), np.maximum(wanted - 1, 0)][:, None]
    with np.errstate(invalid="ignore"):
        ties = np.abs(scores - last) <= TIE * np.maximum(1, np.abs(last))
    good = (ids >= 0) & (np.isin(keys[0], keys[1]) | ties)
    return float((np.minimum(good.sum(axis=1), wanted) / np.maximum(wanted, 1))[wanted > 0].mean())


def timed(races: Sequence[Race], rows: Sequence[Row], advance: Callable[[], None] = lambda: None) -> list[Row]:
    """The rows with queries/s on one thread, of the queries as they are and of the same ones dense.

    All are timed in turns, so that what else the machine does harms all. No other thread may work meanwhile.
    """
    contenders = {race.name: race.contender for race in races}
    queries = {race.name: (race.queries, dense(race.queries)) for race in races}
    seconds = np.empty((REPEATS, len(rows), 2))
    with one_thread():
        blocks = [[_block(contenders[row.index], of, row) for of in queries[row.index]] for row in rows]
        for repeat in range(REPEATS):
            for place, row in enumerate(rows):
                seconds[repeat, place] = [_seconds(contenders[row.index], block, row) for block in blocks[place]]
                advance()
    speeds = np.array([[len(block) for block in pair] for pair in blocks]) / np.median(seconds, axis=0)
    return [
        replace(row, queries_per_second=whole, queries_per_second_dense=of_dense)
        for row, (whole, of_dense) in zip(rows, speeds.tolist(), strict=True)
    ]


def dense(queries: Queries) -> Queries:
    """The same vectors, nobody excluded and nobody named."""
    return replace(Queries.dense(queries.vector), keys=queries.keys)


def _block(contender: Contender, queries: Queries, row: Row) -> Queries:
    """As many of the queries as are timed together."""
    block = taken(queries, TIMED)[1]
    few = taken(block, 16)[1]
    contender.search(few, K, row.parameter)  # compiles, warms up
    took = _seconds(contender, few, row) / len(few)
    return taken(block, max(16, int(SECONDS / took)))[1]


def _seconds(contender: Contender, queries: Queries, row: Row) -> float:
    """Of the processor, whatever else it does meanwhile; work that another thread did would count as well."""
    began = time.process_time()
    contender.search(queries, K, row.parameter)
    return time.process_time() - began
