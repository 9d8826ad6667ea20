"""The temporal protocol: everything that is scored, by all ranks together, and the sections of the report on rank 0."""

from functools import partial
from typing import Any

import torch.distributed as dist
from rich.progress import Progress

from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation.fusion import weighted
from friendrec.pipeline.evaluation.newcomers import (
    newcomer_figures,
    of_train_users,
    score_newcomers,
    that_know_newcomers,
)
from friendrec.pipeline.evaluation.oracle import open_oracle
from friendrec.pipeline.evaluation.ranking import Scored, add_bar, gather, score
from friendrec.pipeline.evaluation.results import ALSO, MODEL, Evaluation, results
from friendrec.pipeline.evaluation.scoring import Recommender
from friendrec.pipeline.evaluation.tasks import Exclusions, scored_events


def evaluate_period(
    data: PreparedData,
    period: str,
    scored: Scored | None,
    also: Recommender | None,
    name: str,
    *,
    baselines: bool,
    log: str | None,
    progress: Progress,
) -> tuple[Evaluation, dict[str, Any], dict[str, int]] | None:
    """Ranks, sections of metrics.json and counts of the events; None on every rank but the first.

    `also` stands beside what is scored and is called `name`; `log` is what the data was simulated as, for the oracle.
    The default process group shares the work.
    """
    exclusions = Exclusions.of(data)
    events, counts = scored_events(data, period, exclusions)
    share = slice(dist.get_rank(), None, dist.get_world_size())
    rank = partial(score, data, exclusions=exclusions, progress=progress, share=share)
    both = {"scored": of_train_users(scored), "also": of_train_users(also)}
    oracle = open_oracle(log, events, data) if log is not None else None
    evaluation = gather(rank(events, **both, baselines=baselines, oracle=oracle))
    validation = evaluation
    if also is not None and period != "validation":  # where the weights of the merger are chosen
        validation = gather(rank(scored_events(data, "validation", exclusions)[0], **both))
    runs = that_know_newcomers({MODEL: scored, ALSO: also})
    if runs:
        bar = partial(add_bar, progress, "newcomers")
        asked = score_newcomers(period, exclusions, runs, evaluation.until, share, bar)
        newcomers = {question: gather(ranked) for question, ranked in asked.items()}
    if dist.get_rank() > 0:
        return None
    weights: dict[str, list[float]] = {}
    if also is not None:
        evaluation, weights = weighted(evaluation, validation)
    sections = results(evaluation, name, weights)
    if runs:
        sections["newcomers"] = newcomer_figures(newcomers, exclusions, runs, {ALSO: name})
    return evaluation, sections, counts
