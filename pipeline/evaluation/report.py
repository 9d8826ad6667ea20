"""report.html: what was measured in words, the figures beside their baselines, and the pictures, in one file."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from friendrec.pipeline.evaluation import figures
from friendrec.pipeline.evaluation.results import MODEL, Evaluation
from friendrec.pipeline.evaluation.tasks import STATES, TASKS

COLUMNS = ("recall@10", "recall@50", "recall@100", "ndcg@10", "mrr", "mean_rank")
TASK_WORDS = {
    "next_contact": "Whom will this user contact next, people they already know included?",
    "new_link": "Whom will this user contact for the first time?",
    "reply": "The new links that answer someone who had contacted the user first.",
    "unprompted_link": "The other new links: discovery, with nobody having made the first move.",
}
SLICE_WORDS = {
    "history_length": ("How much was known of the actor", "the number of events the actor was known to have in them"),
    "target_degree_decile": (
        "How well met the person turned to was",
        "tenths of the candidates by how many others they had met in the train period, 1 the fewest",
    ),
    "action": ("What they did", "the action, which no method is told"),
    "distance": (
        "How far apart the two were",
        "steps between them in the network of who was known to have met: two are friends of friends",
    ),
    "new_actor": ("Whether the actor is new", "whether the actor first appears after the train period"),
    "new_target": (
        "Whether the person turned to is new to it",
        "whether nobody had turned to them in the train period",
    ),
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
    shown = "frozen" if has_model and not evaluation.has(MODEL, "live") else "live"
    html = environment.from_string(template).render(
        m=metrics,
        has_model=has_model,
        name=metrics["model"].get("preset", metrics["model"].get("source", "the model")) if has_model else "baselines",
        shown=shown,
        lineage=lineage,
        tasks=TASKS,
        states=STATES,
        columns=COLUMNS,
        words=TASK_WORDS,
        titles=figures.TITLES,
        bars=figures.bars(metrics, shown) if metrics["baselines"] or has_model else None,
        curves=figures.curves(metrics, evaluation),
        slices=[
            (*SLICE_WORDS[name], figures.slices(parts, shown))
            for name, parts in metrics["slices"].items()
            if len(parts) > 1
        ],
        losses=figures.losses(lines) if any("loss" in line for line in lines) else None,
    )
    path.write_text(html)


def write_protocol_report(path: Path, metrics: dict[str, Any], lineage: dict[str, str]) -> None:
    """Write the page of a protocol that has a template of its own."""
    from jinja2 import Environment

    name = f"{metrics['protocol']['name']}.html.jinja"
    template = files("friendrec.pipeline.evaluation").joinpath(name).read_text()
    path.write_text(
        Environment(autoescape=True, trim_blocks=True).from_string(template).render(m=metrics, lineage=lineage)
    )


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
