"""Embeddings as Parquet: `user_id`, and `query` and `target` as fixed-size lists; int8 has a scale beside each.

Where the model has clusters, `clusters.npz` holds their centroids in the space of the targets: `centroids` float32
`[C, D + 1]` and `cells`, the number of cells that they lie in, one after the other.
"""

from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.pipeline.retrieval.centroids import Centroids

CLUSTERS = "clusters.npz"
Dtype = Literal["float32", "float16", "int8"]


def write_part(
    path: Path, user_ids: np.ndarray, query: NDArray[np.float32], target: NDArray[np.float32], dtype: Dtype
) -> None:
    """One rank's rows."""
    pq.write_table(to_table(user_ids, query, target, dtype), path)


def to_table(user_ids: np.ndarray, query: NDArray[np.float32], target: NDArray[np.float32], dtype: Dtype) -> pa.Table:
    """Vectors `[N, D]` of users. int8 is round(v / scale) with scale = max |v| / 127, a float32 column of its own."""
    # The type of strings is said: a rank without users would else write the type of nothing.
    columns: dict[str, pa.Array] = {"user_id": pa.array(user_ids, pa.string() if user_ids.dtype == object else None)}
    for name, vectors in (("query", query), ("target", target)):
        if dtype == "int8":
            scale = np.maximum(np.abs(vectors).max(axis=1, initial=0.0), 1e-12) / 127
            columns[f"{name}_scale"] = pa.array(scale.astype(np.float32))
            vectors = np.rint(vectors / scale[:, None])
        flat = pa.array(vectors.astype(dtype).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table(columns)


def read_embeddings(directory: Path, which: Literal["query", "target"]) -> tuple[np.ndarray, NDArray[np.float32]]:
    """User ids `[N]` and float32 vectors `[N, D]` of all parts, in the order of the vocabulary."""
    try:
        parts = sorted(directory.glob("part-*.parquet"), key=lambda path: int(path.stem.removeprefix("part-")))
        table = pa.concat_tables([pq.read_table(part) for part in parts]).combine_chunks()
        users, vectors = table["user_id"], vectors_of(table, which)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise FriendrecError(f"{directory} holds no users with {which} vectors of one length: export again") from error
    if pc.count_distinct(users).as_py() < len(users):
        raise FriendrecError(f"{directory} holds two vectors of a user: export again")
    return users.to_numpy(), vectors


def vectors_of(table: pa.Table, which: str) -> NDArray[np.float32]:
    """One column of vectors as float32 `[N, D]`."""
    column = table[which].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)
    if f"{which}_scale" in table.column_names:
        vectors *= table[f"{which}_scale"].to_numpy()[:, None]
    return vectors


def write_centroids(directory: Path, centroids: Centroids) -> None:
    """Beside the vectors of the same model."""
    np.savez(directory / CLUSTERS, centroids=centroids.vectors, cells=np.int64(centroids.cells))


def read_centroids(directory: Path) -> Centroids | None:
    """The centroids of the model that made the embeddings, where it has any."""
    if not (directory / CLUSTERS).exists():
        return None
    try:
        with np.load(directory / CLUSTERS) as file:
            centroids = Centroids(file["centroids"], int(file["cells"]))
    except (OSError, EOFError, KeyError, ValueError, BadZipFile, FriendrecError) as error:
        raise FriendrecError(f"{directory / CLUSTERS} holds no centroids in cells: export again") from error
    return centroids
