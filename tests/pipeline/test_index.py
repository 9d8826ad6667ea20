"""The `index` verb: embeddings in, a searchable index out."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline import index
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.publish import open_published, publish
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.protocol import Queries


def test_index_holds_the_target_vectors_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((24, 4)).astype(np.float32)
    users = [f"user{row}" for row in range(24)]
    with publish(tmp_path / "embeddings", kind="embeddings", options=None, inputs={}) as attempt:
        for rank, rows in enumerate(np.split(np.arange(24), 12)):  # rank 10 comes after rank 9
            target = pa.FixedSizeListArray.from_arrays(pa.array(vectors[rows].ravel()), 4)
            query = pa.FixedSizeListArray.from_arrays(pa.array(-vectors[rows].ravel()), 4)
            table = pa.table({"user_id": [users[row] for row in rows], "query": query, "target": target})
            pq.write_table(table, attempt / f"part-{rank}.parquet")
    options = IndexOptions(embeddings=str(tmp_path / "embeddings"), out=str(tmp_path / "index"))
    index.main(options)
    index.main(options)  # finished work is not repeated, nor refused
    directory, manifest = open_published(tmp_path / "index", "index")
    loaded = ExactIndex.load(directory)
    assert manifest.inputs.keys() == {"embeddings"}
    assert loaded.user_ids.tolist() == users
    assert np.array_equal(loaded.vectors, vectors)
    assert loaded.search(Queries.dense(vectors), 1)[0].shape == (24, 1)


def test_something_else_than_embeddings_is_refused(tmp_path: Path) -> None:
    with publish(tmp_path / "run", kind="run", options=None, inputs={}) as attempt:
        (attempt / "config.json").write_text("{}")
    with pytest.raises(FriendrecError, match="is a run, expected embeddings"):
        index.main(IndexOptions(embeddings=str(tmp_path / "run"), out=str(tmp_path / "index")))
