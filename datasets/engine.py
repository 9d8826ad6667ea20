"""The table engine that preparation runs on: DuckDB, out of core, spoken to through Ibis."""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.backends.duckdb import Backend
from ibis.expr.types import Table

from friendrec.errors import FriendrecError


def connect(directory: Path, memory_limit: str) -> Backend:
    """An engine that keeps its tables in `directory` and spills there what exceeds `memory_limit` (like "2GB")."""
    try:
        return ibis.duckdb.connect(
            directory / "tables.duckdb",
            memory_limit=memory_limit,
            temp_directory=str(directory / "spill"),
            preserve_insertion_order=False,
        )
    except duckdb.Error as error:
        raise FriendrecError(f"--memory-limit {memory_limit} is not a size: pass one like 2GB or 500MB") from error


def stream(engine: Backend, table: Table, schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """The rows of an expression as tables of `schema` with exactly `rows` rows each (the last: the rest).

    The cuts do not depend on the engine's own, and the whole is never in memory. (Not `to_pyarrow_batches`: that of
    Ibis 12 calls a method that DuckDB 2 has no more.)
    """
    held: list[pa.Table] = []
    count = 0
    for batch in engine.con.cursor().sql(engine.compile(table)).to_arrow_reader(rows):
        held.append(pa.Table.from_batches([batch]).cast(schema))
        count += batch.num_rows
        while count >= rows:
            whole = pa.concat_tables(held).combine_chunks()
            yield whole.slice(0, rows)
            held = [whole.slice(rows)]
            count -= rows
    if count:
        yield pa.concat_tables(held).combine_chunks()


def write_parquet(tables: Iterator[pa.Table], schema: pa.Schema, path: Path) -> int:
    """Write each table as one row group, so that equal rows give equal bytes; the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            rows += len(table)
    return rows
