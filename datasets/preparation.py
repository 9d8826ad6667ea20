"""The preparation program: from a checked log to the files of a prepared data set.

log ─ judge ─► rejected/           clean ─► events (numbered in total order) ─► both sides ─► sequences/, arrays/
       └─ counted by kind ─► statistics/cleaning.json   └─► vocabulary/, splits.json, exclusions/, statistics/
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
from ibis import Schema, _
from ibis.backends.duckdb import Backend
from ibis.expr.types import Table

from friendrec.datasets import cleaning, layout
from friendrec.datasets.arrays import write_arrays
from friendrec.datasets.cleaning import Cleaning
from friendrec.datasets.engine import stream, write_parquet
from friendrec.datasets.preparation_config import PreparationConfig
from friendrec.datasets.prepared import OUT, Action
from friendrec.datasets.profiles import Users, write_profiles
from friendrec.datasets.schema import LOG_COLUMNS, Log
from friendrec.errors import FriendrecError

BUCKET_EVENTS = 1_000_000
ROW_GROUP, CHUNK_GROUP, BATCH = 1 << 20, 1 << 13, 1 << 20
"""Rows of a Parquet row group, of one of sequences, and of a batch of entries."""
CLOCK_SKEW = layout.DAY
Progress = Callable[[str, float], None]
"""Told the step that runs and the share of it that is done."""


@dataclass(frozen=True)
class Splits:
    """What splits.json holds; times in microseconds. Train is before `train_until`, test from `validation_until`."""

    train_until: int
    validation_until: int
    num_train_events: int
    num_validation_events: int
    num_train_users: int
    context_length: int
    chunk_length: int


@dataclass(frozen=True)
class Summary:
    """What preparation found, for the closing table and the manifest."""

    cleaning: Cleaning
    splits: Splits
    users: int
    actions: tuple[Action, ...]
    ignored_columns: tuple[str, ...]


def prepare(
    engine: Backend, log: Log, users: Users | None, config: PreparationConfig, out: Path, progress: Progress
) -> Summary:
    """Write a prepared data set to the directory `out`."""
    judged = _load(engine, log, progress)
    progress("cleaning", 0)
    actions, counts = cleaning.decide(judged, config)
    kept = [action for action in actions if action.role != "exclude"]
    clean = engine.create_table("clean", cleaning.clean(judged, actions))
    clean_events, excluded = clean.filter(_.action < len(kept)), clean.filter(_.action >= len(kept))
    num_events = _count(clean_events)
    if not num_events:
        raise cleaning.nothing_left(counts)

    progress("order", 0)
    vocabulary = engine.create_table("vocabulary", layout.vocabulary(clean_events))
    numbered = layout.number(clean_events, "event", layout.TOTAL_ORDER)
    events = engine.create_table("events", layout.with_rows(numbered, vocabulary))
    splits = _split(events, vocabulary, num_events, config)
    exclusions = layout.with_rows(excluded, vocabulary).order_by("timestamp", "actor", "target")
    rejected = judged.filter(_.reason.notnull()).order_by(*LOG_COLUMNS, "reason")
    _write(engine, vocabulary.order_by("row"), layout.vocabulary_schema(log.id_type), out / "vocabulary")
    _write(engine, rejected, log.schema.append(pa.field("reason", pa.string())), out / "rejected")
    known_exclusions = _write(engine, exclusions, layout.EXCLUSIONS, out / "exclusions")

    entries = layout.entries(events)
    num_users = _count(vocabulary)
    _write_sequences(engine, entries, num_events, config, out / "sequences", progress)
    batches = _batches(engine, entries.order_by("user", "event"), 2 * num_events, progress)
    write_arrays(batches, num_users, num_events, out / "arrays")
    if users is not None:
        write_profiles(engine, users, vocabulary, splits.num_train_users, out)
    _write_statistics(engine, entries.filter(_.timestamp < splits.train_until), out / "statistics")
    cleaned = counts.cleaning(num_events, _count(excluded), known_exclusions)
    _write_json(out / "statistics" / "cleaning.json", asdict(cleaned))
    _write_json(out / "actions.json", [asdict(action) for action in kept])
    _write_json(out / "splits.json", asdict(splits))
    return Summary(cleaned, splits, num_users, actions, users.ignored if users else ())


def _load(engine: Backend, log: Log, progress: Progress) -> Table:
    engine.create_table("log", schema=Schema.from_pyarrow(log.schema))
    done = 0
    for table in log.read():
        engine.insert("log", table)
        done += len(table)
        progress("reading", done / log.num_rows)
    latest = time.time_ns() // 1000 + CLOCK_SKEW
    return cleaning.judge(engine.table("log"), latest)


def _split(events: Table, vocabulary: Table, num_events: int, config: PreparationConfig) -> Splits:
    bounds = [int(share * num_events) for share in config.boundaries]
    end = events.timestamp.max().to_pyarrow().as_py() + 1
    found = events.filter(_.event.isin(bounds)).select("event", "timestamp").to_pyarrow()
    times = dict(zip(found["event"].to_pylist(), found["timestamp"].to_pylist(), strict=True))
    train_until, validation_until = (times.get(bound, end) for bound in bounds)
    num_train = _count(events.filter(_.timestamp < train_until))
    if not num_train:
        raise FriendrecError(
            f"the train period is empty: the first {bounds[0] + 1} of {num_events} events share one timestamp; "
            f"prepare more events or pass other --splits"
        )
    return Splits(
        train_until=train_until,
        validation_until=validation_until,
        num_train_events=num_train,
        num_validation_events=_count(events.filter(_.timestamp < validation_until)) - num_train,
        num_train_users=_count(vocabulary.filter(_.first_timestamp < train_until)),
        context_length=config.context_length,
        chunk_length=config.chunk_length,
    )


def _write_sequences(
    engine: Backend, entries: Table, num_events: int, config: PreparationConfig, out: Path, progress: Progress
) -> None:
    buckets = config.buckets or -(-num_events // BUCKET_EVENTS)
    for bucket in range(buckets):
        progress("sequences", bucket / buckets)
        part = layout.sequences(entries.filter(_.user % buckets == bucket), config.chunk_length, config.context_length)
        _write(engine, part, layout.SEQUENCES, out / f"bucket={bucket}", CHUNK_GROUP)


def _batches(engine: Backend, entries: Table, total: int, progress: Progress) -> Iterator[pa.RecordBatch]:
    done = 0
    for table in stream(engine, entries, layout.ENTRIES, BATCH):
        progress("arrays", done / total)
        done += len(table)
        yield from table.to_batches()


def _write_statistics(engine: Backend, train: Table, out: Path) -> None:
    events = train.filter(_.direction == OUT)
    _write(engine, layout.user_statistics(train), layout.USERS, out / "users")
    _write(engine, layout.action_statistics(events), layout.ACTIONS, out / "actions")
    _write(engine, layout.day_statistics(events), layout.DAYS, out / "days")


def _write(engine: Backend, table: Table, schema: pa.Schema, directory: Path, rows: int = ROW_GROUP) -> int:
    """Write an ordered expression's columns of `schema`; the number of rows."""
    ordered = table.select(*schema.names)
    return write_parquet(stream(engine, ordered, schema, rows), schema, directory / "part-0.parquet")


def _write_json(path: Path, value: Mapping[str, object] | list[dict[str, object]]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _count(table: Table) -> int:
    return int(table.count().to_pyarrow().as_py())
