"""Social tokenized user IDs as Parquet: `user_id`, and `tokens`, a fixed-size list of int32, unique to the user."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from friendrec.datasets.packing import Codes
from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError
from friendrec.models.codes import num_sharing
from friendrec.models.trie import NO_TOKEN
from friendrec.pipeline.manifest import Manifest
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.retrieval.files import UserIds

TOKENS = "tokens.parquet"


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
    return _read(directory, manifest), manifest


def tokens_of_run(run: str | Path) -> StuTable:
    """The tokens that a run was trained with; it holds a copy."""
    return _read(*open_published(run, "run"))


def _read(directory: Path, manifest: Manifest) -> StuTable:
    try:
        sizes = tuple(manifest.extra["sizes"])
        table = pq.read_table(directory / TOKENS, columns=["user_id", "tokens"]).combine_chunks()
        kind = pa.list_(pa.int32(), len(sizes))
        tokens = table["tokens"].cast(kind).combine_chunks().flatten().to_numpy().reshape(-1, len(sizes))
        read = StuTable(table["user_id"].to_numpy(), tokens, sizes)
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise FriendrecError(f"{directory} holds no readable tokens.parquet: tokenize again") from error
    _check(read, directory)
    return read


def _check(table: StuTable, directory: Path) -> None:
    """Tokens are of their levels, only the last level is left out, and every code is one user's."""
    tokens, ends = table.tokens, table.tokens[:, -1:] == NO_TOKEN
    inside = (tokens >= 0) & (tokens < np.array(table.sizes))
    inside[:, -1:] |= ends
    if not len(tokens):
        raise FriendrecError(f"{directory} holds no users: tokenize again")
    if not inside.all():
        raise FriendrecError(f"{directory} holds tokens that are none of {list(table.sizes)} a level: tokenize again")
    if num_sharing(tokens):
        raise FriendrecError(f"{directory} holds users who share a code: tokenize again")


def codes_of(table: StuTable, data: PreparedData, source: str | Path) -> Codes:
    """Codes of the first rows of the data's vocabulary: all train users, and the newcomers who have one."""
    num = len(table.user_ids)
    if num < data.num_train_users or not np.array_equal(table.user_ids, data.user_ids[:num]):
        raise FriendrecError(f"{source} holds other users than the prepared data: tokenize this data's embeddings")
    return Codes(table.tokens, table.sizes)


def rows_in(table: StuTable, user_ids: UserIds) -> NDArray[np.int64]:
    """The table's row of each user, -1 where it has none; FriendrecError where ids are of another type."""
    try:
        rows = pc.index_in(pa.array(user_ids), value_set=pa.array(table.user_ids))
    except pa.ArrowException as error:
        raise FriendrecError(
            f"{error}; the tokens of before are of users of another log: leave out --start-from"
        ) from None
    return pc.fill_null(rows, -1).to_numpy().astype(np.int64)
