"""Prepare a log for training: clean it, order it, split it in time, lay it out user by user."""

import shlex
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from friendrec.datasets.preparation_config import Correctable, PreparationConfig
from friendrec.errors import FriendrecError

if TYPE_CHECKING:
    from rich.console import Console

    from friendrec.datasets.preparation import Progress, Summary
    from friendrec.datasets.profiles import Users
    from friendrec.datasets.schema import Log

EXAMPLES = """\
friendrec prepare --interactions log.parquet --out data
friendrec prepare --interactions log/ --columns actor_id=src,target_id=dst --time-unit ms --out data
friendrec prepare --interactions log/ --users users.parquet --roles request=history,block=exclude --out data
"""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(PreparationConfig):
    """Options of `friendrec prepare`."""

    interactions: str
    """The log: a Parquet file, a directory of them (hive-partitioned or not), a URL, or what `friendrec simulate` made.
    Columns: actor_id and target_id (int64 or string), action (string), timestamp."""
    users: str | None = None
    """Parquet of users: user_id and categorical columns (string, integer or lists of them). A simulated log has one."""
    out: str
    """Directory of the prepared data set to make."""


def main(options: PrepareOptions) -> None:
    """Publish the prepared data set at `options.out`, unless it is there already."""
    from rich.console import Console

    from friendrec.pipeline.publish import is_finished, publish

    console = Console()
    inputs = {"interactions": options.interactions} | ({"users": options.users} if options.users else {})
    try:
        log, users = open_inputs(options)
        if is_finished(options.out, kind="data", options=options, inputs=inputs):
            console.print(f"{options.out} is up to date")
            return
        found: dict[str, object] = {}
        with publish(options.out, kind="data", options=options, inputs=inputs, extra=found) as attempt:
            with _progress_bar(console) as progress:
                summary = _prepare(log, users, options, attempt, progress)
            found.update(events=summary.cleaning.events, users=summary.users, cleaning=asdict(summary.cleaning))
    except Correctable as mistake:
        command = corrected_command(replace(options, **mistake.change))
        raise FriendrecError(f"{mistake}: run {command}") from mistake
    _print_summary(console, options.out, summary)


def corrected_command(options: PrepareOptions) -> str:
    """The command that has these options, defaults left out."""
    return shlex.join(["friendrec", "prepare", *option_words(options)])


def option_words(options: PrepareOptions, without: Container[str] = ()) -> list[str]:
    """The words of a command line that have these options, defaults left out."""
    words = []
    for field in sorted(fields(options), key=lambda field: field.name != "interactions"):
        value = getattr(options, field.name)
        if value != field.default and field.name not in without:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return words


def open_inputs(options: PrepareOptions) -> tuple["Log", "Users | None"]:
    """The log and the users, their columns and types checked; `Correctable` where other options would mend it."""
    from friendrec.datasets.profiles import open_users
    from friendrec.datasets.schema import open_log

    interactions, users = _simulated(options.interactions)
    users = options.users or users
    log = open_log(interactions, options.column_of, options.time_unit, options.single_action)
    return log, open_users(users, options.column_of, log.id_type) if users else None


def _simulated(path: str) -> tuple[str, str | None]:
    """The interactions and users of a published log; any other path is the interactions themselves."""
    import fsspec

    from friendrec.pipeline.publish import open_published

    filesystem, root = fsspec.core.url_to_fs(path)
    if not filesystem.isfile(f"{root}/manifest.json"):
        return path, None
    directory, _ = open_published(path, kind="log")
    users = directory / "users"
    return str(directory / "interactions"), str(users) if users.is_dir() else None


def _prepare(
    log: "Log", users: "Users | None", options: PrepareOptions, attempt: Path, progress: "Progress"
) -> "Summary":
    import duckdb

    from friendrec.datasets.engine import connect
    from friendrec.datasets.preparation import prepare

    tables = attempt / "tables"
    tables.mkdir()
    engine = connect(tables, options.memory_limit)
    try:
        return prepare(engine, log, users, options, attempt, progress)
    except duckdb.OutOfMemoryException as error:
        raise FriendrecError(
            f"--memory-limit {options.memory_limit} is too little for this log: pass more, or more --buckets"
        ) from error
    finally:
        engine.disconnect()
        shutil.rmtree(tables)


@contextmanager
def _progress_bar(console: "Console") -> Iterator["Progress"]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<20}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=1)
        yield lambda step, share: bar.update(task, description=step, completed=share)


def _print_summary(console: "Console", out: str, summary: "Summary") -> None:
    from rich.table import Table

    cleaning, splits = summary.cleaning, summary.splits
    table = Table("", "rows")
    table.columns[1].justify = "right"
    counts = {"in the log": cleaning.rows, "rejected": cleaning.rejected}
    counts |= {f"  {reason}": rows for reason, rows in cleaning.rejected_by_reason.items()}
    counts |= {"deselected actions": cleaning.deselected, "self-loops": cleaning.self_loops}
    counts |= {"exact duplicates": cleaning.duplicates, "exclusions": cleaning.exclusions}
    counts |= {"events": cleaning.events}
    test = cleaning.events - splits.num_train_events - splits.num_validation_events
    periods = {
        f"  train, until {_day(splits.train_until)}": splits.num_train_events,
        f"  validation, until {_day(splits.validation_until)}": splits.num_validation_events,
        "  test": test,
    }
    for name, rows in (counts | periods).items():
        table.add_row(name, f"{rows:,}")
    console.print(table)
    console.print(f"{out}: {summary.users:,} users, {splits.num_train_users:,} of them in train")
    roles = ", ".join(f"{action.name} ({action.role})" for action in summary.actions)
    console.print(f"actions: {roles}")
    if summary.ignored_columns:
        ignored = ", ".join(summary.ignored_columns)
        console.print(f"users columns left out, not categorical: {ignored}")


def _day(micros: int) -> str:
    return f"{datetime.fromtimestamp(micros / 1e6, UTC):%Y-%m-%d %H:%M}"
