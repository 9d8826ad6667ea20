"""Evaluate a run, its baselines or both by the temporal protocol, live and frozen.

Writes metrics.json and report.html, which opens with the network off. Every event of the period is ranked among all
users of the train period; the validation period is scored unless the test period is asked for,
and each use of the test period is counted in the run.
"""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from friendrec.errors import FriendrecError
from friendrec.pipeline.publish import Manifest, is_finished, open_published, publish

if TYPE_CHECKING:
    from rich.progress import Progress

    from friendrec.datasets.prepared import PreparedData
    from friendrec.pipeline.evaluation.results import Evaluation
    from friendrec.pipeline.evaluation.scoring import Recommender
    from friendrec.pipeline.evaluation.tasks import Events, Exclusions

TEST_USES = "test_uses.jsonl"
"""File of a run with one line for each use of the test period: appended to, never rewritten."""

EXAMPLES = """
friendrec evaluate --data data --run run --baselines --out report
friendrec evaluate --data data --run run --index index --baselines --period test --out report-test
friendrec evaluate --data data --baselines --out report-baselines
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    data: str
    """Directory or URL that `friendrec prepare` made."""
    run: str | None = None
    """Directory or URL that `friendrec train` made; without it only the baselines are scored."""
    index: str | None = None
    """Directory or URL that `friendrec index` made from the run's embeddings; without it all users are scored anew."""
    period: Literal["validation", "test"] = "validation"
    """validation: what decisions may be based on. test: the last events of the log, for a final figure."""
    baselines: bool = False
    """Put the fourteen streaming baselines beside the model."""
    out: str
    """Directory or URL to create."""


def main(options: EvaluateOptions) -> None:
    """Publish the report at `options.out`, or find it there already."""
    if options.run is None and not options.baselines:
        raise FriendrecError("nothing to evaluate: pass --run RUN, --baselines or both")
    if options.run is None and options.index is not None:
        raise FriendrecError("an index cannot be evaluated without the model that asks it: pass --run RUN as well")
    named = {"data": options.data, "run": options.run, "index": options.index}
    inputs = {name: path for name, path in named.items() if path is not None}
    if is_finished(options.out, kind="report", options=options, inputs=inputs):
        print(f"{options.out} is this report already.")
        return
    with publish(options.out, kind="report", options=options, inputs=inputs) as attempt:
        metrics = _evaluate(options, attempt)
    _show(metrics, options.out)


def _evaluate(options: EvaluateOptions, attempt: Path) -> dict[str, Any]:
    from friendrec.datasets.prepared import load_prepared
    from friendrec.pipeline.evaluation.report import write_report
    from friendrec.pipeline.evaluation.results import results
    from friendrec.pipeline.evaluation.tasks import Exclusions, scored_events

    data = load_prepared(open_published(options.data, "data")[0])
    exclusions = Exclusions.of(data)
    events, counts = scored_events(data, options.period, exclusions)
    run, manifest = open_published(options.run, "run") if options.run is not None else (None, None)
    recommender = _open(options) if run is not None else None
    uses = _test_uses(run, options) if run is not None else None
    with _progress() as progress:
        evaluation = score(data, events, exclusions, recommender, options.baselines, progress)
    metrics = {
        "protocol": {
            "name": "temporal",
            "period": options.period,
            "train_until": _iso(data.train_until),
            "validation_until": _iso(data.validation_until),
            "candidates": data.num_train_users,
            "test_uses": uses,
            "events": counts["events"],
            "uncovered": counts["uncovered"],
        },
        **results(evaluation),
        "model": _model(manifest),
    }
    (attempt / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    losses = run / "metrics.jsonl" if run is not None else None
    write_report(attempt / "report.html", metrics, evaluation, losses, _lineage(options))
    return metrics


def score(
    data: "PreparedData",
    events: "Events",
    exclusions: "Exclusions",
    recommender: "Recommender | None",
    baselines: bool,
    progress: "Progress | None" = None,
) -> "Evaluation":
    """Rank every event by the recommender, where there is one, and by the baselines, where they are asked for."""
    from friendrec.pipeline.evaluation.baselines import baseline_ranks
    from friendrec.pipeline.evaluation.results import MODEL, Evaluation, history_length
    from friendrec.pipeline.evaluation.scoring import recommender_ranks
    from friendrec.pipeline.evaluation.tasks import STATES

    ranks: dict[str, dict[str, Any]] = {}
    for state in STATES:
        if recommender is not None:
            advance = _bar(progress, f"model, {state}", len(events.index))
            ranks.setdefault(MODEL, {})[state] = recommender_ranks(
                data, events, exclusions, recommender, state, advance
            )
        if baselines:
            advance = _bar(progress, f"baselines, {state}", len(events.index))
            for name, placed in baseline_ranks(data, events, exclusions, state)[0].items():
                ranks.setdefault(name, {})[state] = placed
            advance(len(events.index))
    return Evaluation(events, ranks, {state: history_length(data, events, state) for state in STATES})


def _open(options: EvaluateOptions) -> "Recommender":
    from friendrec.pipeline.inference import open_recommender

    assert options.run is not None
    recommender: Recommender = open_recommender(options.run, options.data, options.index)
    return recommender


def _test_uses(run: Path, options: EvaluateOptions) -> int:
    """How often the run has been scored on the test period, this time included; one appended line is one use."""
    log = run / TEST_USES
    if options.period == "test":
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "out": options.out})
        with log.open("a") as file:
            file.write(line + "\n")
    return len(log.read_text().splitlines()) if log.exists() else 0


def _model(manifest: Manifest | None) -> dict[str, Any]:
    """What the run's manifest says of the model."""
    said = manifest.extra if manifest is not None else {}
    names = ("preset", "parameters", "world_size", "train_seconds", "examples_per_second")
    return {name: said[name] for name in names if name in said}


def _lineage(options: EvaluateOptions) -> dict[str, str]:
    named = {"prepared data": options.data, "run": options.run, "index": options.index}
    return {name: path for name, path in named.items() if path is not None}


def _iso(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat()


def _progress() -> "AbstractContextManager[Progress]":
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)


def _bar(progress: "Progress | None", name: str, total: int) -> Any:
    """A function that moves a new bar on by so many events."""
    if progress is None:
        return lambda scored: None
    task = progress.add_task(name, total=total)
    return lambda scored: progress.advance(task, scored)


def _show(metrics: dict[str, Any], out: str) -> None:
    from rich.console import Console

    from friendrec.pipeline.summary import metrics_table

    console = Console()
    console.print(metrics_table(metrics))
    console.print(f"{out}/report.html", soft_wrap=True, highlight=False)
