"""List the presets: what each is, what it costs and how good it is, as far as that was measured.

Quality is live Recall@10 on the validation period with the preset's defaults, every user of the train period a
candidate; below it the best heuristic on each task. `friendrec train PRESET --help` shows every field.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from friendrec.pipeline.config import PRESETS

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """
friendrec presets
friendrec train two_tower_mlp --help
"""
TASKS = ("next_contact", "new_link", "unprompted_link")


@dataclass(frozen=True, kw_only=True)
class PresetsOptions:
    """None."""


def main(options: PresetsOptions) -> None:
    """Print each preset with its measurements."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for name, config in PRESETS.items():
        console.print(f"[bold]{name}[/bold]")
        console.print(f"  {config.__doc__}")
        rows = [row for row in measured() if row["preset"] == name]
        if not rows:
            console.print("  not measured")
        for date, command, machine in dict.fromkeys((row["date"], row["command"], row["machine"]) for row in rows):
            own = [row for row in rows if (row["date"], row["command"], row["machine"]) == (date, command, machine)]
            console.print(f"  measured on {date}, {machine}: {command}")
            console.print(_table(own))
        console.print()


@cache
def measured() -> list[dict[str, Any]]:
    """The measurements of `measured.json`: a preset on a log, when, by which command."""
    rows: list[dict[str, Any]] = json.loads(files("friendrec.pipeline").joinpath("measured.json").read_text())
    return rows


def _table(rows: list[dict[str, Any]]) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("log", no_wrap=True)
    for column in ("parameters", "examples\n/ second", "minutes", *(task.replace("_", "\n") for task in TASKS)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cost = f"{row['parameters']:,}", f"{row['examples_per_second']:,}", f"{row['train_seconds'] / 60:.1f}"
        table.add_row(row["log"], *cost, *(f"{row['recall@10'][task]:.3f}" for task in TASKS))
        table.add_row("  heuristic", "", "", "", *(f"{row['best_heuristic'][task]:.3f}" for task in TASKS))
    return table
