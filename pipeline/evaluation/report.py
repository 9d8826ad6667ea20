"""report.html: what was measured in words, the figures beside their baselines, and the pictures, in one file."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from friendrec.pipeline.evaluation import figures
from friendrec.pipeline.evaluation.results import HISTORY_BINS, MODEL, Evaluation
from friendrec.pipeline.evaluation.tasks import STATES, TASKS

COLUMNS = ("recall@10", "recall@50", "recall@100", "ndcg@10", "mrr", "mean_rank")
TASK_WORDS = {
    "next_contact": "Whom will this user contact next, people they already know included?",
    "new_link": "Whom will this user contact for the first time?",
    "reply": "The new links that answer someone who had contacted the user first.",
    "unprompted_link": "The other new links: discovery, with nobody having made the first move.",
}


def write_report(
    path: Path, metrics: dict[str, Any], evaluation: Evaluation, losses: Path | None, lineage: dict[str, str]
) -> None:
    """Write the page for `metrics` (what metrics.json holds); `losses` is the run's metrics.jsonl."""
    from jinja2 import Environment

    lines = read_losses(losses)
    template = files("friendrec.pipeline.evaluation").joinpath("report.html.jinja").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"metric": metric, "ci": ci}
    has_model = MODEL in evaluation.ranks
    html = environment.from_string(template).render(
        m=metrics,
        has_model=has_model,
        name=metrics["model"].get("preset", "the model") if has_model else "baselines",
        lineage=lineage,
        tasks=TASKS,
        states=STATES,
        columns=COLUMNS,
        words=TASK_WORDS,
        titles=figures.TITLES,
        bins=list(HISTORY_BINS),
        bars=figures.bars(metrics, "live") if metrics["baselines"] or has_model else None,
        curves=figures.curves(metrics, evaluation),
        slices=figures.slices(metrics),
        losses=figures.losses(lines) if any("loss" in line for line in lines) else None,
    )
    path.write_text(html)


def read_losses(path: Path | None) -> list[dict[str, Any]]:
    """The lines that training wrote: {"step", "loss"} and {"step", "validation": {task: figures}}."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def metric(value: float | None, name: str = "recall@10") -> str:
    """A figure as the tables show it: ranks with one decimal, shares with three."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if name == "mean_rank" else f"{value:.3f}"


def ci(ends: list[float] | None, signed: bool = False) -> str:
    """An interval: `0.381–0.437`, or with signs `-0.012 to +0.020`."""
    if ends is None:
        return ""
    return f"{ends[0]:+.3f} to {ends[1]:+.3f}" if signed else f"{ends[0]:.3f}–{ends[1]:.3f}"
