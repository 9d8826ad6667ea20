"""Lays user-major sequences out as flat memory-mapped arrays, with the running state of every pair beside them."""

from collections.abc import Iterable
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
from numpy.lib.format import open_memmap

from friendrec.datasets.prepared import OUT

NEVER = np.iinfo(np.int64).min
SECONDS = 1e-6
DECAYS = (86_400.0, 30 * 86_400.0)
"""Decay times of the pair counters, in seconds."""

COLUMNS = {"partner": np.int32, "action": np.int16, "direction": np.int8, "timestamp": np.int64}
PAIR_ARRAYS = {
    "next_same": (np.int64, ()),  # the user's next entry with the same partner, or the number of entries
    "received": (np.int32, ()),  # IN entries of the user up to this one
    "pair_count": (np.int32, (4,)),  # with this partner, up to this entry: out, in, run of out, run of in
    "pair_time": (np.int64, (4,)),  # last out, last in, first out, first in, or NEVER
    "pair_decay": (np.float32, (4,)),  # decayed counts at this entry: out by DECAYS, in by DECAYS
}


def write_arrays(batches: Iterable[pa.RecordBatch], num_users: int, num_events: int, path: Path) -> None:
    """Write `path/*.npy` from entries in (user, event) order; there is at least one event.

    Columns of a batch: user, event (index in the total order), partner, action, direction, timestamp (µs).
    """
    path.mkdir(parents=True, exist_ok=True)
    entries = 2 * num_events
    columns = {name: _create(path, name, dtype, (entries,)) for name, dtype in COLUMNS.items()}
    event_entry = _create(path, "event_entry", np.int64, (num_events,))
    counts = np.zeros(num_users, np.int64)
    written = 0
    for batch in batches:
        rows = slice(written, written + batch.num_rows)
        for name, array in columns.items():
            array[rows] = batch.column(name).to_numpy()
        counts += np.bincount(batch.column("user").to_numpy(), minlength=num_users)
        out = columns["direction"][rows] == OUT
        event_entry[batch.column("event").to_numpy()[out]] = written + np.flatnonzero(out)
        written += batch.num_rows
    if written != entries:
        raise ValueError(f"{written} entries for {num_events} events: each event must come once out and once in")
    offsets = _create(path, "offsets", np.int64, (num_users + 1,))
    offsets[1:] = np.cumsum(counts)
    pairs = {name: _create(path, name, dtype, (entries, *shape)) for name, (dtype, shape) in PAIR_ARRAYS.items()}
    link_pairs(offsets, columns["partner"], columns["direction"], columns["timestamp"], **pairs)


def _create(path: Path, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    return open_memmap(path / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)


@numba.njit(cache=True)
def link_pairs(offsets, partner, direction, timestamp, next_same, received, pair_count, pair_time, pair_decay):  # type: ignore[no-untyped-def]
    """Fill the PAIR_ARRAYS in one pass: every entry continues the state of the pair's entry before it, O(1) each."""
    num_users = len(offsets) - 1
    latest = np.full(num_users, -1, np.int64)  # the user's latest entry with each partner
    for user in range(num_users):
        inbound = 0
        for i in range(offsets[user], offsets[user + 1]):
            previous = latest[partner[i]]
            latest[partner[i]] = i
            side = direction[i]
            inbound += side
            received[i] = inbound
            next_same[i] = len(partner)
            if previous >= 0:
                next_same[previous] = i
                pair_count[i] = pair_count[previous]
                pair_time[i] = pair_time[previous]
                gap = (timestamp[i] - timestamp[previous]) * SECONDS
                for d in range(2):
                    decay = np.exp(-gap / DECAYS[d])
                    pair_decay[i, d] = pair_decay[previous, d] * decay
                    pair_decay[i, 2 + d] = pair_decay[previous, 2 + d] * decay
            else:
                pair_count[i] = 0
                pair_time[i] = NEVER
                pair_decay[i] = 0
            pair_count[i, side] += 1
            pair_count[i, 2 + side] += 1
            pair_count[i, 3 - side] = 0
            pair_time[i, side] = timestamp[i]
            if pair_time[i, 2 + side] == NEVER:
                pair_time[i, 2 + side] = timestamp[i]
            for d in range(2):
                pair_decay[i, 2 * side + d] += 1
        for i in range(offsets[user], offsets[user + 1]):
            latest[partner[i]] = -1
