"""Embeddings read a block at a time, for what must not hold them whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.pipeline.embeddings import vectors_of

BLOCK = 1 << 14  # users
Which = Literal["query", "target"]


@dataclass(frozen=True)
class EmbeddingParts:
    """The parts of an embeddings directory in the order of the vocabulary; user n is row n over all of them."""

    directory: Path
    paths: list[Path]
    starts: NDArray[np.int64]  # [parts + 1]
    dimensions: int

    @classmethod
    def of(cls, directory: Path) -> "EmbeddingParts":
        """Of a published directory; raises FriendrecError where it holds no vectors, or of several lengths."""
        try:
            paths = sorted(directory.glob("part-*.parquet"), key=lambda path: int(path.stem.removeprefix("part-")))
            files = [pq.ParquetFile(path, memory_map=True) for path in paths]
            (dimensions,) = {file.schema_arrow.field("target").type.list_size for file in files}
        except (OSError, KeyError, ValueError, AttributeError, pa.ArrowException) as error:
            raise FriendrecError(
                f"{directory} holds no users with target vectors of one length: export again"
            ) from error
        rows = [file.metadata.num_rows for file in files]
        return cls(directory, paths, np.concatenate([[0], np.cumsum(rows)]).astype(np.int64), dimensions)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def user_ids(self) -> pa.ChunkedArray:
        """Raw ids `[N]`; raises FriendrecError where one occurs twice."""
        with _damage(self.directory):
            users = pa.concat_tables([pq.read_table(path, columns=["user_id"]) for path in self.paths])["user_id"]
        if pc.count_distinct(users).as_py() < len(users):
            raise FriendrecError(f"{self.directory} holds two vectors of a user: export again")
        return users

    def blocks(self, which: Which, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """First user and float32 vectors `[n, D]` of one block after the other, of the users `start` to `stop`.

        Raises FriendrecError where a vector is not finite, or a part is damaged.
        """
        blocks = self._blocks(which, start, stop)
        while True:
            with _damage(self.directory):
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def _blocks(self, which: Which, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for path, first in zip(self.paths, self.starts[:-1].tolist(), strict=True):
            file = pq.ParquetFile(path, memory_map=True)
            columns = [name for name in (which, f"{which}_scale") if name in file.schema_arrow.names]
            for group, begin in _groups(file, first, start, stop):
                for batch in file.iter_batches(BLOCK, [group], columns):
                    table = pa.Table.from_batches([batch])
                    kept = table.slice(max(0, start - begin), max(0, stop - max(begin, start)))
                    if len(kept):
                        yield max(begin, start), self._finite(vectors_of(kept, which))
                    begin += len(table)

    def _finite(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        if not np.isfinite(vectors).all():
            raise FriendrecError(f"{self.directory} holds vectors that are not finite: train and export again")
        return vectors

    def rows(self, which: Which, users: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of some users (ascending), `[len(users), D]`."""
        found = [np.empty((0, self.dimensions), np.float32)]
        for first, vectors in self.blocks(which, 0, len(self)):
            mine = users[np.searchsorted(users, first) : np.searchsorted(users, first + len(vectors))]
            found.append(vectors[mine - first])
        return np.concatenate(found)


@contextmanager
def _damage(directory: Path) -> Iterator[None]:
    """What reading raises, as one line."""
    try:
        yield
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise FriendrecError(f"{directory} has a damaged part: export again") from error


def _groups(file: pq.ParquetFile, first: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Row groups that hold any of the users `start` to `stop`, and the first user of each."""
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first < stop and first + rows > start:
            yield group, first
        first += rows
