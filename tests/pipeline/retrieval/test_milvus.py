"""Milvus: the shared contract on an embedded file, and the same over the network as on a cluster."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.pipeline.retrieval import milvus
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.kinds import load_index
from friendrec.pipeline.retrieval.milvus import MilvusIndex
from friendrec.pipeline.retrieval.protocol import Queries
from tests.pipeline.retrieval.contract import RetrieverContract, jagged, random_problem


class TestEmbedded(RetrieverContract):
    """Exact, but where ties end the list it is Milvus who chooses among them."""

    cuts_ties_by_id = False
    test_equals_brute_force_on_any_small_problem = None  # 60 collections take a minute; 20 are made as it is

    def build(self, vectors: NDArray[np.float32]) -> MilvusIndex:
        return MilvusIndex.build(vectors, np.arange(len(vectors)))

    def save(self, retriever: MilvusIndex, directory: Path) -> None:  # type: ignore[override]
        retriever.save(directory)

    def load(self, directory: Path) -> MilvusIndex:
        index = load_index(directory)
        assert isinstance(index, MilvusIndex)
        return index


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server: Milvus Lite behind the protocol of a cluster."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    running, database, port = start_server_in_thread(str(tmp_path_factory.mktemp("milvus") / "server.db"))
    yield f"http://127.0.0.1:{port}"
    running.stop(grace=2)
    database.close()


@pytest.mark.long
class TestServer(TestEmbedded):
    """The same code with the address of a server, where the collection stays."""

    @pytest.fixture(autouse=True)
    def on_the_server(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uri = server

    def build(self, vectors: NDArray[np.float32]) -> MilvusIndex:
        return MilvusIndex.build(vectors, np.arange(len(vectors)), self.uri, f"c{uuid.uuid4().hex}")


def test_the_best_ten_are_those_of_the_exact_index() -> None:
    rng = np.random.default_rng(0)
    vectors, users = rng.standard_normal((3000, 16)).astype(np.float32), np.arange(3000)
    queries = Queries.dense(rng.standard_normal((20, 16)).astype(np.float32))
    queries = queries.excluding(*jagged([np.sort(rng.permutation(3000)[:500]).tolist() for _ in range(20)]))
    ids, scores = MilvusIndex.build(vectors, users).search(queries, 10)
    expected, best = ExactIndex(vectors, users).search(queries, 10)
    assert np.array_equal(ids, expected)
    np.testing.assert_allclose(scores, best, rtol=1e-5)


def test_more_vectors_than_a_request_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "ROWS_A_REQUEST", 7)
    vectors = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    index, ids = MilvusIndex.build(vectors, np.arange(50)), np.random.default_rng(1).permutation(50)
    assert np.array_equal(index.vectors_of(ids), vectors[ids])
    assert index.vectors_of(ids[:0]).shape[0] == 0


def test_two_open_the_same_file_and_leave_it_as_it_was(tmp_path: Path) -> None:
    """Milvus Lite locks the file that it opens, and a published index must not change."""
    vectors, queries = random_problem(3)
    MilvusIndex.build(vectors, np.arange(len(vectors))).save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    first, second = MilvusIndex.load(tmp_path), MilvusIndex.load(tmp_path)
    assert np.array_equal(first.search(queries, 5)[0], second.search(queries, 5)[0])
    copies = [first.file.parent, second.file.parent]
    first.close()
    assert second.search(queries, 5)[0].shape == (len(queries), 5)
    second.close()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not any(copy.exists() for copy in copies)


def test_mistakes_with_a_server_are_told_in_one_line(server: str, tmp_path: Path) -> None:
    vectors, users = np.eye(3, dtype=np.float32), np.arange(3)
    index = MilvusIndex.build(vectors, users, server, "mine")
    with pytest.raises(FriendrecError, match="has a collection mine: choose another"):
        MilvusIndex.build(vectors, users, server, "mine")
    with pytest.raises(FriendrecError, match="at most 16,384"):
        index.search(Queries.dense(vectors), 20_000)
    index.save(tmp_path)
    index.client.drop_collection("mine")
    with pytest.raises(FriendrecError, match="has no collection mine any more"):
        MilvusIndex.load(tmp_path)
    with pytest.raises(FriendrecError, match="Milvus at"):
        index.search(Queries.dense(vectors), 1)


def test_without_pymilvus_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(FriendrecError, match=r"friendrec\[milvus\]"):
        MilvusIndex.build(np.eye(2, dtype=np.float32), np.arange(2))
