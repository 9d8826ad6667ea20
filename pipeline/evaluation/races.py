"""All kinds of index over one run: built, asked the same questions, timed side by side."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from friendrec.errors import FriendrecError
from friendrec.models.two_tower import TwoTower
from friendrec.pipeline.clustering import spread
from friendrec.pipeline.evaluation.beams import SAMPLE, WIDEST, Beams
from friendrec.pipeline.evaluation.contenders import (
    WAYS,
    Clusters,
    Contender,
    Exact,
    FaissGraph,
    FaissLists,
    Ids,
    Vectors,
    k_means,
)
from friendrec.pipeline.evaluation.frontier import (
    REPEATS,
    K,
    Race,
    Row,
    asked,
    race_of_beams,
    sampled_events,
    swept,
    timed,
)
from friendrec.pipeline.evaluation.frontier_summary import COMPARED_SHARES, between
from friendrec.pipeline.evaluation.tasks import Events
from friendrec.pipeline.inference import Recommender, centroids_of, open_recommender
from friendrec.pipeline.publish import read_manifest
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.parts import Found
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.stu import StuIndex


@dataclass
class Course:
    """What every kind over the vectors of a run is asked, and what they have found so far."""

    vectors: Vectors  # [N, D]
    queries: Queries
    expected: Found
    targets: Ids
    progress: Progress
    races: list[Race] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def race(self, name: str, contender: Contender) -> Race:
        return Race(name, contender, self.queries, np.arange(len(self.queries)), self.expected)

    def sweep(self, race: Race) -> list[Row]:
        with bar(self.progress, f"{race.name}: searching", len(race.contender.efforts)) as advance:
            return swept(race, self.targets, len(self.vectors), advance)

    def run(self, race: Race) -> None:
        self.enter(race, self.sweep(race))

    def enter(self, race: Race, rows: list[Row]) -> None:
        self.races.append(race)
        self.rows += rows


def held(
    run: str,
    data: str,
    stu: str | None,
    kinds: Sequence[str],
    num_queries: int,
    num_lists: int | None,
    progress: Progress,
) -> tuple[list[Row], Events, dict[str, Any]]:
    """Every row, the events that were asked about, and what else the report says.

    Without `kinds` all that there can be; exact always.
    """
    recommender, exact = _two_tower(run, data)
    centroids = _clusters(run, recommender, kinds)
    generator = _generator(stu, data) if stu is not None and (not kinds or "beam" in kinds) else None
    lists = _num_lists(recommender, centroids, num_lists)
    kinds = kinds or ("ivf", "hnsw", "ivfpq", *(["clusters"] if centroids else []))
    events, total = sampled_events(recommender.data, recommender.exclusions, num_queries)
    queries = asked(recommender, events)
    course = Course(exact.vectors, queries, exact.search(queries, K), events.target, progress)
    about: dict[str, Any] = {
        "candidates": len(exact),
        "events": total,
        "queries": len(events.index),
        "actors": len(np.unique(events.actor)),
        "lists": lists,
        "load": {},
    }
    course.run(course.race("exact", Exact(exact)))
    if {"ivf", "ivfpq"} & set(kinds):
        about["ivf"], centres, list_of = _run_lists(course, lists, kinds)
        about["load"]["ivf"] = load(np.bincount(list_of, minlength=lists))
        if "ivfpq" in kinds:
            with bar(progress, "ivfpq: building"):
                coded = FaissLists.coded(exact.vectors, centres, list_of)
            course.run(course.race("ivfpq", coded))
    if "hnsw" in kinds:
        with bar(progress, "hnsw: building", len(exact)) as advance:
            graph = FaissGraph.of(exact.vectors, advance)
        course.run(course.race("hnsw", graph))
    if "clusters" in kinds and centroids is not None:
        own = Clusters.of(exact.vectors, exact.user_ids, centroids)
        about["load"]["clusters"] = load(own.load)
        about["cells"] = centroids.cells
        course.run(course.race("clusters", own))
    if generator is not None:
        _run_beams(course, generator, events, about)
    with bar(progress, "speed, on one thread", REPEATS * len(course.rows)) as advance:
        rows = timed(course.races, course.rows, advance)
    return rows, events, about


def _two_tower(run: str, data: str) -> tuple[Recommender, ExactIndex]:
    if read_manifest(run, "run").extra.get("preset") == "stu":
        raise FriendrecError(f"{run} writes tokens and has no vectors to index: pass it as --stu, a two-tower as --run")
    recommender = open_recommender(run, data)
    assert isinstance(recommender.retriever, ExactIndex)
    return recommender, recommender.retriever


def _clusters(run: str, recommender: Recommender, kinds: Sequence[str]) -> Centroids | None:
    """The run's own centroids, if they are wanted."""
    assert isinstance(recommender.model, TwoTower)
    centroids = centroids_of(recommender.model, recommender.packer)
    if centroids is None and "clusters" in kinds:
        raise FriendrecError(
            f"{run} has no clusters, or was stopped before they were placed: train with --clusters residual, "
            "or leave clusters out of --kinds"
        )
    return centroids


def _generator(stu: str, data: str) -> Recommender:
    recommender = open_recommender(stu, data)
    if not isinstance(recommender.retriever, StuIndex):
        raise FriendrecError(f"{stu} gives vectors and has no beams: pass --stu a run of the preset stu")
    return recommender


def _num_lists(recommender: Recommender, centroids: Centroids | None, wanted: int | None) -> int:
    """As many as the run has clusters, or would have."""
    num = len(recommender.retriever)
    if wanted is not None and wanted > num:
        raise FriendrecError(f"--lists {wanted} are more than the {num} candidates: pass fewer")
    if centroids is not None:
        return wanted or len(centroids)
    return wanted or replace(recommender.config.model, clusters="residual").clusters_of(num)


def _run_lists(course: Course, lists: int, kinds: Sequence[str]) -> tuple[dict[str, Any], Vectors, Ids]:
    """FAISS's best way to make lists: what is said of it, its centroids, and the list of each vector."""
    tried = {}
    for way in WAYS:
        with bar(course.progress, f"ivf: k-means, {way}"):
            made = k_means(way, course.vectors, lists)
        race = course.race("ivf", FaissLists.flat(course.vectors, *made))
        tried[way] = race, course.sweep(race), made
    least = max(min(row.share for row in rows) for _, rows, _ in tried.values())
    scored = {way: _mean_neighbours(rows, least) for way, (_, rows, _) in tried.items()}
    best = max(scored, key=lambda way: scored[way])
    race, rows, made = tried[best]
    if "ivf" in kinds:
        course.enter(race, rows)
    ways = {way: {"neighbour_recall": found, "is": WAYS[way]} for way, found in scored.items()}
    return {"way": best, "ways": ways, "from": max(least, COMPARED_SHARES[0])}, *made


def _mean_neighbours(rows: list[Row], least: float) -> float:
    """Mean neighbour recall at COMPARED_SHARES, none taken below `least`."""
    share, found = (np.array([getattr(row, name) for row in rows]) for name in ("share", "neighbours"))
    weights = [between(share, max(wanted, least)) for wanted in COMPARED_SHARES]
    return float(np.mean([found @ weight for weight in weights if weight is not None]))


def _run_beams(course: Course, generator: Recommender, events: Events, about: dict[str, Any]) -> None:
    index = generator.retriever
    assert isinstance(index, StuIndex)
    queries = asked(generator, events)
    about["beam"] = {"sizes": list(index.trie.sizes), "held_against": min(WIDEST, len(index))}
    with bar(course.progress, "beam: the widest", min(SAMPLE, len(queries))) as advance:
        race = race_of_beams(Beams(index), queries, advance)
    course.run(race)


def load(sizes: NDArray[np.int64]) -> dict[str, Any]:
    """How evenly the vectors lie in lists of these sizes `[C]`."""
    told = spread(sizes)
    return {
        "lists": len(sizes),
        "mean": float(sizes.mean()),
        "fullest": int(sizes.max()),
        "fullest_over_mean": told["fullest"],
        "empty": told["empty"],
    }


@contextmanager
def bar(progress: Progress, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar while the block runs, of which the function given tells the steps; it is drawn anew at each."""
    task = progress.add_task(name, total=total)

    def advance(steps: int = 1) -> None:
        progress.advance(task, steps)
        progress.refresh()

    try:
        yield advance
    finally:
        progress.remove_task(task)
