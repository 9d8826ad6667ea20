"""The `index` verb: embeddings in, a searchable index of any kind out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline import index
from friendrec.pipeline.embeddings import write_centroids, write_part
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.publish import open_published, publish
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.kinds import load_index
from friendrec.pipeline.retrieval.protocol import Queries

USERS = np.array([f"user{row}" for row in range(240)], object)
TARGETS = np.random.default_rng(0).standard_normal((240, 4)).astype(np.float32)


@pytest.fixture
def embeddings(tmp_path: Path) -> str:
    with publish(tmp_path / "embeddings", kind="embeddings", options=None, inputs={}) as attempt:
        for rank, rows in enumerate(np.split(np.arange(240), 12)):  # rank 10 comes after rank 9
            write_part(attempt / f"part-{rank}.parquet", USERS[rows], -TARGETS[rows], TARGETS[rows], "float32")
        write_centroids(attempt, Centroids(TARGETS[:6], 2))
    return str(tmp_path / "embeddings")


def test_index_holds_the_target_vectors_in_the_order_of_the_ranks(
    embeddings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = IndexOptions(embeddings=embeddings, out=str(tmp_path / "index"))
    index.main(options)
    index.main(options)  # finished work is not repeated, nor refused
    assert "is this index already" in capsys.readouterr().out
    directory, manifest = open_published(tmp_path / "index", "index")
    loaded = ExactIndex.load(directory)
    assert manifest.inputs.keys() == {"embeddings"}
    assert loaded.user_ids.tolist() == USERS.tolist()
    assert np.array_equal(loaded.vectors, TARGETS)
    assert loaded.search(Queries.dense(TARGETS), 1)[0].shape == (240, 1)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_rounded_rows_find_is_said_to_be_of_what_they_can(
    dtype: Any, embeddings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index.main(IndexOptions(embeddings=embeddings, kind="clusters", dtype=dtype, out=str(tmp_path / "index")))
    said = capsys.readouterr().out
    assert "of what its rows can find; 6 lists" in said and "of the exact best" not in said


@pytest.mark.parametrize(
    ("kind", "parameters", "said", "meta"),
    [
        ("exact", {}, "exact inner product", {}),
        ("ivf", {}, "of the exact best", {"nlist": 6}),
        ("ivf", {"nlist": 12, "nprobe": 12}, "ivf, nprobe 12", {"nlist": 12, "nprobe": 12, "recall": None}),
        ("hnsw", {"recall": 0.9}, "of the exact best", {"m": 32}),
        ("hnsw", {"m": 8, "ef": 200}, "hnsw, ef 200", {"m": 8, "ef": 200, "recall": None}),
        ("clusters", {}, "of the exact best; 6 lists, the fullest", {"lists": 6, "copies": 1, "dtype": "float32"}),
        (
            "clusters",
            {"nprobe": 99, "copies": 2},
            "clusters, nprobe 6; 6 lists",
            {"nprobe": 6, "recall": None, "copies": 2},
        ),
        ("milvus", {}, "inner product in Milvus", {"uri": None, "collection": "friendrec"}),
        ("milvus", {"milvus_index": "AUTOINDEX"}, "inner product in Milvus", {"uri": None}),
    ],
)
def test_every_kind_finds_the_same_and_says_what_it_is(
    kind: Any,
    parameters: dict[str, Any],
    said: str,
    meta: dict[str, Any],
    embeddings: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index.main(IndexOptions(embeddings=embeddings, kind=kind, out=str(tmp_path / "index"), **parameters))
    assert said in capsys.readouterr().out
    directory, _ = open_published(tmp_path / "index", "index", verify=True)
    opened, written = load_index(directory), json.loads((directory / "meta.json").read_text())
    assert written.items() >= {"kind": kind, "candidates": 240, "dimensions": 4, **meta}.items()
    assert len(opened) == 240 and opened.user_ids.tolist() == USERS.tolist()
    np.testing.assert_allclose(opened.vectors_of(np.array([200, 3])), TARGETS[[200, 3]])
    ids, _ = opened.search(Queries.dense(TARGETS), 5)
    expected, _ = ExactIndex(TARGETS, USERS).search(Queries.dense(TARGETS), 5)
    assert (ids == expected).mean() > 0.85
    open_published(tmp_path / "index", "index", verify=True)  # searching has changed nothing


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"nprobe": 4}, "--nprobe means nothing to an index of kind exact: leave it out, or pass --kind ivf"),
        ({"kind": "ivf", "ef": 4}, "--ef means nothing to an index of kind ivf"),
        ({"kind": "ivf", "nlist": 0}, "--nlist 0: give a positive number"),
        ({"kind": "hnsw", "recall": 1.5}, "--recall 1.5: give a share"),
        ({"kind": "hnsw", "recall": 0.9, "ef": 100}, "--ef decides the recall"),
        ({"kind": "clusters", "nlist": 4}, "--nlist means nothing to an index of kind clusters"),
        ({"kind": "clusters", "copies": 0}, "--copies 0: give a positive number"),
        ({"kind": "clusters", "copies": 3}, "--copies 3: a user lies in 1 list or in 2"),
        ({"kind": "clusters", "nprobe": 2, "recall": 0.9}, "--nprobe decides the recall"),
        ({"kind": "ivf", "copies": 2}, "--copies means nothing to an index of kind ivf: .* --kind clusters"),
        ({"kind": "milvus", "m": 8}, "--m means nothing to an index of kind milvus"),
        ({"kind": "milvus", "uri": "ftp://x"}, "Milvus at ftp://x"),
    ],
)
def test_mistakes_are_told_and_nothing_is_published(
    parameters: dict[str, Any], message: str, embeddings: str, tmp_path: Path
) -> None:
    with pytest.raises(FriendrecError, match=message):
        index.main(IndexOptions(embeddings=embeddings, out=str(tmp_path / "index"), **parameters))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("kind", ["exact", "clusters"])
def test_vectors_that_are_not_finite_are_refused(kind: Any, tmp_path: Path) -> None:
    with publish(tmp_path / "embeddings", kind="embeddings", options=None, inputs={}) as attempt:
        write_part(attempt / "part-0.parquet", USERS[:2], TARGETS[:2], TARGETS[:2] * np.nan, "float32")
        write_centroids(attempt, Centroids(TARGETS[:6], 2))
    with pytest.raises(FriendrecError, match="not finite"):
        index.main(IndexOptions(embeddings=str(tmp_path / "embeddings"), kind=kind, out=str(tmp_path / "index")))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("centroids", "message"),
    [
        (None, "holds no clusters, for its run was trained without: train with --clusters residual"),
        (Centroids(TARGETS[:6, :3], 2), "holds vectors of 4 dimensions and centroids of 3: export again"),
    ],
)
def test_clusters_that_are_not_there_or_do_not_fit(centroids: Centroids | None, message: str, tmp_path: Path) -> None:
    with publish(tmp_path / "embeddings", kind="embeddings", options=None, inputs={}) as attempt:
        write_part(attempt / "part-0.parquet", USERS, TARGETS, TARGETS, "float32")
        if centroids is not None:
            write_centroids(attempt, centroids)
    with pytest.raises(FriendrecError, match=message):
        index.main(IndexOptions(embeddings=str(tmp_path / "embeddings"), kind="clusters", out=str(tmp_path / "index")))


def test_something_else_than_embeddings_is_refused(tmp_path: Path) -> None:
    with publish(tmp_path / "run", kind="run", options=None, inputs={}) as attempt:
        (attempt / "config.json").write_text("{}")
    with pytest.raises(FriendrecError, match="is a run, expected embeddings"):
        index.main(IndexOptions(embeddings=str(tmp_path / "run"), out=str(tmp_path / "index")))


def test_an_index_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"kind": "later"}')
    with pytest.raises(FriendrecError, match="kind later, which this version does not know"):
        load_index(tmp_path)
