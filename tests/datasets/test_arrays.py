"""Prepared arrays against plain lists: sequences, places of events, the running state of every pair."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings

from friendrec.datasets.arrays import NEVER, write_arrays
from friendrec.datasets.prepared import OUT, PreparedData
from tests.datasets.twin import Twin, logs, pair_state, prepared


@given(log=logs)
@settings(max_examples=40, deadline=None)
def test_sequences_hold_both_sides_of_every_event_in_total_order(log: list) -> None:
    with prepared(log) as (data, twin):
        assert data.num_events == len(twin.events)
        for user in range(data.num_users):
            assert sequence(data, user) == twin.entries(user)
        for event, (actor, target, action, time) in enumerate(twin.events):
            entry = data.event_entry[event]
            assert data.offsets[actor] <= entry < data.offsets[actor + 1]
            assert data.direction[entry] == OUT
            assert (data.partner[entry], name(data, entry), data.timestamp[entry]) == (target, action, time)


@given(log=logs)
@settings(max_examples=40, deadline=None)
def test_every_entry_holds_the_state_of_its_pair_up_to_itself(log: list) -> None:
    with prepared(log) as (data, twin):
        for user in range(data.num_users):
            check_pairs(data, twin, user)


def check_pairs(data: PreparedData, twin: Twin, user: int) -> None:
    entries, start = twin.entries(user), int(data.offsets[user])
    for i, (partner, _, _, time) in enumerate(entries):
        state = pair_state(entries[: i + 1], partner, time)
        assert data.array("pair_count")[start + i].tolist() == state["counts"]
        times = [NEVER if t == -math.inf else t for t in state["last"] + state["first"]]
        assert data.array("pair_time")[start + i].tolist() == times
        np.testing.assert_allclose(data.array("pair_decay")[start + i], state["decays"], rtol=1e-5)
        assert data.array("received")[start + i] == sum(entry[2] for entry in entries[: i + 1])
        later = [j for j in range(i + 1, len(entries)) if entries[j][0] == partner]
        assert data.array("next_same")[start + i] == (start + later[0] if later else 2 * data.num_events)


def sequence(data: PreparedData, user: int) -> list:
    rows = range(data.offsets[user], data.offsets[user + 1])
    return [(data.partner[i], name(data, i), data.direction[i], data.timestamp[i]) for i in rows]


def name(data: PreparedData, entry: int) -> str:
    return data.actions[data.action[entry]].name


ENTRIES = {
    "user": [0, 0, 1, 1, 2, 2],
    "event": [0, 1, 0, 2, 1, 2],
    "partner": [1, 2, 0, 2, 0, 1],
    "action": [0, 0, 0, 1, 0, 1],
    "direction": [0, 1, 1, 0, 0, 1],
    "timestamp": [5, 6, 5, 7, 6, 7],
}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_arrays_are_the_same_however_the_entries_are_batched(tmp_path: Path, size: int) -> None:
    whole = pa.RecordBatch.from_pydict(ENTRIES)
    write_arrays([whole], 3, 3, tmp_path / "whole")
    write_arrays((whole.slice(start, size) for start in range(0, 6, size)), 3, 3, tmp_path / "parts")
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(files) == 11
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert np.load(tmp_path / "parts" / "event_entry.npy").tolist() == [0, 4, 3]
    assert np.load(tmp_path / "parts" / "offsets.npy").tolist() == [0, 2, 4, 6]


def test_a_missing_side_of_an_event_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="5 entries for 3 events"):
        write_arrays([pa.RecordBatch.from_pydict(ENTRIES).slice(0, 5)], 3, 3, tmp_path)
