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
from friendrec.datasets.preparation_config import Correctable, PreparationConfig
from friendrec.datasets.prepared import OUT, Action
from friendrec.datasets.profiles import Users, write_profiles
from friendrec.datasets.schema import LOG_COLUMNS, Log
from friendrec.errors import FriendrecError

BUCKET_EVENTS = 5_000_000
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
    counts = cleaning.count_rows(judged)
    progress("cleaning", 0)
    actions, counted = _check_counts(counts, config)
    _write(engine, judged.filter(_.reason.notnull()).order_by(*LOG_COLUMNS, "reason"), _rejected(log), out / "rejected")
    kept = [action for action in actions if action.role != "exclude"]
    clean = engine.create_table("clean", cleaning.clean(judged, actions))
    events = clean.filter(_.action < len(kept))
    num_events, num_exclusions = _count(events), _count(clean) - _count(events)
    if not num_events:
        raise FriendrecError(f"no event is left of {counted.rows} rows after cleaning: {_told(counted)}")

    progress("vocabulary and order", 0)
    vocabulary = engine.create_table("vocabulary", layout.vocabulary(events))
    numbered = layout.number(events, "event", layout.TOTAL_ORDER)
    events = engine.create_table("events", layout.with_rows(numbered, vocabulary))
    splits = _split(events, vocabulary, num_events, config)
    exclusions = layout.with_rows(clean.filter(_.action >= len(kept)), vocabulary)
    known_exclusions = _write(engine, exclusions.order_by("timestamp", "actor", "target"), EXCLUSIONS, out / "exclusions")
    _write(engine, vocabulary.order_by("row"), _vocabulary(log), out / "vocabulary")

    entries = layout.entries(events)
    _write_sequences(engine, entries, num_events, config, out, progress)
    num_users = _count(vocabulary)
    batches = _batches(engine, entries.order_by("user", "event"), 2 * num_events, progress)
    write_arrays(batches, num_users, num_events, out / "arrays")
    if users is not None:
        write_profiles(engine, users, vocabulary, splits.num_train_users, out)
    train = entries.filter(_.timestamp < splits.train_until)
    _write_statistics(engine, train, out / "statistics")
    result = Cleaning(
        rows=counted.rows,
        rejected=sum(counted.rejected.values()),
        rejected_by_reason=counted.rejected,
        deselected=counted.deselected,
        self_loops=counted.self_loops,
        duplicates=counted.accepted - num_events - num_exclusions,
        exclusions=num_exclusions,
        exclusions_of_unknown_users=num_exclusions - known_exclusions,
        events=num_events,
    )
    _write_json(out / "statistics/cleaning.json", asdict(result))
    _write_json(out / "actions.json", [asdict(action) for action in kept])
    _write_json(out / "splits.json", asdict(splits))
    return Summary(result, splits, num_users, tuple(actions), users.ignored if users else ())


def _load(engine: Backend, log: Log, progress: Progress) -> Table:
    engine.create_table("log", schema=Schema.from_pyarrow(log.schema))
    done = 0
    for table in log.read():
        engine.insert("log", table)
        done += len(table)
        progress("reading", done / log.num_rows)
    latest = time.time_ns() // 1000 + CLOCK_SKEW
    return cleaning.judge(engine.table("log"), latest)


def _check_counts(counts: pa.Table, config: PreparationConfig) -> tuple[tuple[Action, ...], cleaning.Counts]:
    found = sorted({row["action"] for row in counts.to_pylist() if row["reason"] is None})
    actions = cleaning.choose_actions(found, config.selected, config.role_of) if found else ()
    counted = cleaning.sum_up(counts, actions)
    rejected = sum(counted.rejected.values())
    if rejected > config.max_reject * counted.rows:
        reasons = ", ".join(f"{reason}: {rows}" for reason, rows in sorted(counted.rejected.items()))
        share = -(-rejected * 10_000 // counted.rows) / 10_000
        raise Correctable(
            f"{rejected} of {counted.rows} rows are malformed ({reasons}); mend the log or allow them", max_reject=share
        )
    return actions, counted


def _told(counts: cleaning.Counts) -> str:
    kinds = {"rejected": sum(counts.rejected.values()), "of other actions": counts.deselected}
    kinds |= {"self-loops": counts.self_loops, "exclusions or duplicates of them": counts.accepted}
    return ", ".join(f"{rows} {kind}" for kind, rows in kinds.items() if rows)


def _split(events: Table, vocabulary: Table, num_events: int, config: PreparationConfig) -> Splits:
    bounds = [int(share * num_events) for share in config.boundaries]
    end = events.timestamp.max().to_pyarrow().as_py() + 1
    times = dict(_rows(events.filter(_.event.isin(bounds)).select("event", "timestamp")))
    train_until, validation_until = (times.get(bound, end) for bound in bounds)
    num_train = _count(events.filter(_.timestamp < train_until))
    if not num_train:
        raise FriendrecError(
            f"no event is before the end of train, since the first {bounds[0] + 1} of {num_events} share one timestamp: "
            f"prepare more events or another --splits"
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
        _write(engine, part, SEQUENCES, out / f"sequences/bucket={bucket}", CHUNK_GROUP)


def _batches(engine: Backend, entries: Table, total: int, progress: Progress) -> Iterator[pa.RecordBatch]:
    done = 0
    for table in stream(engine, entries, ENTRIES, BATCH):
        progress("arrays", done / total)
        done += len(table)
        yield from table.to_batches()


def _write_statistics(engine: Backend, train: Table, out: Path) -> None:
    events = train.filter(_.direction == OUT)
    _write(engine, layout.user_statistics(train), USERS, out / "users")
    _write(engine, layout.action_statistics(events), ACTIONS, out / "actions")
    _write(engine, layout.day_statistics(events), DAYS, out / "days")


def _write(engine: Backend, table: Table, schema: pa.Schema, directory: Path, rows: int = ROW_GROUP) -> int:
    """Write an ordered expression's columns of `schema`; the number of rows."""
    ordered = table.select(*schema.names)
    return write_parquet(stream(engine, ordered, schema, rows), schema, directory / "part-0.parquet")


def _write_json(path: Path, value: Mapping[str, object] | list[dict[str, object]]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _count(table: Table) -> int:
    return int(table.count().to_pyarrow().as_py())


def _rows(table: Table) -> list[tuple[int, ...]]:
    return [tuple(row.values()) for row in table.to_pyarrow().to_pylist()]


def _rejected(log: Log) -> pa.Schema:
    return log.schema.append(pa.field("reason", pa.string()))


def _vocabulary(log: Log) -> pa.Schema:
    return pa.schema([("row", pa.int64()), ("user_id", log.id_type), ("first_timestamp", pa.int64())])


ENTRIES = pa.schema(
    {
        "user": pa.int32(),
        "event": pa.int64(),
        "partner": pa.int32(),
        "action": pa.int16(),
        "direction": pa.int8(),
        "timestamp": pa.int64(),
    }
)
SEQUENCES = pa.schema(
    {
        "user": pa.int64(),
        "chunk": pa.int32(),
        "context": pa.int32(),
        "partner": pa.list_(pa.int32()),
        "action": pa.list_(pa.int16()),
        "direction": pa.list_(pa.int8()),
        "timestamp": pa.list_(pa.int64()),
    }
)
EXCLUSIONS = pa.schema({"actor": pa.int64(), "target": pa.int64(), "timestamp": pa.int64()})
USERS = pa.schema({"row": pa.int64(), "sent": pa.int64(), "received": pa.int64()})
ACTIONS = pa.schema({"action": pa.int16(), "events": pa.int64()})
DAYS = pa.schema({"day": pa.date32(), "events": pa.int64()})
