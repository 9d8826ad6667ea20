"""Rows of `friendrec compare` side by side: what each scores, costs, and adds to the row before."""

import json
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from friendrec.pipeline.evaluation import figures
from friendrec.pipeline.evaluation.intervals import bootstrap_means, interval
from friendrec.pipeline.evaluation.report import ci, metric
from friendrec.pipeline.evaluation.results import FUSION, MODEL, Evaluation, best_baseline
from friendrec.pipeline.evaluation.stored import load_ranks
from friendrec.pipeline.evaluation.tasks import STATES, TASKS
from friendrec.pipeline.inference import Recommender, open_recommender
from friendrec.pipeline.publish import open_published

TABLE_TASKS = ("next_contact", "new_link", "unprompted_link")
ASKED, K, REPEATS = 1024, 100, 3
"""Of the figure queries/s: queries at once, places of each, and how often they are put; the fastest counts."""


def compared(reports: Mapping[str, Path], baselines: Path, before: Mapping[str, str]) -> dict[str, Any]:
    """Protocol, rows, merged lists and best baselines from the reports of the rows, in order, and of the baselines.

    `before` names the row that each is compared with, where there is one.
    """
    metrics = {name: json.loads((report / "metrics.json").read_text()) for name, report in reports.items()}
    tasks = recalls({name: load_ranks(report) for name, report in reports.items()}, before)
    first = next(iter(metrics.values()))
    rows = {
        name: {
            "before": before.get(name),
            "tasks": tasks[name],
            "new_users": said["slices"]["new_actor"]["yes"]["new_link"]["live"],
        }
        for name, said in metrics.items()
    }
    names = ("name", "period", "train_until", "candidates", "events", "uncovered")
    return {
        "protocol": {name: first["protocol"][name] for name in names},
        "tasks": {task: {"events": first["tasks"][task]["events"]} for task in TASKS},
        "rows": rows,
        "fusion": {name: said["beside"][FUSION] for name, said in metrics.items() if "beside" in said},
        "baselines": _best(json.loads((baselines / "metrics.json").read_text())["baselines"]),
    }


def recalls(
    rows: Mapping[str, Evaluation], before: Mapping[str, str]
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Recall@10 by row, task and state, and its difference to the row before, on the same draws of users."""
    events = next(iter(rows.values())).events
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {name: {task: {} for task in TASKS} for name in rows}
    for task in TASKS:
        actors = events.actor[events.of_task(task)]
        for state in STATES:
            ranks = {name: evaluation.of(MODEL, task, state) for name, evaluation in rows.items()}
            if not len(actors):
                continue
            hits = np.stack([rank <= 10 for rank in ranks.values()], axis=1).astype(np.float64)
            drawn = dict(zip(rows, bootstrap_means(hits, actors).T, strict=True))
            recall = dict(zip(rows, hits.mean(axis=0).tolist(), strict=True))
            for name in rows:
                found[name][task][state] = {"recall@10": recall[name], "recall@10_ci": interval(drawn[name])}
            for name, other in before.items():
                found[name][task][state] |= {
                    "difference": recall[name] - recall[other],
                    "difference_ci": interval(drawn[name] - drawn[other]),
                }
    return found


def cost(run: str | Path, data: str) -> dict[str, Any]:
    """What a run takes: parameters, their bytes, how fast it trained and how fast it answers here."""
    said = open_published(run, "run")[1].extra
    recommender = open_recommender(run, data)
    sizes = {name: p.numel() * p.element_size() for name, p in recommender.model.named_parameters()}
    tables = sum(size for name, size in sizes.items() if name.startswith("lookup."))
    return {
        "parameters": said["parameters"],
        "table_bytes": tables,
        "dense_bytes": sum(sizes.values()) - tables,
        "steps": said["progress"]["step"],
        "train_seconds": said["train_seconds"],
        "examples_per_second": said["examples_per_second"],
        "queries_per_second": round(queries_per_second(recommender)),
    }


def queries_per_second(recommender: Recommender) -> float:
    """Lists of the best K new friends a second, encoding, exclusion and exact search included, ASKED at once."""
    data = recommender.data
    actors = np.linspace(0, data.num_train_users - 1, ASKED).astype(np.int64)
    as_of = np.full(ASKED, data.train_until)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        recommender.recommend(actors, as_of, K)
        seconds.append(time.perf_counter() - began)
    return ASKED / min(seconds)


def write_comparison(path: Path, metrics: dict[str, Any], data: str) -> None:
    """Write the page for `metrics` (what metrics.json holds)."""
    from jinja2 import Environment

    template = files("friendrec.pipeline.evaluation").joinpath("compare.html.jinja").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"metric": metric, "ci": ci, "size": size}
    path.write_text(
        environment.from_string(template).render(
            m=metrics,
            first=next(iter(metrics["rows"].values())),
            fused={name: metrics["rows"][name]["codes_of"] for name in metrics["fusion"]},
            tasks=TABLE_TASKS,
            titles=figures.TITLES,
            steps=figures.steps(metrics, TABLE_TASKS),
            data=data,
        )
    )


def size(count: int) -> str:
    """Bytes in kB or MB."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def _best(baselines: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The best baseline of each task and state, where there is one."""
    best: dict[str, dict[str, Any]] = {task: {} for task in TASKS}
    for task in TASKS:
        for state in STATES:
            name = best_baseline(baselines, task, state)
            if name is not None:
                scored = baselines[name][task][state]
                best[task][state] = {"name": name} | {key: scored[key] for key in ("recall@10", "recall@10_ci")}
    return best
