"""Packed contexts, read back, against the events strictly before each query; nothing later can be seen."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from friendrec.datasets.batch import Context
from friendrec.datasets.config import ContextConfig
from friendrec.datasets.packing import Packer, Tables, assign_slots, bounds, ranges, runs
from friendrec.datasets.prepared import PreparedData
from tests.datasets.decode import Seen, contacts_of, decode, pack, queries, rows_of
from tests.datasets.twin import HOUR, Twin, logs, prepared, random_log
from tests.synthetic import prepared_from_events

lengths = st.integers(1, 7)


@given(log=logs, length=lengths, limit=st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_a_query_sees_its_last_entries_strictly_before(log: list, length: int, limit: int) -> None:
    with prepared(log) as (data, twin):
        users, times = grid(data)
        config = ContextConfig(context_length=length, contacts=limit)
        for seen, user, time in zip(
            decode(pack(Packer(data, config), queries(users, times, groups=users))), users, times, strict=True
        ):
            check(seen, twin, data, int(user), int(time), config)


def check(seen: Seen, twin: Twin, data: PreparedData, user: int, time: int, config: ContextConfig) -> None:
    entries = twin.entries(user, time)
    gaps = [0.0, *(0.1 * math.log1p((b[3] - a[3]) / 1e6) for a, b in pairwise(entries))]
    window = slice(-config.context_length, None)
    code = {action.name: place for place, action in enumerate(data.actions)}
    assert seen.actor == oov(data, user)
    assert seen.partners == [oov(data, entry[0]) for entry in entries[window]]
    assert seen.kinds == [2 * code[entry[1]] + entry[2] for entry in entries[window]]
    assert seen.times == [entry[3] for entry in entries[window]]
    np.testing.assert_allclose(seen.gaps, gaps[: len(entries)][window], rtol=1e-6)
    assert seen.contacts == [oov(data, partner) for partner in twin.contacts(user, time, config.contacts)]
    since = (time - entries[-1][3]) / 1e6 if entries else 1e9
    np.testing.assert_allclose(seen.clock, [0.1 * math.log1p(since), math.log1p(len(entries)) / 4], rtol=1e-6)


def oov(data: PreparedData, user: int) -> int:
    return min(user, data.num_train_users)


def grid(data: PreparedData) -> tuple[np.ndarray, np.ndarray]:
    """Every user at ascending times, users together."""
    users, times = np.meshgrid(np.arange(data.num_users), np.arange(0, 15, 2) * HOUR, indexing="ij")
    return users.ravel(), times.ravel()


@given(log=logs, length=lengths)
@settings(max_examples=15, deadline=None)
def test_a_grouped_query_sees_what_it_sees_alone(log: list, length: int) -> None:
    with prepared(log) as (data, _):
        packer = Packer(data, ContextConfig(context_length=length, contacts=3))
        users, times = grid(data)
        by_chunk = users * 100 + np.searchsorted(np.array([4, 8]) * HOUR, times)
        alone = [decode(pack(packer, queries(users[[q]], times[[q]])))[0] for q in range(len(users))]
        for groups in (users, by_chunk, None):
            assert decode(pack(packer, queries(users, times, groups=groups))) == alone


@given(log=logs, length=lengths)
@settings(max_examples=30, deadline=None)
def test_a_window_spans_at_most_two_blocks_and_positions_are_unique(log: list, length: int) -> None:
    with prepared(log) as (data, _):
        users, times = grid(data)
        context = pack(Packer(data, ContextConfig(context_length=length)), queries(users, times, groups=users))
        check_layout(context, length)


@given(log=logs, length=lengths)
@settings(max_examples=30, deadline=None)
def test_sequences_are_numbered_in_packing_order_and_a_window_lies_in_its_groups(log: list, length: int) -> None:
    with prepared(log) as (data, _):
        users, times = grid(data)
        groups = users * 100 + np.searchsorted(np.array([4, 8]) * HOUR, times)
        context = pack(Packer(data, ContextConfig(context_length=length)), queries(users, times, groups=groups))
        event_at = {position: event for event, position in enumerate(context.event_position.tolist())}
        found: dict[int, set[int]] = {}
        for begin, end, group in zip(
            context.window_begin.tolist(), context.window_end.tolist(), runs(groups).tolist(), strict=True
        ):
            sequences = {int(context.event_sequence[event_at[position]]) for position in range(begin, end)}
            found.setdefault(group, set()).update(sequences)
        assert all(sequences <= {group} for group, sequences in found.items())
        assert (context.event_sequence.diff() >= 0).all()


def check_layout(context: Context, length: int) -> None:
    position, begin, end = (t.numpy() for t in (context.event_position, context.window_begin, context.window_end))
    assert len(np.unique(position)) == len(position)
    assert (position < context.num_blocks * length).all()
    assert (end - begin <= length).all()
    some = end > begin
    first, last = begin[some] // length, (end[some] - 1) // length
    assert (last - first <= 1).all()
    # What the running sums rely on: a window begins a block or crosses into the next, whose prefix is all its own.
    assert ((begin[some] % length == 0) | (last == first + 1)).all()
    assert np.isin(begin[some], position).all()
    assert np.isin(end[some] - 1, position).all()


# Nothing at or after t.


@given(seed=st.integers(0, 10_000), length=st.integers(0, 20), time=st.integers(2, 12), data=st.data())
@settings(max_examples=40, deadline=None)
def test_events_at_or_after_a_time_change_nothing_in_its_context(
    seed: int, length: int, time: int, data: st.DataObject
) -> None:
    """Whatever comes at or after t, for every user seen before t."""
    past = [(0, 1, "a", 0), (2, 1, "b", 0), *random_log(seed, 6, length, time)]
    futures = [
        data.draw(
            st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.sampled_from("ab"), st.integers(time, 14)))
        )
        for _ in range(2)
    ]
    seen = [context_at(past + future, time) for future in futures]
    assert seen[0] == seen[1]


def context_at(log: list, time: int) -> list[Seen]:
    with prepared(log) as (data, twin):
        known = len({user for a, b, _, t in twin.events if t < time * HOUR for user in (a, b)})
        data = dataclasses.replace(data, num_train_users=known)  # the split moves with the future; the past does not
        users = np.arange(known)
        times = np.full(known, time * HOUR)
        return decode(pack(Packer(data, ContextConfig(context_length=9, contacts=4)), queries(users, times)))


# Slots and ids.


def test_slots_read_the_right_rows_and_users_after_training_the_last_one() -> None:
    log = [*random_log(3, 5, 60, 40), (8, 0, "a", 50), (0, 9, "a", 51)]
    with prepared(log) as (data, _):
        packer = Packer(data, ContextConfig(context_length=4, contacts=2))
        assert data.num_train_users < data.num_users == 7
        users = np.arange(data.num_users)
        asked = queries(users, np.full(7, 60 * HOUR), actors=np.where(users == 2, packer.unknown, users))
        candidates = np.array([[6, 1], [packer.unknown, 3]])
        context, (slots,) = packer.pack(asked, contacts_of(packer, asked), [candidates])
        assert rows_of(context, context.actor).tolist() == [0, 1, data.num_train_users, 3, 4, 5, 5]
        assert rows_of(context, slots).tolist() == [[5, 1], [5, 3]]
        assert slots.shape == candidates.shape
        assert len(set(slots.flatten().tolist())) == 4  # two of them read one row, each from a slot of its own
        assert context.ids["user"].lengths().tolist() == [1] * 8
        others = set(context.event_user.tolist()) | set(context.actor.tolist())
        named = set(slots.flatten().tolist()) | set(context.contact_user.tolist())
        assert named == set(range(context.num_candidates))
        assert others | named == set(range(8))
        assert context.ids["event"].values().tolist() == list(range(4))
        assert context.ids["condition"].values().tolist() == list(range(3))
        assert Tables.of(data).rows == {"user": data.num_train_users + 1, "event": 4, "condition": 3}


def test_there_are_as_many_bags_as_the_small_tables_need() -> None:
    with prepared([(0, 1, "a", 0), (1, 0, "b", 1)]) as (data, _):
        packer = Packer(data, ContextConfig())
        ids = packer.ids(np.array([1]))
        assert ids.stride() == 4
        assert ids["user"].lengths().tolist() == [1, 0, 0, 0]
        assert ids["event"].lengths().tolist() == [1, 1, 1, 1]
        assert ids["condition"].lengths().tolist() == [1, 1, 1, 0]


def test_no_queries_make_an_empty_context() -> None:
    with prepared([(0, 1, "a", 0), (1, 2, "a", 3)]) as (data, _):
        nobody = np.empty(0, np.int64)
        packer = Packer(data, ContextConfig())
        asked = queries(nobody, nobody)
        context, (slots,) = packer.pack(asked, contacts_of(packer, asked), [np.array([2, 0, 2])])
        assert decode(context) == []
        assert context.num_blocks == 0
        assert rows_of(context, slots).tolist() == [min(2, data.num_train_users), 0, min(2, data.num_train_users)]


PROFILES = {"city": ([[1], [2], [], [2], [1]], 3), "tags": ([[1, 3], [], [2], [3, 2, 1], []], 4)}
"""Codes of each user and the number of codes, unknown included."""


@pytest.fixture
def with_profiles(tmp_path: Path) -> PreparedData:
    data = prepared_from_events([0, 1, 2, 3], [1, 2, 3, 4], None, np.arange(4) * HOUR, splits=(50, 75), path=tmp_path)
    (tmp_path / "profiles").mkdir()
    for name, (codes, size) in PROFILES.items():
        values = [f"value {code}" for code in range(1, size)]
        table = pa.table({"code": pa.array(range(1, size), pa.int32()), "value": values})
        pq.write_table(table, tmp_path / "profiles" / f"{name}.parquet")
        offsets = np.cumsum([0, *map(len, codes)])
        np.save(tmp_path / "arrays" / f"profile_{name}_offsets.npy", offsets)
        np.save(tmp_path / "arrays" / f"profile_{name}_values.npy", np.concatenate(codes).astype(np.int32))
    return data


def test_a_slot_reads_the_profile_of_its_user_even_after_training(with_profiles: PreparedData) -> None:
    packer = Packer(with_profiles, ContextConfig())
    assert with_profiles.num_train_users == 3
    assert packer.tables.rows["profile_city"] == 3
    assert packer.tables.rows["profile_tags"] == 4
    ids = packer.ids(np.array([4, packer.unknown, 3, 0, 1]))
    for name, (codes, _) in PROFILES.items():
        bags = [bag.tolist() for bag in ids[f"profile_{name}"].to_dense()]
        assert bags == [codes[4], [], codes[3], codes[0], codes[1]]


def test_tensors_move_together_and_can_be_prefetched() -> None:
    with prepared(random_log(0, 5, 30, 20)) as (data, _):
        context = pack(Packer(data, ContextConfig()), queries(np.array([0, 1]), np.full(2, 9 * HOUR)))
        moved = context.to(torch.device("meta"))
        assert moved.actor.is_meta
        assert moved.ids.values().is_meta
        assert moved.num_blocks == context.num_blocks
        assert not context.actor.is_meta


def test_ranges_runs_bounds_and_slots() -> None:
    assert ranges(np.array([7, 0, 3]), np.array([2, 0, 3])).tolist() == [7, 8, 3, 4, 5]
    assert runs(np.array([7, 7, 3, 7])).tolist() == [0, 0, 1, 2]
    assert runs(np.empty(0, np.int64)).tolist() == []
    for groups, first, last in (([7, 7, 3, 7], [0, 2, 3], [1, 2, 3]), ([4], [0], [0]), ([], [], [])):
        assert [bound.tolist() for bound in bounds(np.array(groups, np.int64))] == [first, last]
    distinct, slots = assign_slots(np.array([5, 2, 5, 0, 2]), 6)
    assert (distinct.tolist(), slots.tolist()) == ([5, 2, 0], [0, 1, 0, 2, 1])
