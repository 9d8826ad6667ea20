"""Social tokenized user IDs as Parquet: `user_id`, and `tokens`, a fixed-size list of int32, unique to the user."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError
from friendrec.pipeline.manifest import Manifest
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.retrieval.files import UserIds

NO_TOKEN = -1
"""Stands at the last level, that of disambiguation, of users whose code is unique without it."""


@dataclass(frozen=True)
class StuTable:
    """The codes of U users over L levels."""

    user_ids: UserIds  # [U]
    tokens: NDArray[np.int32]  # [U, L], NO_TOKEN where a code ends before
    sizes: tuple[int, ...]  # [L] tokens of each level


def write_tokens(path: Path, user_ids: UserIds, tokens: NDArray[np.int32]) -> None:
    """One Parquet file of users in the given order."""
    flat = pa.array(np.ascontiguousarray(tokens, np.int32).ravel())
    codes = pa.FixedSizeListArray.from_arrays(flat, tokens.shape[1])
    pq.write_table(pa.table({"user_id": user_ids, "tokens": codes}), path)


def read_tokens(path: str | Path) -> tuple[StuTable, Manifest]:
    """What `friendrec tokenize` published."""
    directory, manifest = open_published(path, "stu")
    table = pq.read_table(directory / "tokens.parquet").combine_chunks()
    sizes = tuple(manifest.extra["sizes"])
    tokens = table["tokens"].combine_chunks().flatten().to_numpy().reshape(-1, len(sizes))
    return StuTable(table["user_id"].to_numpy(), tokens, sizes), manifest


def tokens_by_row(table: StuTable, data: PreparedData, source: str | Path) -> NDArray[np.int32]:
    """Codes of the first rows of the data's vocabulary, `[U, L]`: all train users, and the newcomers who have one."""
    num = len(table.user_ids)
    if num < data.num_train_users or not np.array_equal(table.user_ids, data.user_ids[:num]):
        raise FriendrecError(f"{source} holds other users than the prepared data: tokenize this data's embeddings")
    return table.tokens
