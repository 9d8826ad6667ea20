"""What each kind of published directory says of itself: a few facts, and tables."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from friendrec.pipeline.lineage import Published
from friendrec.pipeline.summary import TASKS, comparison_table, insight_table, metrics_table, reference_summary


@dataclass
class Description:
    facts: dict[str, str]
    tables: list[RenderableType] = field(default_factory=list)


def describe_contents(published: Published) -> Description:
    """The facts and tables of a directory of any kind; of an unknown one, what its manifest adds."""
    known = _KINDS.get(published.manifest.kind)
    return known(published) if known else Description(_scalars(published.manifest.extra))


def epochs_table(lines: Iterable[str], best_step: int) -> Table:
    """The validations of metrics.jsonl: one row an epoch, with the mean of the losses logged since the one before."""
    table = Table(title="validations, live; * is the best, which is what the run gives")
    for column in ("epoch", "step", "minutes", "loss", *(f"{task} recall@10" for task in TASKS[:2]), ""):
        table.add_column(column, justify="right")
    losses: list[float] = []
    for line in map(json.loads, lines):
        if "loss" in line:
            losses.append(line["loss"])
        if "validation" not in line:
            continue
        recalls = [f"{line['validation'].get(task, {}).get('recall@10', float('nan')):.3f}" for task in TASKS[:2]]
        loss = f"{sum(losses) / len(losses):.3f}" if losses else "–"
        mark = "*" if line["step"] == best_step else ""
        table.add_row(str(line["epoch"]), f"{line['step']:,}", f"{line['seconds'] / 60:.1f}", loss, *recalls, mark)
        losses = []
    return table


def plan_table(shards: list[dict[str, Any]]) -> Table:
    """plan.json: one row a table, over how many processes it is spread and how."""
    table = Table(title="sharding plan")
    for column in ("table", "sharding", "processes", "rows", "dim"):
        table.add_column(column, justify="left" if column in ("table", "sharding") else "right")
    for name, kind in dict.fromkeys((shard["table"], shard["sharding"]) for shard in shards):
        own = [shard for shard in shards if (shard["table"], shard["sharding"]) == (name, kind)]
        rows = max(shard["first_row"] + shard["rows"] for shard in own)
        dim = max(shard.get("first_column", 0) + shard["dim"] for shard in own)
        table.add_row(name, kind, str(len({shard["rank"] for shard in own})), f"{rows:,}", str(dim))
    return table


def updates_table(updates: Iterable[dict[str, Any]]) -> Table:
    """Of an index of clusters: one row an update, and what it was made from."""
    table = Table(title="updates")
    for column in ("made", *_CHANGES, "from"):
        table.add_column(column, justify="right" if column in _CHANGES else "left")
    for update in updates:
        counts = [f"{update[name]:,}" if update.get(name) else "" for name in _CHANGES]
        sources = ", ".join(source["path"] for source in update["inputs"].values())
        table.add_row(update["created"], *counts, sources or "itself, compacted")
    return table


def changed_settings(config: dict[str, Any]) -> str:
    """What a run's config has other than its preset, as words: `epochs 5, dim 8`."""
    from friendrec.pipeline.config import PRESETS

    if config["preset"] not in PRESETS:
        return "of a preset that this version does not have"
    default = dataclasses.asdict(PRESETS[config["preset"]]())
    words = [
        f"{name} {value}"
        for part, fields in config.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if value != default.get(part, {}).get(name)
    ]
    return ", ".join(words) if words else "the preset's"


def _log(published: Published) -> Description:
    return Description(_scalars(published.manifest.extra))


def _data(published: Published) -> Description:
    extra, splits = published.manifest.extra, json.loads(published.text("splits.json"))
    actions = json.loads(published.text("actions.json"))
    train, validation = splits["num_train_events"], splits["num_validation_events"]
    facts = {
        "users": f"{extra['users']:,}, {splits['num_train_users']:,} of them in train: the candidates",
        "events": f"{extra['events']:,}: train {train:,}, validation {validation:,}, "
        f"test {extra['events'] - train - validation:,}",
        "periods": f"train until {_time(splits['train_until'])}, validation until {_time(splits['validation_until'])}",
        "actions": ", ".join(f"{action['name']} ({action['role']})" for action in actions),
    }
    cleaning = {name: rows for name, rows in extra["cleaning"].items() if isinstance(rows, int) and rows}
    facts["cleaning"] = ", ".join(f"{name.replace('_', ' ')} {rows:,}" for name, rows in cleaning.items())
    return Description(facts)


def _run(published: Published) -> Description:
    extra, progress = published.manifest.extra, published.manifest.extra["progress"]
    minutes, device = extra["train_seconds"] / 60, extra.get("device", "cpu")
    stop_on = published.manifest.options["training"]["stop_on"]
    facts = {
        "preset": extra["preset"],
        "settings": changed_settings(published.manifest.options),
        "parameters": f"{extra['parameters']:,}",
        "trained": f"{progress['step']:,} steps, {progress['epoch']} epochs, {minutes:.1f} minutes, "
        f"{extra['examples_per_second']:,} examples/s; processes: {extra['world_size']}, {device}",
        **({"codes": _codes(extra["sizes"])} if "sizes" in extra else {}),
        "best": f"{extra['checkpoint']}, live {stop_on} Recall@10 {progress['best_recall']:.3f} in validation",
    }
    validations = epochs_table(published.text("metrics.jsonl").splitlines(), progress["best_step"])
    return Description(facts, [validations, plan_table(json.loads(published.text("plan.json")))])


def _embeddings(published: Published) -> Description:
    extra = published.manifest.extra
    facts = {"users": f"{_rows(published):,}", "vectors": f"query and target, {extra['dimensions']} × {extra['dtype']}"}
    return Description(facts | {"as of": _time(extra["as_of"])})


def _stu(published: Published) -> Description:
    from friendrec.pipeline.token_report import as_table

    extra, report = published.manifest.extra, json.loads(published.text("report.json"))
    facts = {"users": f"{_rows(published):,}", "method": extra["method"], "codes": _codes(extra["sizes"])}
    return Description(facts, [as_table(report)])


def _index(published: Published) -> Description:
    """What it was built as; where it was updated since, the users of now, and a table of the updates."""
    extra = published.manifest.extra
    facts = _scalars(json.loads(published.text("meta.json")) | {name: extra[name] for name in _UPDATED & extra.keys()})
    return Description(facts, [updates_table(extra["updates"])] if extra.get("updates") else [])


def _report(published: Published) -> Description:
    metrics = json.loads(published.text("metrics.json"))
    facts = {"page": f"{published.place}/report.html", "protocol": metrics["protocol"]["name"]}
    if "reference" in metrics:
        return Description(facts, [reference_summary(metrics)])
    if "link" in metrics:
        scores = metrics["link"].items()
        return Description(facts | {name: f"average precision {row['average_precision']:.2%}" for name, row in scores})
    return Description(facts, [metrics_table(metrics)])


def _recommendations(published: Published) -> Description:
    extra = published.manifest.extra
    facts = {"users": f"{extra['users']:,}", "rows": f"{_rows(published):,}, at most {extra['k']} a user"}
    return Description(facts | {"as of": _time(extra["as_of"])})


def _frontier(published: Published) -> Description:
    from friendrec.pipeline.frontier import frontier_table

    summary = json.loads(published.text("summary.json"))
    facts = {"page": f"{published.place}/report.html"} | {
        name: f"{summary[name]:,}" for name in ("candidates", "queries", "lists")
    }
    exact = summary["exact"]
    facts["exact"] = f"task recall@100 {exact['task_recall@100']:.3f}, {exact['queries_per_second']:,.0f} queries/s"
    return Description(facts, [frontier_table(summary)])


def _insight(published: Published) -> Description:
    metrics = json.loads(published.text("metrics.json"))
    found = {name: found["finding"].removeprefix(f"{name}: ") for name, found in metrics["data"].items()}
    return Description({"page": f"{published.place}/report.html"} | found, [insight_table(metrics)])


def _comparison(published: Published) -> Description:
    facts = {"page": f"{published.place}/report.html"}
    return Description(facts, [comparison_table(json.loads(published.text("metrics.json")))])


_KINDS: dict[str, Callable[[Published], Description]] = {
    "log": _log, "data": _data, "run": _run, "embeddings": _embeddings, "stu": _stu, "index": _index, "report": _report,
    "recommendations": _recommendations, "comparison": _comparison, "frontier": _frontier, "insight": _insight,
}  # fmt: skip
_UPDATED = {"candidates", "deleted"}
"""What an update of an index leaves in its manifest in place of what it was built with."""
_CHANGES = ("appended", "replaced", "returned", "deleted")


def _codes(sizes: Iterable[int]) -> str:
    """Of how many tokens each level is."""
    return f"{' × '.join(map(str, sizes))} tokens"


def _rows(published: Published) -> int:
    """Rows of the Parquet files, from their footers."""
    import pyarrow.parquet as pq

    rows = 0
    for name in published.manifest.files:
        if name.endswith(".parquet"):
            with published.open(name) as stream:
                rows += pq.read_metadata(stream).num_rows
    return rows


def _scalars(values: dict[str, Any]) -> dict[str, str]:
    scalars = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
    return {
        name.replace("_", " "): f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)
        for name, value in scalars.items()
    }


def _time(microseconds: int) -> str:
    from friendrec.pipeline.times import format_time

    return format_time(microseconds)
