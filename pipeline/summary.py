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
    """One row for the model, live and frozen, and one, live, for what stands beside it and for each baseline."""
    from rich.table import Table

    protocol = metrics["protocol"]
    table = Table(title=f"live {METRIC}, {protocol['period']} period, {protocol['candidates']:,} candidates")
    table.add_column("")
    for task in TASKS:
        table.add_column(task, justify="right")
    table.add_row("model", *_row(metrics["tasks"], "live"), style="bold")
    table.add_row("model, frozen", *_row(metrics["tasks"], "frozen"))
    for name, tasks in metrics.get("beside", {}).items():
        table.add_row(name, *_row(tasks, "live"))
    table.add_section()
    for name, tasks in metrics.get("baselines", {}).items():
        if any(states.get("live") for states in tasks.values()):  # fitted ones are frozen only: see the report
            table.add_row(name, *_row(tasks, "live"))
    return table


def _row(tasks: dict[str, Any], state: str) -> list[str]:
    values = [tasks.get(task, {}).get(state, {}).get(METRIC) for task in TASKS]
    return ["–" if value is None else f"{value:.3f}" for value in values]


def reference_summary(metrics: dict[str, Any]) -> Any:
    """The reference protocol's table: each method leaky, as published and without the leak."""
    from rich.table import Table

    table = Table(title=f"reference protocol, {metrics['protocol']['label']}: no claim rests on it")
    for column in ("", "accuracy", "MRR", "mean rank", "parameters"):
        table.add_column(column, justify="right" if column else "left")
    for method, row in metrics["reference"].items():
        rows = {"": row, "published": row.get("published"), **row["honest"]}
        for name, figures in rows.items():
            if figures is not None:
                cells = f"{figures['accuracy']:.2%}", f"{figures['mrr']:.2%}", f"{figures['mean_rank']:.2f}"
                parameters = f"{figures['parameters']:,}" if "parameters" in figures else ""
                table.add_row(f"  {name.replace('_', ' ')}" if name else method, *cells, parameters)
        table.add_section()
    return table


def comparison_table(metrics: dict[str, Any]) -> Any:
    """One row a step: live Recall@10 with what it adds, and below it what it costs."""
    from rich.console import Group
    from rich.table import Table

    protocol, tasks = metrics["protocol"], [task for task in TASKS if task != "reply"]
    quality = Table(title=f"live {METRIC}, {protocol['period']} period, {protocol['candidates']:,} candidates")
    cost = Table(title="cost")
    for table, columns in (
        (quality, (*tasks, "new users")),
        (cost, ("parameters", "bytes", "steps", "examples/s", "queries/s")),
    ):
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right")
    for name, row in metrics["rows"].items():
        cells = [row["tasks"][task].get("live", {}) for task in tasks]
        quality.add_row(name, *(f"{_value(cell)} {_change(cell)}" for cell in cells), _value(row["new_users"]))
        costs = row["parameters"], row["table_bytes"] + row["dense_bytes"], row["steps"]
        cost.add_row(name, *(f"{n:,}" for n in (*costs, row["examples_per_second"], row["queries_per_second"])))
    quality.add_section()
    for name, merged in metrics.get("fusion", {}).items():
        cells = [merged[task].get("live", {}) for task in tasks]
        quality.add_row(f"fusion with {name}", *(f"{_value(cell)} {_change(cell)}" for cell in cells))
    best = [metrics["baselines"][task].get("live", {}) for task in tasks]
    quality.add_row("best baseline", *(f"{_value(figures)} {'':7}" for figures in best), style="dim")
    quality.caption = (
        "± the row before, of codes the row that they are of, of merged lists the better of both; "
        "starred where the 95 % interval leaves out 0"
    )
    return Group(quality, cost)


def insight_table(metrics: dict[str, Any]) -> Any:
    """One row an effect, a data set a part: what it does to live Recall@10 and to queries/s, with intervals."""
    from rich.table import Table

    table = Table(title=f"effects on live {METRIC} of new links and on queries/s of one thread")
    for column in ("", METRIC, "queries/s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, found in metrics["data"].items():
        share, exact = next(iter(found["clusters"].items()))
        table.add_row(name, style="bold")
        rows = {effect_name(effect): effect for effect in found["effects"]} | {f"clusters, {share}": exact}
        for title, effect in rows.items():
            recall, speed = effect[METRIC], effect["queries_per_second"]
            table.add_row(
                f"  {title}",
                f"{times(recall)}\n{_with_ends(recall, '+.4f')}",
                f"{times(speed)}\n{_with_ends(speed, '+,.0f')}",
            )
        table.add_section()
    table.caption = "times and difference, with 95 % intervals; a line averages over the cells of all other factors"
    return table


def effect_name(effect: dict[str, Any]) -> str:
    """The level of a factor in words."""
    words = {"model": "{}", "clusters": "clusters", "share": "{} compared"}
    return words[effect["factor"]].format(effect["level"])


def _with_ends(change: dict[str, Any], form: str) -> str:
    low, high = change["difference_ci"]
    return f"{change['difference']:{form}} ({low:{form}} to {high:{form}})"


def times(change: dict[str, Any]) -> str:
    """A ratio with its 95 % interval: `×0.980 (0.961–1.012)`."""
    if change["ratio"] is None:
        return "from 0"
    ratio, low, high = (
        f"{value:.3f}" if value < 10 else f"{value:,.1f}" for value in (change["ratio"], *change["ratio_ci"])
    )
    return f"×{ratio} ({low}–{high})"


def _value(figures: dict[str, Any]) -> str:
    return f"{figures[METRIC]:.3f}" if METRIC in figures else "–"


def _change(figures: dict[str, Any]) -> str:
    """Starred where the interval of the difference leaves out 0."""
    if "difference" not in figures:
        return " " * 7
    low, high = figures["difference_ci"]
    return f"{figures['difference']:+.3f}{' ' if low <= 0 <= high else '*'}"


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
