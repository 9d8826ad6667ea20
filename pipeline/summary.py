"""What a pipeline ends with: the metrics beside the baselines, where things are, and recommendations for one user."""

import json
from pathlib import Path
from typing import Any

from friendrec.pipeline.publish import open_published

METRIC = "recall@10"
TASKS = ("next_contact", "new_link", "reply", "unprompted_link")


def print_summary(out: str) -> None:
    """Print the results that a pipeline left under `out`."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    report, _ = open_published(f"{out}/report", "report")
    recommendations, _ = open_published(f"{out}/recommendations", "recommendations")
    console.print(metrics_table(json.loads((report / "metrics.json").read_text())))
    console.print(f"report           {report / 'report.html'}", highlight=False)
    console.print(f"metrics          {report / 'metrics.json'}", highlight=False)
    console.print(f"index            {out}/index", highlight=False)
    console.print(f"recommendations  {out}/recommendations", highlight=False)
    for user, friends in first_recommendations(recommendations, k=10):
        console.print(f"\nten recommendations for user {user}: {', '.join(map(str, friends))}", highlight=False)


def metrics_table(metrics: dict[str, Any]) -> Any:
    """One row for the model, live and frozen, and one a baseline, live; one column a task."""
    from rich.table import Table

    protocol = metrics["protocol"]
    table = Table(title=f"live {METRIC}, {protocol['period']} period, {protocol['candidates']:,} candidates")
    table.add_column("")
    for task in TASKS:
        table.add_column(task, justify="right")
    table.add_row("model", *_row(metrics["tasks"], "live"), style="bold")
    table.add_row("model, frozen", *_row(metrics["tasks"], "frozen"), end_section=True)
    for name, tasks in metrics.get("baselines", {}).items():
        if any(states.get("live") for states in tasks.values()):  # fitted ones are frozen only: see the report
            table.add_row(name, *_row(tasks, "live"))
    return table


def _row(tasks: dict[str, Any], state: str) -> list[str]:
    values = [tasks.get(task, {}).get(state, {}).get(METRIC) for task in TASKS]
    return ["–" if value is None else f"{value:.3f}" for value in values]


def first_recommendations(directory: Path, k: int) -> list[tuple[Any, list[Any]]]:
    """The first user with k recommendations (or with any) and its best k candidates; none where nobody has one."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    rows = ds.dataset(directory, format="parquet", exclude_invalid_files=True)
    first = rows.head(1, columns=["user_id"], filter=pc.field("rank") == k) or rows.head(1, columns=["user_id"])
    if not len(first):
        return []
    user = first["user_id"][0]
    mine = rows.to_table(columns=["rank", "candidate_id"], filter=pc.field("user_id") == user).sort_by("rank")
    return [(user.as_py(), mine["candidate_id"].to_pylist()[:k])]
