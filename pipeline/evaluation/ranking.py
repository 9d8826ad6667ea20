"""Every event of a period ranked by what is evaluated and by the baselines, live and frozen.

Ranks of a process group share the work: a block of queries, an event of the streaming baselines, a fitted baseline is
scored by one of them. Rank 0 then has it all.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation.baselines import baseline_ranks
from friendrec.pipeline.evaluation.elsewhere import Lists, Vectors, list_ranks
from friendrec.pipeline.evaluation.fitted import FITTED_BASELINES, fitted_ranks
from friendrec.pipeline.evaluation.fusion import ranks_beside
from friendrec.pipeline.evaluation.oracle import LogOracle, oracle_ranks
from friendrec.pipeline.evaluation.results import ALSO, FUSION, MODEL, ORACLE, Evaluation
from friendrec.pipeline.evaluation.scoring import EVERYTHING, SEARCH_DEPTH, Recommender, recommender_ranks
from friendrec.pipeline.evaluation.slices import slicings
from friendrec.pipeline.evaluation.tasks import LEVELS, STATES, Events, Exclusions
from friendrec.pipeline.retrieval.protocol import Ranker

Scored = Recommender | Vectors | Lists
"""What can be evaluated."""


def score(
    data: PreparedData,
    events: Events,
    exclusions: Exclusions,
    scored: Scored | None,
    baselines: bool = False,
    progress: Progress | None = None,
    share: slice = EVERYTHING,
    oracle: LogOracle | None = None,
    also: Recommender | None = None,
) -> Evaluation:
    """Rank every event by what is scored, where there is something, and by the baselines, where they are asked for.

    With another recommender beside one, also by that and by the merged lists of both.
    The oracle of a simulated log ranks live events only.
    Of the work the `share` is done, and the ranks of the rest are nan: `gather` them.
    """
    ranks: dict[str, dict[str, Any]] = {}
    until = {MODEL: ranked_until(scored)}
    if also is not None:
        assert scored is not None and not isinstance(scored, Lists)
        ranks = _ranks_beside(data, events, exclusions, (scored, also), progress, share)
        until |= {ALSO: ranked_until(also), FUSION: SEARCH_DEPTH}
    elif scored is not None:
        ranks[MODEL] = _ranks(data, events, exclusions, scored, progress, share)
    if baselines:
        ranks |= _baseline_ranks(data, events, exclusions, progress, share)
    if oracle is not None:
        own = np.arange(len(events.index))[share]
        advance = add_bar(progress, "oracle, live", len(own))
        placed = oracle_ranks(data, events.take(own), exclusions, oracle, advance)
        ranks[ORACLE] = {"live": _placed(own, events, placed)}
    return Evaluation(events, ranks, slicings(data, events), until)


def gather(evaluation: Evaluation) -> Evaluation:
    """What the ranks of the process group scored of one evaluation, whole on rank 0; they call it together."""
    whole = {
        method: {state: _gathered(ranks) for state, ranks in states.items()}
        for method, states in evaluation.ranks.items()
    }
    return replace(evaluation, ranks=whole)


def _gathered(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each rank as whoever scored it found it; in between nan travels as 0, below every rank."""
    import torch
    import torch.distributed as dist

    found = torch.from_numpy(np.where(np.isnan(ranks), 0, ranks))
    dist.reduce(found, dst=0, op=dist.ReduceOp.MAX)
    return np.where(found.numpy() == 0, np.nan, found.numpy())


def ranked_until(scored: Scored | None) -> int | None:
    """How far its ranks go; None where they go all the way."""
    if isinstance(scored, Lists):
        return scored.length
    return None if scored is None or isinstance(scored.retriever, Ranker) else SEARCH_DEPTH


def _ranks(
    data: PreparedData,
    events: Events,
    exclusions: Exclusions,
    scored: Scored,
    progress: Progress | None,
    share: slice,
) -> dict[str, NDArray[Any]]:
    """Ranks by state, frozen alone of what was made elsewhere."""
    if isinstance(scored, Lists):
        own = np.arange(len(events.index))[share]
        return {"frozen": _placed(own, events, list_ranks(events.take(own), exclusions, scored))}
    ranks = {}
    for state in ("frozen",) if isinstance(scored, Vectors) else STATES:
        advance = add_bar(progress, f"model, {state}", len(events.index[share]))
        ranks[state] = recommender_ranks(data, events, exclusions, scored, state, advance, share)
    return ranks


def _ranks_beside(
    data: PreparedData,
    events: Events,
    exclusions: Exclusions,
    recommenders: tuple[Recommender, Recommender],
    progress: Progress | None,
    share: slice,
) -> dict[str, dict[str, NDArray[Any]]]:
    """Ranks by method and state of two recommenders and their merged lists."""
    ranks: dict[str, dict[str, Any]] = {}
    for state in STATES:
        advance = add_bar(progress, f"models, {state}", len(events.index[share]))
        for method, placed in ranks_beside(data, events, exclusions, recommenders, state, advance, share).items():
            ranks.setdefault(method, {})[state] = placed
    return ranks


def _baseline_ranks(
    data: PreparedData, events: Events, exclusions: Exclusions, progress: Progress | None, share: slice
) -> dict[str, dict[str, NDArray[Any]]]:
    """Ranks by method and state, frozen alone of what is fitted."""
    ranks: dict[str, dict[str, Any]] = {}
    own = np.arange(len(events.index))[share]
    for state in STATES:
        advance = add_bar(progress, f"baselines, {state}", len(own))
        for name, placed in baseline_ranks(data, events.take(own), exclusions, state)[0].items():
            ranks.setdefault(name, {})[state] = _placed(own, events, placed)
        advance(len(own))
    advance = add_bar(progress, "baselines, fitted", len(events.index) * len(FITTED_BASELINES[share]))
    fitted = fitted_ranks(data, events, exclusions, advance, share)
    return ranks | {name: {"frozen": placed} for name, placed in fitted.items()}


def _placed(own: NDArray[np.int64], events: Events, ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks of one's own events among those of all, which are nan: `[LEVELS, own]` to `[LEVELS, E]`."""
    placed = np.full((LEVELS, len(events.index)), np.nan)
    placed[:, own] = ranks
    return placed


def add_bar(progress: Progress | None, name: str, total: int) -> Callable[[int], None]:
    """A function that moves a new bar on by so many events."""
    if progress is None:
        return lambda scored: None
    task = progress.add_task(name, total=total)
    return lambda scored: progress.advance(task, scored)
