"""Prepared data sets made in memory from a few events: the obvious twin of `friendrec prepare`, for tests."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from friendrec.datasets.arrays import write_arrays
from friendrec.datasets.prepared import IN, OUT, Action, PreparedData, load_prepared


def prepared_from_events(
    actor: ArrayLike,
    target: ArrayLike,
    action: ArrayLike | None,
    timestamp: ArrayLike,
    *,
    roles: Mapping[str, str] | None = None,
    splits: tuple[int, int] = (80, 90),
    context_length: int = 50,
    chunk_length: int = 256,
    path: Path | None = None,
) -> PreparedData:
    """Clean, order and split a log as design says; `splits` are the percentages at which train and validation end.

    `action` holds names (None: all "message"), `timestamp` µs. With a `path` the directory is written, derived arrays
    and vocabulary included, and opened again as `evaluate` would open it.
    """
    actor, target, timestamp = np.asarray(actor), np.asarray(target), np.asarray(timestamp, np.int64)
    action = np.full(len(actor), "message") if action is None else np.asarray(action)
    actor, target, action, timestamp, blocks = _clean(actor, target, action, timestamp, dict(roles or {}))
    user_ids, first, actor_row, target_row = _vocabulary(actor, target, timestamp)
    names = np.unique(action)
    train_until, validation_until = (int(timestamp[len(timestamp) * percent // 100]) for percent in splits)
    num_train = int(np.searchsorted(timestamp, train_until))
    meta = {
        "train_until": train_until,
        "validation_until": validation_until,
        "num_train_events": num_train,
        "num_validation_events": int(np.searchsorted(timestamp, validation_until)) - num_train,
        "num_train_users": int((first < train_until).sum()),
        "context_length": context_length,
        "chunk_length": chunk_length,
    }
    actions = tuple(Action(str(name), (roles or {}).get(str(name), "target")) for name in names)
    codes = np.searchsorted(names, action)
    columns, offsets = _sequences(actor_row, target_row, codes, timestamp, len(user_ids))
    if path is not None:
        _write(path, columns, offsets, user_ids, first, actions, meta, blocks)
        return load_prepared(path)
    out = np.flatnonzero(columns["direction"] == OUT)
    event_entry = out[np.argsort(columns["event"][out])]
    arrays = {name: columns[name] for name in ("partner", "action", "direction", "timestamp")}
    data = PreparedData(
        path=Path("in-memory"), actions=actions, offsets=offsets, event_entry=event_entry, **arrays, **meta
    )
    data.__dict__["user_ids"] = user_ids  # what the cached property would read
    return data


def prepared_from_parquet(file: Path, actions: tuple[str, ...] | None = None, path: Path | None = None) -> PreparedData:
    """The same from an interaction log's file, keeping only `actions`."""
    table = pq.read_table(file)
    columns = {name: table[name] for name in ("actor_id", "target_id")}
    action = np.asarray(table["action"].cast(pa.string()).to_pylist())
    timestamp = table["timestamp"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
    keep = np.ones(len(action), bool) if actions is None else np.isin(action, actions)
    actor, target = (columns[name].to_numpy()[keep] for name in ("actor_id", "target_id"))
    return prepared_from_events(actor, target, action[keep], timestamp[keep], path=path)


def _clean(actor, target, action, timestamp, roles):  # type: ignore[no-untyped-def]
    keep = actor != target
    actor, target, action, timestamp = actor[keep], target[keep], action[keep], timestamp[keep]
    order = np.lexsort((action, target, actor, timestamp))
    actor, target, action, timestamp = actor[order], target[order], action[order], timestamp[order]
    fresh = np.ones(len(actor), bool)
    same = [column[1:] == column[:-1] for column in (actor, target, action, timestamp)]
    fresh[1:] = ~np.logical_and.reduce(same)
    block = np.isin(action, [name for name, role in roles.items() if role == "exclude"])
    blocks = list(zip(*(column[fresh & block].tolist() for column in (actor, target, timestamp)), strict=True))
    keep = fresh & ~block
    return actor[keep], target[keep], action[keep], timestamp[keep], blocks


def _vocabulary(actor, target, timestamp):  # type: ignore[no-untyped-def]
    """Raw ids in order of (first timestamp, raw id), their first timestamps, and both columns as dense rows."""
    ids, inverse = np.unique(np.concatenate([actor, target]), return_inverse=True)
    first = np.full(len(ids), np.iinfo(np.int64).max)
    np.minimum.at(first, inverse, np.concatenate([timestamp, timestamp]))
    order = np.lexsort((ids, first))
    row = np.empty(len(ids), np.int64)
    row[order] = np.arange(len(ids))
    return ids[order], first[order], row[inverse[: len(actor)]], row[inverse[len(actor) :]]


def _sequences(actor, target, action, timestamp, num_users):  # type: ignore[no-untyped-def]
    event = np.arange(len(actor))
    user = np.concatenate([actor, target])
    order = np.lexsort((np.concatenate([event, event]), user))
    columns = {
        "user": user,
        "event": np.concatenate([event, event]),
        "partner": np.concatenate([target, actor]).astype(np.int32),
        "action": np.concatenate([action, action]).astype(np.int16),
        "direction": np.repeat(np.array([OUT, IN], np.int8), len(actor)),
        "timestamp": np.concatenate([timestamp, timestamp]),
    }
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=num_users))])
    return {name: column[order] for name, column in columns.items()}, offsets


def _write(path, columns, offsets, user_ids, first, actions, meta, blocks):  # type: ignore[no-untyped-def]
    batch = pa.RecordBatch.from_pydict({name: pa.array(column) for name, column in columns.items()})
    write_arrays([batch], len(user_ids), len(columns["user"]) // 2, path / "arrays")
    (path / "splits.json").write_text(json.dumps(meta))
    (path / "actions.json").write_text(json.dumps([{"name": a.name, "role": a.role} for a in actions]))
    vocabulary = {"row": np.arange(len(user_ids)), "user_id": user_ids, "first_timestamp": first}
    row_of = {user: row for row, user in enumerate(user_ids.tolist())}
    blocks = [block for block in blocks if {block[0], block[1]} <= row_of.keys()]
    exclusions = {
        "actor": np.array([row_of[b[0]] for b in blocks], np.int64),
        "target": np.array([row_of[b[1]] for b in blocks], np.int64),
        "timestamp": np.array([b[2] for b in blocks], np.int64),
    }
    for folder, table in (("vocabulary", vocabulary), ("exclusions", exclusions)):
        (path / folder).mkdir(parents=True)
        pq.write_table(pa.table(table), path / folder / "part-0.parquet")
