"""Logs of every shape are read alike; one that cannot be read says why and shows what would mend it."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from friendrec.datasets.preparation_config import Correctable
from friendrec.datasets.schema import Log, microseconds, open_log
from friendrec.errors import FriendrecError

UTC = pa.timestamp("us", tz="UTC")
GOOD: dict[str, Any] = {
    "actor_id": [1, 2, 3],
    "target_id": [2, 3, 1],
    "action": ["like", "like", "message"],
    "timestamp": pa.array([10, 20, 30], UTC),
}
ROWS = [(1, 2, "like", 10), (2, 3, "like", 20), (3, 1, "message", 30)]


def write(path: Path, drop: str | None = None, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {name: column for name, column in (GOOD | columns).items() if name != drop}
    pq.write_table(pa.table(table), path)
    return str(path)


def read(log: Log) -> list[tuple[Any, ...]]:
    tables = list(log.read())
    assert {table.schema for table in tables} == {log.schema}
    return sorted(tuple(row.values()) for table in tables for row in table.to_pylist())


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"action": pa.array(["like", "like", "message"]).dictionary_encode()},
        {"action": pa.array(["like", "like", "message"], pa.large_string())},
        {"actor_id": pa.array([1, 2, 3], pa.int32()), "target_id": pa.array([2, 3, 1], pa.uint8())},
        {"timestamp": pa.array([10, 20, 30], pa.timestamp("us"))},
        {"timestamp": pa.array([10, 20, 30], pa.timestamp("us", tz="Asia/Tokyo"))},
        {"timestamp": pa.array([10_000, 20_999, 30_001], pa.timestamp("ns", tz="UTC"))},
        {"weight": [0.5, None, 1.0]},
    ],
)
def test_column_types_that_mean_the_same(tmp_path: Path, columns: dict[str, Any]) -> None:
    assert read(open_log(write(tmp_path / "log.parquet", **columns), {}, None)) == ROWS


def test_string_ids_stay_strings(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.parquet", actor_id=["1", "02", "é"], target_id=pa.array(["2", "3", "1"], pa.large_string())
    )
    log = open_log(path, {}, None)
    assert (log.id_type, [row[:2] for row in read(log)]) == (pa.string(), [("02", "3"), ("1", "2"), ("é", "1")])


def test_other_column_names(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table(GOOD).rename_columns(["src", "dst", "kind", "t"]), path)
    names = {"actor_id": "src", "target_id": "dst", "action": "kind", "timestamp": "t"}
    assert read(open_log(str(path), names, None)) == ROWS


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("kind", [pa.int64(), pa.timestamp])
def test_units(tmp_path: Path, unit: str, kind: Any) -> None:
    ticks = [0, 7_000_000_000, None]
    as_integer = kind == pa.int64()
    path = write(tmp_path / "log.parquet", timestamp=pa.array(ticks, kind if as_integer else kind(unit)))
    scale = {"s": 10**6, "ms": 10**3, "us": 1, "ns": 1e-3}[unit]
    times = {row[3] for row in read(open_log(path, {}, unit if as_integer else None))}
    assert times == {0, int(7_000_000_000 * scale), None}


@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)), st.sampled_from(["s", "ms", "us", "ns"]))
def test_microseconds_round_down_and_never_overflow(ticks: list[int | None], unit: str) -> None:
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    year_1, year_9999 = -62_135_596_800, 253_402_300_799
    for tick, micros in zip(ticks, microseconds(pa.array(ticks, pa.int64()), unit).to_pylist(), strict=True):
        if tick is None:
            assert micros is None
        elif year_1 * per_second <= tick <= year_9999 * per_second and abs(tick) < 2**63 - 1:
            assert micros == tick * 10**6 // per_second
        else:  # read as a time that is rejected as well
            assert micros < 0 if tick < 0 else micros >= min(year_9999 * 10**6, 2**63 // 1000)


def test_hive_partitions(tmp_path: Path) -> None:
    write(tmp_path / "log/day=1/action=like/a.parquet", drop="action", actor_id=[1, 2, 8], target_id=[2, 3, 9])
    write(tmp_path / "log/day=2/action=caf%C3%A9%20visit/b.parquet", drop="action")
    write(tmp_path / "log/day=2/action=__HIVE_DEFAULT_PARTITION__/c.parquet", drop="action")
    log = open_log(str(tmp_path / "log"), {}, None)
    assert log.num_rows == 9
    actions = [row[2] for table in log.read() for row in [tuple(row.values()) for row in table.to_pylist()]]
    assert sorted(actions, key=str) == [None] * 3 + ["café visit"] * 3 + ["like"] * 3


def test_a_directory_with_other_files_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a [log] of *?"
    write(folder / "b/part[0].parquet")
    write(folder / "_temporary/half.parquet")
    write(folder / ".hidden.parquet")
    (folder / "_SUCCESS").touch()
    (folder / "notes.txt").write_text("none")
    assert read(open_log(str(folder), {}, None)) == ROWS


def test_a_log_behind_a_url(tmp_path: Path) -> None:
    url = f"memory://{uuid4().hex}/log/part.parquet"
    with fsspec.open(url, "wb") as file:
        file.write(Path(write(tmp_path / "log.parquet")).read_bytes())
    assert read(open_log(url, {}, None)) == ROWS
    assert read(open_log(url.rpartition("/")[0], {}, None)) == ROWS


def test_missing_path(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no", "no does not exist: check --interactions")


def test_directory_without_parquet(tmp_path: Path) -> None:
    assert_refused(tmp_path, r"holds no \*.parquet file, nothing")
    (tmp_path / "log.csv").write_text("a,b")
    assert_refused(tmp_path, r"holds no \*.parquet file, only log.csv")


def test_empty_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").touch()
    assert_refused(tmp_path, r"b.parquet is empty \(0 bytes\)")


@pytest.mark.parametrize("keep", [3, 100, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = Path(write(tmp_path / "log.parquet"))
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(path, "log.parquet is truncated, damaged or not Parquet: write it again")


def test_file_damaged_inside(tmp_path: Path) -> None:
    """The footer is whole, so that only reading finds it."""
    path = tmp_path / "log.parquet"
    random = np.random.default_rng(0)
    table = pa.table({"actor_id": random.integers(0, 9, 9999), "target_id": random.integers(0, 9, 9999)})
    table = table.append_column("action", pa.array(["like"] * 9999)).append_column("timestamp", table["actor_id"])
    pq.write_table(table, path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    with pytest.raises(FriendrecError, match="is truncated, damaged or not Parquet"):
        list(open_log(str(path), {}, "s").read())


def test_no_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table(GOOD).slice(0, 0), tmp_path / "log.parquet")
    assert_refused(tmp_path / "log.parquet", "log.parquet has no rows")


def test_missing_columns_are_guessed(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table(GOOD).rename_columns(["Source", "targetid", "action", "zzz"]), path)
    error = assert_refused(path, "has no column actor_id, target_id, timestamp; it has Source, targetid, action, zzz")
    assert isinstance(error, Correctable)
    assert error.change == {"columns": "actor_id=Source,target_id=targetid,timestamp=<column>"}


@pytest.mark.parametrize("column", ["sent_at", "happened_at", "mtime"])
def test_a_daily_partition_is_not_taken_for_the_time(tmp_path: Path, column: str) -> None:
    path = tmp_path / "log/date=2025-01-01/part.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(GOOD).rename_columns(["sender", "recipient", "kind", column]), path)
    error = assert_refused(tmp_path / "log", "has no column actor_id, target_id, action, timestamp")
    assert isinstance(error, Correctable)
    assert error.change == {"columns": f"actor_id=sender,target_id=recipient,action=kind,timestamp={column}"}


def test_a_log_without_actions_may_have_a_single_one(tmp_path: Path) -> None:
    path = tmp_path / "log/part.parquet"
    write(path, drop="action")
    error = assert_refused(path, "has no column action; it has actor_id, target_id, timestamp")
    assert isinstance(error, Correctable)
    assert error.change == {"columns": None, "single_action": "interaction"}
    assert read(open_log(str(path), {}, None, "message")) == sorted((*row[:2], "message", row[3]) for row in ROWS)
    write(path)  # a column that is there is not read
    assert {row[2] for row in read(open_log(str(path), {}, None, "message"))} == {"message"}
    write(tmp_path / "log/without.parquet", drop="action")
    error = assert_refused(tmp_path / "log", "without.parquet has no column action")
    assert isinstance(error, Correctable)
    assert error.change == {"columns": "action=<column>"}  # others have actions, which a single one would hide
    write(tmp_path / "odd.parquet", drop="action", colour=["red", "red", "red"])
    error = assert_refused(tmp_path / "odd.parquet", "odd.parquet has no column action")
    assert isinstance(error, Correctable)
    assert error.change == {"columns": "action=<column>"}  # it may be the colour


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
def test_other_formats_are_told_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("actor_id,target_id\n1,2\n")
    assert_refused(tmp_path / name, f"{name} is not Parquet: convert it")


def test_a_mapped_column_that_is_not_there_keeps_the_rest_of_the_map(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table(GOOD).rename_columns(["a", "dst", "action", "timestamp"]), path)
    with pytest.raises(Correctable, match="has no column dest;") as error:
        open_log(str(path), {"actor_id": "a", "target_id": "dest"}, None)
    assert error.value.change == {"columns": "actor_id=a,target_id=dst"}
    with pytest.raises(Correctable, match="has no column dest;") as error:
        open_log(write(tmp_path / "plain.parquet"), {"target_id": "dest"}, None)
    assert error.value.change == {"columns": None}


def test_every_file_needs_the_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", drop="action")
    assert_refused(tmp_path, "b.parquet has no column action")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"actor_id": [1.0, 2.0, 3.0]}, "column actor_id is double, ids are int64 or string: cast it"),
        ({"target_id": pa.array([1, 2, 3], pa.uint64())}, "column target_id is uint64, ids are int64 or string"),
        ({"action": [1, 2, 3]}, "column action is int64, actions are strings"),
        ({"timestamp": ["2024", "2025", "2026"]}, "column timestamp is string, times are timestamps or integers"),
        ({"timestamp": [1.5, 2.5, 3.5]}, "column timestamp is double, times are"),
        ({"actor_id": ["a", "b", "c"]}, "actor_id is string in .*, target_id is int64 in .*: cast all"),
    ],
)
def test_wrong_types(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    assert_refused(Path(write(tmp_path / "log.parquet", **columns)), message)


def test_files_of_different_id_types(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", actor_id=["a", "b", "c"], target_id=["a", "b", "c"])
    assert_refused(tmp_path, "ids must have one type, but .*a.parquet.*b.parquet")


@pytest.mark.parametrize(
    ("ticks", "unit"),
    [(1_700_000_000, "s"), (1_700_000_000_000, "ms"), (17 * 10**14, "us"), (17 * 10**17, "ns"), (0, "s")],
)
def test_integer_times_need_a_unit(tmp_path: Path, ticks: int, unit: str) -> None:
    path = write(tmp_path / "log.parquet", timestamp=[ticks] * 3)
    error = assert_refused(Path(path), "column timestamp is int64 and its unit must be told")
    assert isinstance(error, Correctable)
    assert error.change == {"time_unit": unit}


def test_timestamps_refuse_a_unit(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet")
    with pytest.raises(Correctable, match="knows its unit") as error:
        open_log(path, {}, "s")
    assert error.value.change == {"time_unit": None}
    with pytest.raises(FriendrecError, match="--time-unit days is unknown: it is one of s, ms, us, ns"):
        open_log(path, {}, "days")


def assert_refused(path: Path, message: str) -> FriendrecError:
    with pytest.raises(FriendrecError, match=message) as error:
        open_log(str(path), {}, None)
    assert "\n" not in str(error.value)
    return error.value
