"""Measure recall against work for every kind of index: how much is found when only a share of the users is compared.

Live new links of the validation period are asked about, exclusions and named contacts as in `friendrec evaluate`, and
each kind answers at one effort after the other. Task recall: the friend that was made next is among the 100 found.
Neighbour recall: the share of the exact search's 100. Writes frontier.json, frontier.csv, summary.json and report.html.
"""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from friendrec.errors import FriendrecError
from friendrec.pipeline.arguments import comma_list, did_you_mean
from friendrec.pipeline.publish import is_finished, open_published, publish

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

EXAMPLES = """
friendrec frontier --run run --data data --out frontier
friendrec frontier --run run --data data --stu run-stu --out frontier
friendrec frontier --run run --data data --kinds ivf,clusters --queries 1000 --out frontier
"""
KINDS = ("exact", "ivf", "hnsw", "ivfpq", "clusters", "beam")


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    run: str
    """Directory or URL that `friendrec train` made: a two-tower model, whose vectors are indexed."""
    data: str
    """Directory or URL that `friendrec prepare` made, on which it was trained."""
    out: str
    """Directory or URL to create."""
    stu: str | None = None
    """Directory or URL of an STU run on the same data: the width of its beams is swept as well."""
    queries: int = 2000
    """Events that are asked about, evenly spread over the period. More narrow the intervals."""
    kinds: str = ""
    """Kinds beside exact, separated by commas: ivf, hnsw, ivfpq, clusters, beam. By default all that there can be:
    clusters of a run that has them, beam with --stu. hnsw takes minutes to build for a million users."""
    lists: int | None = None
    """Lists of ivf and ivfpq, by default as many as the run has clusters, or would have."""

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise FriendrecError(f"--queries {self.queries}: give a positive number")
        if self.lists is not None and self.lists < 1:
            raise FriendrecError(f"--lists {self.lists}: give a positive number")
        for kind in comma_list(self.kinds):
            if kind not in KINDS:
                raise FriendrecError(f"--kinds: there is no kind {kind!r}: {did_you_mean(kind, KINDS)}")
        if "beam" in comma_list(self.kinds) and self.stu is None:
            raise FriendrecError("beams are those of an STU run: pass --stu RUN, or leave beam out of --kinds")


def main(options: FrontierOptions) -> None:
    """Publish the frontier at `options.out`, or find it there already."""
    inputs = {name: path for name in ("run", "data", "stu") if (path := getattr(options, name)) is not None}
    if is_finished(options.out, kind="frontier", options=options, inputs=inputs):
        print(f"{options.out} is this frontier already.")
        _show(json.loads((open_published(options.out, "frontier")[0] / "summary.json").read_text()), options.out)
        return
    extra: dict[str, Any] = {}
    with publish(options.out, kind="frontier", options=options, inputs=inputs, extra=extra) as attempt:
        summary = _measure(options, attempt, inputs)
        extra.update({name: summary[name] for name in ("candidates", "queries", "lists")})
    _show(summary, options.out)


def _measure(options: FrontierOptions, attempt: Path, inputs: dict[str, str]) -> dict[str, Any]:
    from friendrec.pipeline.evaluation.frontier_page import write_frontier
    from friendrec.pipeline.evaluation.frontier_summary import summary
    from friendrec.pipeline.evaluation.races import held

    kinds = comma_list(options.kinds)
    with _progress() as progress:
        rows, events, about = held(
            options.run, options.data, options.stu, kinds, options.queries, options.lists, progress
        )
    found = about | summary(rows, events.actor)
    write_frontier(attempt, rows, found, inputs)
    return found


def _progress() -> "AbstractContextManager[Progress]":
    from rich.console import Console
    from rich.progress import Progress

    # A thread that draws would count as time of the searches: `bar` draws instead.
    return Progress(console=Console(stderr=True), transient=True, auto_refresh=False)


def _show(summary: dict[str, Any], out: str) -> None:
    from rich.console import Console

    exact, console = summary["exact"], Console()
    if summary["kinds"]:
        console.print(frontier_table(summary))
    console.print(
        f"exact: {exact['task_recall@100']:.3f}, {exact['queries_per_second']:,.0f} queries/s on one thread",
        highlight=False,
    )
    console.print(f"{out}/report.html", soft_wrap=True, highlight=False)


def frontier_table(summary: dict[str, Any]) -> "Table":
    """Task recall of each kind at round shares, as a share of exact's."""
    from rich.table import Table

    kinds = summary["kinds"]
    shares = list(dict.fromkeys(share for kind in kinds.values() for share in kind["at_share"]))
    table = Table(
        title=f"task recall@100 by share of {summary['candidates']:,} vectors compared, "
        f"{summary['queries']:,} new links; of exact's in brackets"
    )
    table.add_column("")
    for share in sorted(shares, key=lambda text: float(text.rstrip("%"))):
        table.add_column(share, justify="right")
    table.add_column("95 % of exact's at", justify="right")
    table.add_column("queries/s there", justify="right")
    for name, kind in kinds.items():
        cells = [kind["at_share"].get(column.header) for column in table.columns[1:-2]]
        shown = ["–" if at is None else f"{at['task_recall']:.3f} [{_percent(at['of_exact'])}]" for at in cells]
        least, speed = kind["share_at_95_percent_of_exact"], kind["speed_at_task_recall"]["95%"]
        table.add_row(name, *shown, "–" if least is None else f"{least:.2%}", "–" if speed is None else f"{speed:,.0f}")
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
