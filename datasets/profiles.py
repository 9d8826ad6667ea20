"""The optional users table: categorical columns become codes, an empty-free bag of them for every user.

user_id  country  interests             arrays, by dense row      country      interests
7        "FR"     ["chess", "go"]       offsets                   0 1 2 3      0 2 3 4
9        null     []                    values (0 = unknown)      1 0 0        1 2 0 0
(row 2 is not in the table)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
from ibis import _
from ibis.backends.duckdb import Backend
from ibis.expr.types import Table

from friendrec.datasets.engine import stream, write_parquet
from friendrec.datasets.schema import ParquetFile, check_columns, find_parquet, id_type, plain
from friendrec.errors import FriendrecError

ROW_GROUP = 1 << 20


@dataclass(frozen=True)
class Users:
    """A users table whose columns were checked. `ignored` are those that are not categorical."""

    files: tuple[ParquetFile, ...]
    key: str
    schema: pa.Schema
    ignored: tuple[str, ...]

    def read(self) -> Iterator[pa.Table]:
        """user_id and the categorical columns of every row."""
        for file in self.files:
            for table in file.read([self.key, *self.schema.names[1:]]):
                yield table.rename_columns(self.schema.names).cast(self.schema)


def open_users(path: str, columns: dict[str, str], id_kind: pa.DataType) -> Users:
    """Check the users table at a path against the type of the log's ids; the first file's columns count."""
    files = find_parquet(path, "--users")
    key = columns.get("user_id", "user_id")
    kinds = {name: categorical(kind) for name, kind in files[0].types.items() if name != key}
    kept = {name: kind for name, kind in kinds.items() if kind is not None}
    for file in files:
        check_columns(file, ["user_id", *kept], columns)
        if id_type(file, key) != id_kind:
            raise FriendrecError(
                f"{file.path}: {key} is {id_type(file, key)}, the log's ids are {id_kind}: cast one and write it again"
            )
    schema = pa.schema([("user_id", id_kind), *sorted(kept.items())])
    return Users(files, key, schema, tuple(sorted(set(kinds) - set(kept))))


def categorical(kind: pa.DataType) -> pa.DataType | None:
    """The type that a column's categories are kept in: int64, string, bool or a list of one; else None."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        value = categorical(kind.value_type)
        return None if value is None or pa.types.is_list(value) else pa.list_(value)
    kind = plain(kind)
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return pa.int64()
    if pa.types.is_boolean(kind):
        return pa.bool_()
    return pa.string() if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def write_profiles(engine: Backend, users: Users, vocabulary: Table, num_train_users: int, out: Path) -> None:
    """Write `profiles/<column>.parquet` (code, value) and `arrays/profile_<column>_{offsets,values}.npy`.

    Codes number the values that users of the train period have, in order; every other value is code 0, unknown.
    """
    engine.create_table("profiles", schema=ibis.Schema.from_pyarrow(users.schema))
    for table in users.read():
        engine.insert("profiles", table)
    profiles = engine.table("profiles")
    repeated = profiles.group_by("user_id").having(_.count() > 1).agg().limit(1).to_pyarrow()["user_id"].to_pylist()
    if repeated:
        raise FriendrecError(f"--users has several rows of user {repeated[0]}: keep one row a user")
    num_users = vocabulary.count().to_pyarrow().as_py()
    known = profiles.join(vocabulary.select("user_id", "row"), "user_id")
    for name, kind in zip(users.schema.names[1:], users.schema.types[1:], strict=True):
        values = known.select("row", value=known[name].unnest() if pa.types.is_list(kind) else known[name])
        values = values.filter(_.value.notnull()).distinct()
        codes = _codes(values.filter(_.row < num_train_users))
        schema = pa.schema({"code": pa.int32(), "value": kind.value_type if pa.types.is_list(kind) else kind})
        coded = stream(engine, codes.select("code", "value").order_by("code"), schema, ROW_GROUP)
        write_parquet(coded, schema, out / "profiles" / f"{name}.parquet")
        bags = values.join(codes, "value").select("row", "code").order_by("row", "code")
        _write_bags(engine, bags, num_users, out / "arrays", name)


def _codes(values: Table) -> Table:
    return values.select("value").distinct().mutate(code=ibis.row_number().over(order_by="value") + 1)


def _write_bags(engine: Backend, bags: Table, num_users: int, out: Path, name: str) -> None:
    schema = pa.schema({"row": pa.int64(), "code": pa.int32()})
    counts, codes = np.zeros(num_users, np.int64), [np.zeros(0, np.int32)]
    for table in stream(engine, bags, schema, ROW_GROUP):
        counts += np.bincount(table["row"].to_numpy(), minlength=num_users)
        codes.append(table["code"].to_numpy())
    sizes = np.maximum(counts, 1)
    values = np.zeros(sizes.sum(), np.int32)
    values[np.repeat(counts > 0, sizes)] = np.concatenate(codes)
    out.mkdir(exist_ok=True)
    np.save(out / f"profile_{name}_offsets.npy", np.concatenate([[0], np.cumsum(sizes)]))
    np.save(out / f"profile_{name}_values.npy", values)
