"""An index in Milvus: an embedded Milvus Lite file by default, or a collection of a cluster.

The same code speaks to both, through pymilvus, and a cluster grows past one machine. Ids in Milvus are rows;
exclusions travel as a filter of the search.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.pipeline.retrieval.files import UserIds, read_meta, read_users, write_users
from friendrec.pipeline.retrieval.parts import Found, search_by_parts
from friendrec.pipeline.retrieval.protocol import Queries

FILE = "milvus.db"
ROWS_A_REQUEST = 4096
"""Vectors sent or fetched at once: some MiB, far below the 64 MiB that a cluster accepts."""
MOST_RESULTS = 16_384
"""Milvus returns no more for a query."""
TOKEN = "MILVUS_TOKEN"
"""Environment variable with `user:password` or an API key: a secret does not belong in a command or a manifest."""


class MilvusIndex:
    """N candidates in a collection. An embedded one lives in a folder of its own, for Milvus Lite locks its file."""

    def __init__(self, user_ids: UserIds, collection: str, uri: str | None = None, file: Path | None = None) -> None:
        """Connect to `uri`, or to an embedded copy of `file` (a new one where both are None)."""
        self.user_ids, self.collection, self.uri = user_ids, collection, uri
        connect, folder = _client(), None
        if uri is None:
            folder = tempfile.mkdtemp(prefix="friendrec-milvus-")
            self.file = Path(folder) / FILE
            if file is not None:
                shutil.copytree(file, self.file)
        with _one_line(uri):
            self.client = connect(uri or str(self.file), token=os.environ.get(TOKEN, ""))
        self._close = weakref.finalize(self, _release, self.client, folder)

    @classmethod
    def build(
        cls,
        vectors: NDArray[np.float32],
        user_ids: UserIds,
        uri: str | None = None,
        collection: str = "friendrec",
        index_type: str = "FLAT",
    ) -> Self:
        """Fill a new collection."""
        index = cls(user_ids, collection, uri)
        with _one_line(uri):
            if index.client.has_collection(collection):
                raise FriendrecError(
                    f"{uri} has a collection {collection}: choose another --collection, or drop it there"
                )
            try:
                _fill(index.client, collection, vectors, index_type)
            except BaseException:
                index.client.drop_collection(collection)
                raise
        return index

    def __len__(self) -> int:
        return len(self.user_ids)

    def search(self, queries: Queries, k: int) -> Found:
        """Best k allowed candidates of each query: see `Retriever`."""
        if k > MOST_RESULTS:
            raise FriendrecError(f"Milvus returns at most {MOST_RESULTS:,} candidates a query, {k:,} are asked for")
        return search_by_parts(self, queries, k)

    def vectors_of(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        place: dict[int, list[float]] = {}
        with _one_line(self.uri):
            for part in np.array_split(ids, -(-len(ids) // ROWS_A_REQUEST) or 1):
                rows = (
                    self.client.get(self.collection, ids=part.tolist(), output_fields=["vector"]) if len(part) else []
                )
                place |= {row["row"]: row["vector"] for row in rows}
        return np.array([place[row] for row in ids.tolist()], np.float32)

    def nearest(self, vector: NDArray[np.float32], k: int, hidden: NDArray[np.int64]) -> Found:
        """See `Dense`."""
        with _one_line(self.uri):
            (hits,) = self.client.search(
                self.collection,
                data=[vector],
                anns_field="vector",
                limit=k,
                filter=f"row not in {hidden.tolist()}" if len(hidden) else "",
                output_fields=["row"],
            )
        return np.array([hit["row"] for hit in hits], np.int64), np.array([hit["distance"] for hit in hits], np.float32)

    def save(self, directory: Path) -> None:
        """Write the embedded file, or where the collection is."""
        if self.uri is None:
            shutil.copytree(self.file, directory / FILE)
        dimensions = self.client.describe_collection(self.collection)["fields"][1]["params"]["dim"]
        write_users(directory, "milvus", self.user_ids, dimensions, uri=self.uri, collection=self.collection)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Open what `save` wrote; the caller has checked the manifest."""
        meta = read_meta(directory, "collection", "uri")
        index = cls(read_users(directory), meta["collection"], meta["uri"], directory / FILE)
        with _one_line(index.uri):
            if not index.client.has_collection(index.collection):
                raise FriendrecError(f"{index.uri} has no collection {index.collection} any more: make the index again")
            index.client.load_collection(index.collection)
        return index

    def close(self) -> None:
        """Disconnect; an embedded copy goes."""
        self._close()


def _fill(client: Any, collection: str, vectors: NDArray[np.float32], index_type: str) -> None:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
    parameters = client.prepare_index_params()
    parameters.add_index("vector", index_type=index_type, metric_type="IP")
    client.create_collection(collection, schema=schema, index_params=parameters, consistency_level="Strong")
    for rows in np.array_split(np.arange(len(vectors)), -(-len(vectors) // ROWS_A_REQUEST)):
        client.insert(collection, [{"row": int(row), "vector": vectors[row]} for row in rows])
    client.flush(collection)


def _client() -> Any:
    """The class of pymilvus."""
    try:
        import milvus_lite  # noqa: F401
        from pymilvus import MilvusClient
    except ImportError:
        raise FriendrecError("an index of kind milvus needs pymilvus: pip install 'friendrec[milvus]'") from None
    return MilvusClient


@contextmanager
def _one_line(uri: str | None) -> Iterator[None]:
    """Tell an error of Milvus as a user's mistake."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        reason = str(error.message).splitlines()[0]
        raise FriendrecError(f"Milvus at {uri or 'an embedded file'}: {reason}") from error


def _release(client: Any, folder: str | None) -> None:
    client.close()
    if folder is not None:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(str(Path(folder) / FILE))
        shutil.rmtree(folder, ignore_errors=True)
