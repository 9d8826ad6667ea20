"""Every event of a period ranked by what is evaluated and by the baselines, live and frozen."""

from typing import Any

from numpy.typing import NDArray
from rich.progress import Progress

from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation.baselines import baseline_ranks
from friendrec.pipeline.evaluation.elsewhere import Lists, Vectors, list_ranks
from friendrec.pipeline.evaluation.fitted import FITTED_BASELINES, fitted_ranks
from friendrec.pipeline.evaluation.results import MODEL, Evaluation
from friendrec.pipeline.evaluation.scoring import SEARCH_DEPTH, Recommender, recommender_ranks
from friendrec.pipeline.evaluation.slices import slicings
from friendrec.pipeline.evaluation.tasks import STATES, Events, Exclusions
from friendrec.pipeline.retrieval.protocol import Ranker

Scored = Recommender | Vectors | Lists
"""What can be evaluated."""


def score(
    data: PreparedData,
    events: Events,
    exclusions: Exclusions,
    scored: Scored | None,
    baselines: bool,
    progress: Progress | None = None,
) -> Evaluation:
    """Rank every event by what is scored, where there is something, and by the baselines, where they are asked for."""
    ranks = {}
    if scored is not None:
        ranks[MODEL] = _ranks(data, events, exclusions, scored, progress)
    if baselines:
        ranks |= _baseline_ranks(data, events, exclusions, progress)
    return Evaluation(events, ranks, slicings(data, events), ranked_until(scored))


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
) -> dict[str, NDArray[Any]]:
    """Ranks by state, frozen alone of what was made elsewhere."""
    if isinstance(scored, Lists):
        return {"frozen": list_ranks(events, exclusions, scored)}
    ranks = {}
    for state in ("frozen",) if isinstance(scored, Vectors) else STATES:
        advance = _bar(progress, f"model, {state}", len(events.index))
        ranks[state] = recommender_ranks(data, events, exclusions, scored, state, advance)
    return ranks


def _baseline_ranks(
    data: PreparedData, events: Events, exclusions: Exclusions, progress: Progress | None
) -> dict[str, dict[str, NDArray[Any]]]:
    """Ranks by method and state, frozen alone of what is fitted."""
    ranks: dict[str, dict[str, Any]] = {}
    for state in STATES:
        advance = _bar(progress, f"baselines, {state}", len(events.index))
        for name, placed in baseline_ranks(data, events, exclusions, state)[0].items():
            ranks.setdefault(name, {})[state] = placed
        advance(len(events.index))
    advance = _bar(progress, "baselines, fitted", len(events.index) * len(FITTED_BASELINES))
    fitted = fitted_ranks(data, events, exclusions, advance)
    return ranks | {name: {"frozen": placed} for name, placed in fitted.items()}


def _bar(progress: Progress | None, name: str, total: int) -> Any:
    """A function that moves a new bar on by so many events."""
    if progress is None:
        return lambda scored: None
    task = progress.add_task(name, total=total)
    return lambda scored: progress.advance(task, scored)
