"""Friends who had no training row: users that first appear after the train period, whom only their tokens can name.

The events of a period towards them are uncovered in the main figures. Here they are ranked, live, among the train users
and the newcomers who had an event strictly before, and among the latter alone: no one who is yet to come is a
candidate. A newcomer's code is made of the events of its first timestamp, so that it too is known by then. Beside it
stand what chance would find, what recency finds among the same candidates, and a two-tower, to whose vectors all
newcomers are one unknown user.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.datasets.state import lower_bounds
from friendrec.models.backoff import BackOff
from friendrec.pipeline.evaluation.baselines import baseline_ranks
from friendrec.pipeline.evaluation.intervals import bootstrap_means, interval
from friendrec.pipeline.evaluation.metrics import CUTOFFS, summary
from friendrec.pipeline.evaluation.results import Evaluation
from friendrec.pipeline.evaluation.scoring import BLOCK_QUERIES, EVERYTHING, recommender_ranks
from friendrec.pipeline.evaluation.seen import SeenOnly, first_seen
from friendrec.pipeline.evaluation.tasks import LEVEL, LEVELS, TASKS, Events, Exclusions, period_events
from friendrec.pipeline.inference import Recommender, encode_queries, encode_targets
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.exclusion import rows_of
from friendrec.pipeline.retrieval.protocol import Queries, Retriever
from friendrec.pipeline.retrieval.stu import StuIndex

RECENCY = ("last_active", "last_interaction+last_active", "reciprocity+last_active", "hybrid+last_active")
"""Streaming baselines whose last word puts whoever has had no event yet behind everybody else."""
BLOCK_PAIRS = 1 << 22


@dataclass(frozen=True)
class Among:
    """A run's queries to the users of rows `start` to `stop`, the first of whom becomes candidate 0."""

    recommender: Recommender
    retriever: Retriever
    start: int
    stop: int

    def queries(self, actors: NDArray[np.int64], as_of: NDArray[np.int64]) -> Queries:
        run = self.recommender
        queries = encode_queries(run.model, run.packer, actors, as_of, num_candidates=self.stop)
        return queries.within(self.start, self.stop - self.start)


def newcomer_events(data: PreparedData, period: str, seen: SeenOnly) -> Events:
    """The events of a period whose target is a newcomer among the candidates, seen strictly before, and not blocked."""
    events = period_events(data, period, seen)
    is_newcomer = (events.target >= data.num_train_users) & (events.target < seen.stop)
    was_seen = first_seen(data)[events.target] < events.timestamp
    return events.take(is_newcomer & was_seen & ~seen.blocked.known(events.actor, events.target, events.timestamp))


def num_with_codes(recommender: Recommender) -> int:
    """How many of the first rows of the vocabulary have codes, in the run or in its index; 0 of a run without codes."""
    codes = recommender.packer.codes
    return max(len(codes.tokens), len(recommender.retriever)) if codes is not None else 0


def of_train_users(scored: Any) -> Any:
    """What is scored, where it is a run whose index holds newcomers: among the candidates of the protocol alone."""
    if not isinstance(scored, Recommender) or len(scored.retriever) == scored.data.num_train_users:
        return scored
    return among(scored, 0, scored.data.num_train_users)


def that_know_newcomers(scored: Mapping[str, Any]) -> dict[str, Recommender]:
    """All the opened runs, if one of them has codes of newcomers; else none."""
    runs = {method: run for method, run in scored.items() if isinstance(run, Recommender)}
    return runs if any(num_with_codes(run) > run.data.num_train_users for run in runs.values()) else {}


def among(recommender: Recommender, start: int, stop: int) -> Among | None:
    """The same queries to the users of rows `start` to `stop`; None where some of them have no code.

    To a two-tower who has no training row is the unknown user, with a profile where the data has one.
    """
    data, packer = recommender.data, recommender.packer
    users, ids = np.arange(start, stop), data.user_ids[start:stop]
    if packer.codes is None:
        retriever: Any = ExactIndex(encode_targets(recommender.model, packer, users), ids)  # type: ignore[arg-type]
    elif stop > num_with_codes(recommender):
        return None
    else:
        index = recommender.retriever
        assert isinstance(index, StuIndex) and index.decoder is not None
        tokens = packer.codes.tokens[users] if stop > len(index) else index.codes_of(users)
        decoder = index.decoder
        if stop > data.num_train_users and not isinstance(decoder, BackOff):
            decoder = BackOff.of(decoder, packer.codes.tokens[: data.num_train_users])
        built = StuIndex.build(tokens, ids, index.trie.sizes, index.beam_width)
        retriever = dataclasses.replace(built, decoder=decoder)
    return Among(recommender, retriever, start, stop)


def seen_only(exclusions: Exclusions, runs: Mapping[str, Recommender]) -> dict[str, SeenOnly]:
    """The two questions: among all users who have codes with one of the runs, and among the newcomers of them."""
    data = next(iter(runs.values())).data
    stop = max(map(num_with_codes, runs.values()))
    starts = {"all": 0, "newcomers": data.num_train_users}
    return {name: SeenOnly.among(data, exclusions, start, stop) for name, start in starts.items()}


def score_newcomers(
    period: str,
    exclusions: Exclusions,
    runs: Mapping[str, Recommender],
    until: Mapping[str, int | None],
    share: slice = EVERYTHING,
    bar: Callable[[int], Callable[[int], None]] = lambda total: lambda scored: None,
) -> dict[str, Evaluation]:
    """For both questions, live ranks by each run that can and by recency; nan beyond the share.

    `bar` is told how many events this share has, and gives what is told how many of them are done.
    """
    data = next(iter(runs.values())).data
    evaluations = {}
    for question, seen in seen_only(exclusions, runs).items():
        events = newcomer_events(data, period, seen)
        advance = bar(len(events.index[share]) * len(runs))
        shifted = dataclasses.replace(events, target=events.target - seen.start)
        ranks = {}
        for method, run in runs.items():
            able = among(run, seen.start, seen.stop)
            if able is not None:
                ranks[method] = {"live": recommender_ranks(data, shifted, seen, able, "live", advance, share)}
        own = np.arange(len(events.index))[share]
        for name, placed in recency_ranks(data, events.take(own), seen).items():
            ranks[name] = {"live": np.full((LEVELS, len(events.index)), np.nan)}
            ranks[name]["live"][:, own] = placed
        evaluations[question] = Evaluation(events, ranks, until=until)
    return evaluations


def recency_ranks(data: PreparedData, events: Events, seen: SeenOnly) -> dict[str, NDArray[np.float64]]:
    """Ranks `[LEVELS, E]` of RECENCY among the same candidates, of newcomers alone by last_active; nan as ever."""
    if seen.start:
        return {"last_active": _newest_ranks(data, events, seen)}
    everybody = dataclasses.replace(data, num_train_users=seen.num_candidates)
    streamed = baseline_ranks(everybody, events, seen, "live")[0]
    return {name: streamed[name] for name in RECENCY}


def _newest_ranks(data: PreparedData, events: Events, seen: SeenOnly) -> NDArray[np.float64]:
    newcomers = np.arange(seen.start, seen.stop)
    ranks = np.full((LEVELS, len(events.index)), np.nan)
    size = max(1, BLOCK_PAIRS // len(newcomers))
    for begin in range(0, len(events.index), size):
        block = np.arange(begin, min(begin + size, len(events.index)))
        last = _last_active(data, newcomers, events.timestamp[block])
        mine = last[np.arange(len(block)), events.target[block] - seen.start]
        for level in range(LEVELS):
            at = np.flatnonzero(events.at_level(level)[block])
            offsets, ids = seen.at(level, events.actor[block[at]], events.timestamp[block[at]])
            allowed = last[at]
            allowed[rows_of(offsets), ids] = -1
            above, tied = allowed > mine[at, None], allowed == mine[at, None]
            ranks[level, block[at]] = above.sum(axis=1) + (1 + tied.sum(axis=1)) / 2
    return ranks


def _last_active(data: PreparedData, users: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.int64]:
    """When each user had its last event strictly before each time, `[T, users]` µs; -1 for never."""
    user, time = np.tile(users, len(times)), np.repeat(times, len(users))
    begins = data.offsets[user]
    ends = lower_bounds(data.timestamp, begins, data.offsets[user + 1], time)
    last = np.where(ends > begins, data.timestamp[np.maximum(ends, 1) - 1], -1)
    return last.reshape(len(times), len(users))


def _num_allowed(seen: SeenOnly, level: int, events: Events) -> NDArray[np.int64]:
    """Candidates of each event, `[E]`; in blocks, for the unseen are many."""
    blocks = np.array_split(np.arange(len(events.index)), 1 + len(events.index) // BLOCK_QUERIES)
    hidden = [np.diff(seen.at(level, events.actor[block], events.timestamp[block])[0]) for block in blocks]
    return seen.num_candidates - np.concatenate(hidden)


def newcomer_figures(
    evaluations: Mapping[str, Evaluation],
    exclusions: Exclusions,
    runs: Mapping[str, Recommender],
    names: Mapping[str, str],
) -> dict[str, Any]:
    """The section `newcomers`: events by task, and figures of both questions; `names` are what methods are called."""
    questions, first = seen_only(exclusions, runs), evaluations["all"]
    return {
        "with_tokens": questions["newcomers"].num_candidates,
        "turned_to": len(np.unique(first.events.target)),
        "events": {task: int(first.events.of_task(task).sum()) for task in TASKS},
        "among": {name: _figures(evaluations[name], seen, names) for name, seen in questions.items()},
    }


def _figures(evaluation: Evaluation, seen: SeenOnly, names: Mapping[str, str]) -> dict[str, Any]:
    """By task, for each method, its figures; of chance, the share of the allowed that k places hold."""
    tasks: dict[str, Any] = {}
    for task in TASKS:
        asking = evaluation.events.of_task(task)
        tasks[task] = {}
        if not asking.any():
            continue
        allowed = _num_allowed(seen, LEVEL[task], evaluation.events.take(asking))
        tasks[task]["chance"] = {f"recall@{k}": float(np.minimum(1, k / allowed).mean()) for k in CUTOFFS}
        ranks = {method: evaluation.of(method, task, "live") for method in evaluation.ranks}
        hits = np.stack([rank <= 10 for rank in ranks.values()], axis=1).astype(np.float64)
        means = bootstrap_means(hits, evaluation.events.actor[asking]).T
        for (method, rank), drawn in zip(ranks.items(), means, strict=True):
            figures: dict[str, Any] = {**summary(rank, evaluation.until.get(method)), "recall@10_ci": interval(drawn)}
            tasks[task][names.get(method, method)] = figures
    return tasks
