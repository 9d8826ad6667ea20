"""From clean events to the prepared layout: total order, vocabulary, both directions, chunks, statistics.

Every function takes Ibis tables and returns one that DuckDB and Spark run alike: times are int64 microseconds, ordered
lists are collected as structs and sorted, and a whole table is numbered through its days, which are sorted apart.
"""

from collections.abc import Sequence

import ibis
import pyarrow as pa
from ibis import _
from ibis.expr.types import Table

from friendrec.datasets.prepared import IN, OUT

DAY = 86_400_000_000
"""Microseconds."""
TOTAL_ORDER = ("timestamp", "actor_id", "target_id", "action")

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


def vocabulary_schema(id_type: pa.DataType) -> pa.Schema:
    return pa.schema({"row": pa.int64(), "user_id": id_type, "first_timestamp": pa.int64()})


def number(table: Table, name: str, order: Sequence[str]) -> Table:
    """Add the place of each row (int64 from 0) in `order`, whose first column is a time.

    It is the number of rows of the days before, plus the place in the day: no sort is longer than a day.
    """
    table = table.mutate(day=(_[order[0]] // DAY).cast("int32"))
    days = table.group_by("day").agg(rows=_.count())
    days = days.select("day", before=_.rows.sum().over(ibis.cumulative_window(order_by="day")) - _.rows)
    place = ibis.row_number().over(ibis.window(group_by="day", order_by=list(order)))
    numbered = table.mutate(place=place).join(days, "day")
    return numbered.mutate(**{name: (_.before + _.place).cast("int64")}).drop("day", "before", "place")


def vocabulary(events: Table) -> Table:
    """row (int64), user_id, first_timestamp: every user of the events, in order of (first_timestamp, user_id)."""
    seen = ibis.union(
        events.select("timestamp", user_id=_.actor_id),
        events.select("timestamp", user_id=_.target_id),
    )
    users = seen.group_by("user_id").agg(first_timestamp=_.timestamp.min())
    return number(users, "row", ("first_timestamp", "user_id"))


def with_rows(events: Table, users: Table) -> Table:
    """Replace actor_id and target_id by the vocabulary rows actor and target; events of unknown users drop out."""
    rows = users.select("user_id", row=_.row.cast("int32"))
    actors, targets = rows.rename(actor_id="user_id", actor="row"), rows.rename(target_id="user_id", target="row")
    return events.join(actors, "actor_id").join(targets, "target_id").drop("actor_id", "target_id")


def entries(events: Table) -> Table:
    """Both sides of every event: user, event, partner, action, direction, timestamp."""
    out = events.select("event", "action", "timestamp", user=_.actor, partner=_.target, direction=_side(OUT))
    into = events.select("event", "action", "timestamp", user=_.target, partner=_.actor, direction=_side(IN))
    return ibis.union(out, into).select("user", "event", "partner", "action", "direction", "timestamp")


def sequences(entries: Table, chunk_length: int, context_length: int) -> Table:
    """Each user's entries in total order, cut in chunks that begin with up to context_length entries of those before:

    position  0 1 2 | 3 4 5 | 6      chunk_length 3, context_length 2
    chunk 0   0 1 2                  context 0
    chunk 1     1 2 | 3 4 5          context 2
    chunk 2             4 5 | 6      context 2
    """
    mine = ibis.window(group_by="user", order_by="event")
    placed = entries.mutate(
        position=ibis.row_number().over(mine), length=_.count().over(ibis.window(group_by="user"))
    ).mutate(
        first=_.position // chunk_length,
        last=ibis.least((_.position + context_length) // chunk_length, (_.length - 1) // chunk_length),
    )
    copies = placed.mutate(chunk=ibis.range(placed["first"], placed["last"] + 1).unnest())
    fields = ("position", "partner", "action", "direction", "timestamp")
    chunks = copies.group_by("user", "chunk").agg(
        start=_.position.min(), entry=ibis.struct({name: copies[name] for name in fields}).collect().sort()
    )
    lists = {name: chunks.entry.map(lambda entry, name=name: entry[name]) for name in fields[1:]}
    return chunks.select("user", "chunk", context=_.chunk * chunk_length - _.start, **lists).order_by("user", "chunk")


def user_statistics(train: Table) -> Table:
    """row, sent, received: events of each user among the entries given."""
    sides = {name: (_.direction == side).sum() for name, side in (("sent", OUT), ("received", IN))}
    return train.group_by(row=_.user).agg(**sides).order_by("row")


def action_statistics(train: Table) -> Table:
    """action (code), events."""
    return train.group_by("action").agg(events=_.count()).order_by("action")


def day_statistics(train: Table) -> Table:
    """day (since 1970), events."""
    return train.group_by(day=(_.timestamp // DAY).cast("int32")).agg(events=_.count()).order_by("day")


def _side(direction: int) -> ibis.expr.types.IntegerScalar:
    return ibis.literal(direction, "int8")
