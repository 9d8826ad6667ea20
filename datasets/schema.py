"""The interaction log as it comes: finds its Parquet files, checks their columns, reads them as plain ids and times.

Whatever the log calls its columns, however it is split into files and whichever unit its clock has, what is read is

    actor_id  int64 | string      action     string
    target_id the same            timestamp  int64, microseconds since 1970 (UTC)

Columns missing from the files are looked for in the folder names (`date=2024-01-01/action=like/part-0.parquet`).
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from friendrec.datasets.preparation_config import Correctable
from friendrec.errors import FriendrecError

LOG_COLUMNS = ("actor_id", "target_id", "action", "timestamp")
TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Ticks in a second of each unit that a timestamp may have."""
YEAR_1, YEAR_9999 = -62_135_596_800, 253_402_300_799
"""Seconds since 1970; times beyond are read as these (both are rejected later), so that no arithmetic overflows."""
READ_ROWS = 1 << 19
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
ALIASES = {
    "actor_id": ("actor", "src", "source", "from", "from_id", "sender", "sender_id", "user_id", "user", "u"),
    "target_id": ("target", "dst", "dest", "destination", "to", "to_id", "receiver", "recipient", "friend_id", "v"),
    "action": ("type", "kind", "event", "event_type", "action_type", "verb", "label"),
    "timestamp": ("time", "ts", "t", "date", "datetime", "created_at", "event_time", "sent_at"),
    "user_id": ("id", "user", "uid", "actor_id"),
}
TIME_ENDINGS = ("_at", "_on", "_ts", "time", "date")


@dataclass(frozen=True)
class ParquetFile:
    """One readable Parquet file: `names` maps its columns to types, `partition` its folders' keys to values."""

    path: str
    filesystem: Any
    types: Mapping[str, pa.DataType]
    partition: Mapping[str, str | None]
    num_rows: int

    def type_of(self, column: str) -> pa.DataType:
        """The type of a column of the file; one that only the path has is a string."""
        return plain(self.types.get(column, pa.string()))

    def with_constant(self, column: str, value: str) -> "ParquetFile":
        """The same file as if its path said that the column has this value throughout."""
        types = {name: kind for name, kind in self.types.items() if name != column}
        return replace(self, types=types, partition={**self.partition, column: value})

    def read(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The columns in tables of READ_ROWS rows; a column that only the path has is constant."""
        stored = [column for column in columns if column in self.types]
        try:
            file = pq.ParquetFile(self.path, filesystem=self.filesystem)
            for batch in file.iter_batches(READ_ROWS, columns=stored):
                table = pa.Table.from_batches([batch])
                for column in columns:
                    if column not in self.types:
                        value = pa.array([self.partition[column]], pa.string())
                        table = table.append_column(column, value.take(pa.array(np.zeros(len(table), np.int64))))
                yield table.select(list(columns))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path) from error


@dataclass(frozen=True)
class Log:
    """An interaction log whose columns and types were checked; `columns` are its own names of LOG_COLUMNS."""

    files: tuple[ParquetFile, ...]
    columns: tuple[str, ...]
    id_type: pa.DataType
    unit: str | None

    @property
    def schema(self) -> pa.Schema:
        types = (self.id_type, self.id_type, pa.string(), pa.int64())
        return pa.schema(list(zip(LOG_COLUMNS, types, strict=True)))

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    def read(self) -> Iterator[pa.Table]:
        """Every row of the log in tables of `schema`, in no promised order."""
        for file in self.files:
            for table in file.read(self.columns):
                time = table.column(3).combine_chunks()
                unit = time.type.unit if pa.types.is_timestamp(time.type) else self.unit
                ids_and_action = [table.column(i).cast(self.schema.types[i]) for i in range(3)]
                yield pa.table([*ids_and_action, microseconds(time, str(unit))], schema=self.schema)


def open_log(path: str, columns: dict[str, str], time_unit: str | None, single_action: str | None = None) -> Log:
    """Find and check the files of a log. `columns` maps LOG_COLUMNS to the names they have there.

    With `single_action` every row has that action, and no column is read for it.
    """
    files = find_parquet(path, "--interactions")
    names = tuple(columns.get(name, name) for name in LOG_COLUMNS)
    if single_action is not None:
        files = tuple(file.with_constant(names[2], single_action) for file in files)
    has_actions = any(names[2] in (*file.types, *file.partition) for file in files)
    for file in files:
        check_columns(file, LOG_COLUMNS, columns, has_actions)
        _check_action(file, names[2])
        _check_time(file, names[3], time_unit)
    id_types = {(name, id_type(file, name)): file for file in files for name in names[:2]}
    if len({kind for _, kind in id_types}) > 1:
        told = ", ".join(f"{name} is {kind} in {file.path}" for (name, kind), file in id_types.items())
        raise FriendrecError(f"ids must have one type, but {told}: cast all to int64 or all to string")
    return Log(files, names, next(iter(id_types))[1], time_unit)


def find_parquet(path: str, option: str) -> tuple[ParquetFile, ...]:
    """The Parquet files at or below a path or URL, in order of name; hidden ones (`_`, `.`) are left out."""
    filesystem, root = fsspec.core.url_to_fs(path)
    if not filesystem.exists(root):
        raise FriendrecError(f"{path} does not exist: check {option}")
    if filesystem.isfile(root):
        names = [root]
    else:
        found = sorted(filesystem.find(root))
        names = [name for name in found if name.endswith((".parquet", ".pq")) and not _is_hidden(name, root)]
        if not names:
            held = f"only {PurePosixPath(found[0]).name} and the like" if found else "nothing"
            raise FriendrecError(f"{path} holds no *.parquet file, {held}: check {option}")
    files = tuple(_open(name, filesystem) for name in names)
    if not sum(file.num_rows for file in files):
        raise FriendrecError(f"{path} has no rows: check {option}")
    return files


def check_columns(file: ParquetFile, wanted: Sequence[str], columns: dict[str, str], has_actions: bool = True) -> None:
    """Raise, with the closest names there are, unless the file has every wanted column under its mapped name.

    A log that has no column of actions in any file, and none that could be one, may do with a single action.
    """
    there = [*file.types, *(key for key in file.partition if key not in file.types)]
    missing = [name for name in wanted if columns.get(name, name) not in there]
    if not missing:
        return
    mapping = {name: columns.get(name, name) for name in wanted if name not in missing}
    free = [column for column in there if column not in mapping.values()]
    for name in missing:
        fit = [column for column in free if name != "timestamp" or _is_time(file.type_of(column))]
        mapping[name] = _closest(name, fit) or "<column>"
        free = [column for column in free if column != mapping[name]]
    lacks = ", ".join(columns.get(name, name) for name in missing)
    renamed = columns | {name: mapping[name] for name in missing}
    single: dict[str, str] = {}
    if not has_actions and mapping["action"] == "<column>" and not any(_is_string(file.type_of(c)) for c in free):
        del renamed["action"]
        single = {"single_action": "interaction"}
    change = ",".join(f"{name}={column}" for name, column in renamed.items() if name != column) or None
    raise Correctable(f"{file.path} has no column {lacks}; it has {', '.join(there)}", columns=change, **single)


def id_type(file: ParquetFile, column: str) -> pa.DataType:
    """int64 or string, whichever holds the ids of a column."""
    kind = file.type_of(column)
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return pa.int64()
    if _is_string(kind):
        return pa.string()
    raise FriendrecError(
        f"{file.path}: column {column} is {kind}, ids are int64 or string: cast it and write the file again, "
        f"or name another column by --columns"
    )


def microseconds(time: pa.Array, unit: str) -> pa.Array:
    """Ticks or timestamps of a unit since 1970 as int64 microseconds, rounded down.

    >>> microseconds(pa.array([1_500, None, -1]), "ns").to_pylist()
    [1, None, -1]
    """
    per_second, longest = TICKS[unit], np.iinfo(np.int64).max
    ticks = time.cast(pa.int64()).fill_null(0).to_numpy()
    ticks = ticks.clip(max(YEAR_1 * per_second, -longest), min(YEAR_9999 * per_second, longest))
    micros = ticks * (10**6 // per_second) if per_second <= 10**6 else ticks // (per_second // 10**6)
    return pa.array(micros, mask=time.is_null().to_numpy(zero_copy_only=False))


def _check_action(file: ParquetFile, column: str) -> None:
    kind = file.type_of(column)
    if not _is_string(kind):
        raise FriendrecError(
            f"{file.path}: column {column} is {kind}, actions are strings: cast it and write the file again, "
            f"or name another column by --columns action=<column>"
        )


def _check_time(file: ParquetFile, column: str, time_unit: str | None) -> None:
    kind = file.type_of(column)
    if time_unit is not None and time_unit not in TICKS:
        raise FriendrecError(f"--time-unit {time_unit} is unknown: it is one of {', '.join(TICKS)}")
    if pa.types.is_timestamp(kind):
        if time_unit is not None:
            raise Correctable(f"{file.path}: column {column} is {kind} and knows its unit", time_unit=None)
    elif not _is_time(kind):
        raise FriendrecError(
            f"{file.path}: column {column} is {kind}, times are timestamps or integers with --time-unit: "
            f"cast it and write the file again, or name another column by --columns timestamp=<column>"
        )
    elif time_unit is None:
        unit = _likely_unit(file, column)
        raise Correctable(f"{file.path}: column {column} is {kind} and its unit must be told", time_unit=unit)


def _likely_unit(file: ParquetFile, column: str) -> str:
    """The unit that puts the first time of the file closest to our days."""
    first = next((table.column(0).drop_null() for table in file.read([column])), pa.chunked_array([[0]]))
    ticks = first[0].as_py() if len(first) else 0
    return min(TICKS, key=lambda unit: abs(np.log10(max(abs(ticks), 1) / TICKS[unit]) - 9))


def _closest(name: str, columns: Sequence[str]) -> str | None:
    lowered = {column.lower(): column for column in columns}
    for alias in (name, *ALIASES.get(name, ())):
        if alias in lowered:
            return lowered[alias]
    matches = difflib.get_close_matches(name, lowered, n=1, cutoff=0.5)
    if name == "timestamp" and not matches:
        matches = [column for column in lowered if column.endswith(TIME_ENDINGS)]
    return lowered[matches[0]] if matches else None


def _open(path: str, filesystem: Any) -> ParquetFile:
    if filesystem.size(path) == 0:
        raise FriendrecError(f"{path} is empty (0 bytes): remove it or write it again")
    try:
        file = pq.ParquetFile(path, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path) from error
    types = {field.name: field.type for field in file.schema_arrow}
    return ParquetFile(path, filesystem, types, _partition(path), file.metadata.num_rows)


def _partition(path: str) -> dict[str, str | None]:
    keys = (folder.split("=", 1) for folder in Path(path).parts[:-1] if "=" in folder)
    return {unquote(key): None if value == NULL_PARTITION else unquote(value) for key, value in keys}


def _is_hidden(name: str, root: str) -> bool:
    return any(part.startswith(("_", ".")) for part in PurePosixPath(name[len(root) :]).parts)


def _unreadable(path: str) -> FriendrecError:
    if path.endswith((".csv", ".tsv", ".json", ".jsonl")):
        return FriendrecError(
            f"{path} is not Parquet: convert it, as by COPY (FROM 'log.csv') TO 'log.parquet' in DuckDB"
        )
    return FriendrecError(f"{path} is truncated, damaged or not Parquet: write it again")


def plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a column, dictionary-encoded or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or (pa.types.is_integer(kind) and kind != pa.uint64()))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
