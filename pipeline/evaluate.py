"""Evaluate a run, or vectors or lists made elsewhere, beside baselines.

Writes metrics.json, report.html, which opens with the network off, and the model's ranks.npz. Every event of the
period is ranked among all users of the train period; the validation period is scored unless the test period is asked
for, and each use of the test period is counted in the run. This is the temporal protocol; figures of the others are
for comparison with the literature only. Processes that are launched together share the events; each opens the run,
and holds the vectors of all candidates.
"""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from friendrec.errors import FriendrecError
from friendrec.pipeline.publish import Manifest, is_finished, open_published, publish, read_manifest
from friendrec.pipeline.together import is_rank_zero, publish_together, say

if TYPE_CHECKING:
    from rich.progress import Progress

    from friendrec.datasets.prepared import PreparedData
    from friendrec.pipeline.evaluation.elsewhere import Lists, Vectors
    from friendrec.pipeline.evaluation.scoring import Recommender

TEST_USES = "test_uses.jsonl"
"""File of a run with one line for each use of the test period: appended to, never rewritten."""

EXAMPLES = """
friendrec evaluate --data data --run run --baselines --out report
friendrec evaluate --data data --run run --index index --baselines --period test --out report-test
friendrec evaluate --data data --baselines --out report-baselines
friendrec evaluate --data data --baselines --oracle log --out report-oracle
friendrec evaluate --data data --recommendations lists --baselines --out report-lists
friendrec evaluate --data data --run run-stu --also run --out report-both
torchrun --nproc-per-node 2 --no-python -- friendrec evaluate --data data --run run --baselines --out report
friendrec evaluate --data data --protocol link --out report-link
friendrec evaluate --data data --protocol reference --out report-reference
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    data: str
    """Directory or URL that `friendrec prepare` made."""
    run: str | None = None
    """Directory or URL that `friendrec train` made."""
    index: str | None = None
    """Directory or URL that `friendrec index` made from the run's embeddings; without it all users are scored anew.
    Of an approximate index (ivf, hnsw) or a server (milvus) the first 100 found are scored: no mean rank, no MRR."""
    also: str | None = None
    """Directory or URL of another run on the same data, scored beside the run, and so are their lists merged into one
    by reciprocal rank, at weights that are chosen on the validation period."""
    embeddings: str | None = None
    """Instead of a run: Parquet of user_id, query, target (lists of floats), as known at the end of train."""
    recommendations: str | None = None
    """Instead of a run: Parquet of user_id, rank, candidate_id, as known then; figures go as far as the lists."""
    period: Literal["validation", "test"] = "validation"
    """validation: what decisions may be based on. test: the last events of the log, for a final figure."""
    baselines: bool = False
    """Put hand-made and fitted scores beside it: 21 of them, or 19 where the package implicit is not installed."""
    oracle: str | None = None
    """Directory or URL that `friendrec simulate` made, where the data is of that log: beside the baselines, live, the
    ranking by the generator's own probabilities, which no method beats but by luck."""
    protocol: Literal["temporal", "link", "reference"] = "temporal"
    """temporal: the whole ranking, live and frozen. link: the literature's, each test event against one random target
    (an easy question), on the log before cleaning; it scores EdgeBank. reference: the concept repository's, which
    tests what was trained on (leaky); it trains and scores both presets, some minutes on a log of 20,000 events."""
    interactions: str | None = None
    """Of the protocol link: the log, where it is no longer where `friendrec prepare` read it."""
    out: str
    """Directory or URL to create."""


def main(options: EvaluateOptions) -> None:
    """Publish the report at `options.out`, or find it there already."""
    _check(options)
    if options.index is not None:
        _refuse_deleted(options.index)
    inputs = _inputs(options)
    if is_finished(options.out, kind="report", options=options, inputs=inputs):
        say(f"{options.out} is this report already.")
        return
    if options.protocol == "temporal":
        from friendrec.sharding.parallel import process_group

        with (
            process_group(),
            publish_together(options.out, kind="report", options=options, inputs=inputs, extra={}) as attempt,
        ):
            metrics = _evaluate(options, attempt)
    elif is_rank_zero():  # the other protocols take one process
        with publish(options.out, kind="report", options=options, inputs=inputs) as attempt:
            metrics = {"link": _evaluate_links, "reference": _evaluate_reference}[options.protocol](options, attempt)
    if is_rank_zero():
        _show(metrics, options.out)


def _check(options: EvaluateOptions) -> None:
    if options.interactions is not None and options.protocol != "link":
        raise FriendrecError("--interactions is for the protocol link alone: leave it out, or pass --protocol link")
    if options.protocol != "temporal":
        _check_fixed(options)
        return
    given = [name for name in ("run", "embeddings", "recommendations") if getattr(options, name) is not None]
    if len(given) > 1:
        raise FriendrecError(f"--{' and --'.join(given)} are scored one at a time: pass one of them")
    if not given and not options.baselines:
        raise FriendrecError(
            "nothing to evaluate: pass --run RUN, --embeddings E, --recommendations R, --baselines or one and the last"
        )
    if options.run is None and options.index is not None:
        raise FriendrecError("an index cannot be evaluated without the model that asks it: pass --run RUN as well")
    if options.run is None and options.also is not None:
        raise FriendrecError("--also is scored beside a run: pass --run RUN as well, or this one as --run")


def _check_fixed(options: EvaluateOptions) -> None:
    """The other protocols say themselves what is scored."""
    scored = {"link": "scores EdgeBank", "reference": "trains models of its own"}[options.protocol]
    defaults = EvaluateOptions(data="", out="")
    for name in ("run", "index", "also", "embeddings", "recommendations", "period", "baselines", "oracle"):
        if getattr(options, name) != getattr(defaults, name):
            raise FriendrecError(
                f"--{name} has no meaning in the protocol {options.protocol}, which {scored}: leave it out"
            )


def _refuse_deleted(index: str) -> None:
    """A deleted user is no candidate, and would be counted as one, and as a miss."""
    if deleted := read_manifest(index, "index").extra.get("deleted"):
        raise FriendrecError(
            f"{deleted:,} users of {index} were deleted since, whom figures would count as missed: "
            "evaluate the index as it was built; recommend takes this one"
        )


def _inputs(options: EvaluateOptions) -> dict[str, str]:
    names = ("data", "run", "index", "also", "embeddings", "recommendations", "interactions", "oracle")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _evaluate_links(options: EvaluateOptions, attempt: Path) -> dict[str, Any]:
    from friendrec.pipeline.evaluation.link import edge_bank, read_uncleaned
    from friendrec.pipeline.evaluation.report import write_protocol_report

    log, rows = read_uncleaned(open_published(options.data, "data")[1], options.interactions)
    metrics = {
        "protocol": {"name": "link", "label": "easy", "events": len(rows[0])},
        "link": {"edge_bank": edge_bank(*rows)},
    }
    (attempt / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    write_protocol_report(attempt / "report.html", metrics, {"data": options.data, "interactions": log})
    return metrics


def _evaluate_reference(options: EvaluateOptions, attempt: Path) -> dict[str, Any]:
    from friendrec.datasets.prepared import load_prepared
    from friendrec.pipeline.evaluation.reference_table import STEPS, reference_table
    from friendrec.pipeline.evaluation.report import write_protocol_report

    data = load_prepared(open_published(options.data, "data")[0])
    with _progress() as progress:
        task = progress.add_task("training", total=STEPS)
        metrics = reference_table(data, advance=lambda: progress.advance(task))
    (attempt / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    write_protocol_report(attempt / "report.html", metrics, _inputs(options))
    return metrics


def _evaluate(options: EvaluateOptions, attempt: Path) -> dict[str, Any]:
    """Every rank scores its share; rank 0 writes the report, the others have nothing to say."""
    from friendrec.datasets.prepared import load_prepared
    from friendrec.pipeline.evaluation.fitted import missing_baselines
    from friendrec.pipeline.evaluation.report import write_report
    from friendrec.pipeline.evaluation.stored import save_ranks
    from friendrec.pipeline.evaluation.temporal import evaluate_period

    data = load_prepared(open_published(options.data, "data")[0])
    run, manifest = open_published(options.run, "run") if options.run is not None else (None, None)
    other, other_manifest = open_published(options.also, "run") if options.also is not None else (None, None)
    scored, said = _open_source(options, data)
    also = _open(options, options.also) if options.also is not None else None
    name = _name_beside(manifest, other_manifest, options.also)
    with _progress(disable=not is_rank_zero()) as progress:
        found = evaluate_period(
            data,
            options.period,
            scored,
            also,
            name,
            baselines=options.baselines,
            log=options.oracle,
            progress=progress,
        )
    if found is None:
        return {}
    evaluation, sections, counts = found
    metrics = {
        "protocol": {
            "name": "temporal",
            "period": options.period,
            "train_until": _iso(data.train_until),
            "validation_until": _iso(data.validation_until),
            "candidates": data.num_train_users,
            "test_uses": _test_uses(run, options) if run is not None else None,
            **({"test_uses_beside": _test_uses(other, options)} if other is not None else {}),
            "events": counts["events"],
            "uncovered": counts["uncovered"],
            "missing_baselines": missing_baselines() if options.baselines else {},
        },
        **sections,
        "model": _model(manifest) | said,
    }
    (attempt / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    save_ranks(attempt, evaluation)
    losses = run / "metrics.jsonl" if run is not None else None
    write_report(attempt / "report.html", metrics, evaluation, losses, _inputs(options))
    return metrics


def _open_source(
    options: EvaluateOptions, data: "PreparedData"
) -> "tuple[Recommender | Vectors | Lists | None, dict[str, Any]]":
    """What is scored, and what the report says of it besides the run's manifest."""
    from friendrec.pipeline.evaluation.elsewhere import read_lists, read_vectors
    from friendrec.pipeline.evaluation.ranking import ranked_until

    if options.embeddings is not None:
        vectors, counts = read_vectors(options.embeddings, data)
        return vectors, {"source": "embeddings", **counts}
    if options.recommendations is not None:
        lists, counts = read_lists(options.recommendations, data)
        return lists, {"source": "recommendations", **counts}
    if options.run is None:
        return None, {}
    recommender = _open(options, options.run)
    until = ranked_until(recommender)
    return recommender, {} if until is None else {"ranked_until": until}


def _open(options: EvaluateOptions, run: str) -> "Recommender":
    """The run, or the one beside it, which needs no index."""
    from friendrec.pipeline.inference import open_recommender

    recommender: Recommender = open_recommender(run, options.data, options.index if run == options.run else None)
    return recommender


def _name_beside(manifest: Manifest | None, other: Manifest | None, path: str | None) -> str:
    """What the run beside the other is called: its preset, its directory where the presets are the same."""
    if other is None or manifest is None or path is None:
        return ""
    names = other.extra.get("preset"), path.rstrip("/").rpartition("/")[2]
    return next((name for name in names if name not in (None, "", "fusion", manifest.extra.get("preset"))), "also")


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


def _iso(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat()


def _progress(disable: bool = False) -> "AbstractContextManager[Progress]":
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True, disable=disable)


def _show(metrics: dict[str, Any], out: str) -> None:
    from rich.console import Console

    from friendrec.pipeline.summary import metrics_table, reference_summary

    console = Console()
    if "link" in metrics:
        for name, row in metrics["link"].items():
            precision, area = (f"{row[key]:.2%} ± {row[f'{key}_sd']:.2%}" for key in ("average_precision", "auc"))
            console.print(f"{name}: average precision {precision}, area under the curve {area}", highlight=False)
    else:
        console.print(reference_summary(metrics) if "reference" in metrics else metrics_table(metrics))
    console.print(f"{out}/report.html", soft_wrap=True, highlight=False)
