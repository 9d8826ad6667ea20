"""Starting the user table from vectors made elsewhere: each rank reads the rows it owns, and nothing is gathered."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torchrec.distributed import DistributedModelParallel

from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError
from friendrec.pipeline.embeddings import vectors_of
from friendrec.pipeline.given import parquet_files, rows_of_ids
from friendrec.sharding.parallel import LocalShard, local_shards

_CHUNK = 1 << 13  # vectors read at a time
_COLUMNS = ("target", "vector")  # the first that is there


@dataclass(frozen=True)
class Given:
    """Vectors in Parquet, one a user; `rows` is the user's row in the table, or -1 for who has none there."""

    path: str
    files: tuple[Path, ...]
    column: str
    width: int
    """Leading components that are taken: the last of a vector that friendrec exported is a bias, not a place."""
    rows: NDArray[np.int64]

    def blocks(self, wanted: range) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Rows `[n]` and vectors `[n, width]` of those in `wanted`, some at a time; other row groups stay unread."""
        start = 0
        for file in map(pq.ParquetFile, self.files):
            names = [name for name in (self.column, f"{self.column}_scale") if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                rows = self.rows[start : start + file.metadata.row_group(group).num_rows]
                start += len(rows)
                if not ((rows >= wanted.start) & (rows < wanted.stop)).any():
                    continue
                begin = 0
                for batch in file.iter_batches(_CHUNK, row_groups=[group], columns=names):
                    own = rows[begin : begin + len(batch)]
                    begin += len(batch)
                    is_wanted = (own >= wanted.start) & (own < wanted.stop)
                    yield own[is_wanted], self._vectors(pa.Table.from_batches([batch]))[is_wanted]

    def _vectors(self, table: pa.Table) -> NDArray[np.float32]:
        lengths = pc.unique(pc.list_value_length(table[self.column]))
        if table[self.column].null_count or len(lengths) != 1 or lengths[0].as_py() < self.width:
            raise self._refused("has vectors of different lengths")
        vectors = vectors_of(table, self.column)[:, : self.width]
        if not np.isfinite(vectors).all():
            raise self._refused("has values that are not finite")
        return vectors

    def _refused(self, what: str) -> FriendrecError:
        return FriendrecError(f"--init-from {self.path}: column {self.column} {what}; mend it and start again")


def open_given(path: str, data: PreparedData, dim: int) -> Given:
    """Look at what is at `path`: embeddings of `friendrec export`, a folder of Parquet files, or one file.

    They have `user_id` as in the log and a list column `target` or `vector` of `dim` numbers; exported targets have
    one more, the bias, which is dropped.
    """
    files, manifest = parquet_files(path, "embeddings", f"--init-from {path}")
    try:
        columns = set.intersection(*(set(pq.read_schema(file).names) for file in files))
        column = next((name for name in _COLUMNS if name in columns), _COLUMNS[0])
        if missing := {"user_id", column} - columns:
            raise pa.ArrowKeyError(f"it has no column {min(missing)}")
        ids = pa.concat_tables([pq.ParquetFile(file).read(["user_id"]) for file in files])["user_id"]
        length = _length(files, column)
    except (OSError, pa.ArrowException) as error:
        raise FriendrecError(
            f"--init-from {path}: {str(error).splitlines()[0]}; "
            "give Parquet with user_id and a list column target or vector"
        ) from None
    rows, width = _rows(path, ids, data), length - (manifest is not None)
    if width != dim:
        raise FriendrecError(
            f"--init-from {path}: its vectors have {width} dimensions and the tables {dim}; pass --dim {width}"
        )
    return Given(path, tuple(files), column, dim, rows)


def start_from(given: Given, model: DistributedModelParallel) -> None:
    """Write this rank's part of the vectors over the first rows of the user table; the other rows stay as they are."""
    for part in local_shards(model, "user"):
        _write(given, part)


@torch.no_grad()
def _write(given: Given, part: LocalShard) -> None:
    for rows, vectors in given.blocks(range(part.first_row, part.first_row + len(part.values))):
        place = torch.from_numpy(rows - part.first_row).to(part.values.device)
        part.values[place] = torch.from_numpy(vectors[:, part.columns].copy()).to(part.values)


def _length(files: list[Path], column: str) -> int:
    """Of the first vector that there is; 0 where there is none."""
    first = (batch[column] for file in files for batch in pq.ParquetFile(file).iter_batches(1, columns=[column]))
    return next((pc.list_value_length(vector)[0].as_py() or 0 for vector in first), 0)


def _rows(path: str, ids: pa.ChunkedArray, data: PreparedData) -> NDArray[np.int64]:
    """The table's row of each raw id; -1 for users that are unknown or came after the train period."""
    rows = rows_of_ids(ids, data, f"--init-from {path}")
    rows = np.where(rows < data.num_train_users, rows, -1)
    found = rows[rows >= 0]
    if len(np.unique(found)) < len(found):
        raise FriendrecError(f"--init-from {path}: a user has two vectors; leave one row a user_id")
    if not len(found):
        raise FriendrecError(f"--init-from {path}: none of its user ids is one of the prepared data's train users")
    return rows
