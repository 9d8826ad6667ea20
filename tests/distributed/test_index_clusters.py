"""An index of clusters built by several ranks: the same files, byte for byte, as by one."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline import build_clusters, embedding_parts, index
from friendrec.pipeline.embeddings import to_table, write_centroids
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.publish import open_published, publish
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.segments import build_segment
from friendrec.pipeline.retrieval.store import open_index

from .harness import Workers

RNG = np.random.default_rng(0)
TARGETS = RNG.standard_normal((211, 5)).astype(np.float32)
CENTROIDS = Centroids(RNG.standard_normal((12, 5)).astype(np.float32), 3)


def publish_embeddings(out: Path, text: bool, targets: np.ndarray = TARGETS) -> str:
    """Three parts of row groups that end elsewhere than the shares of ranks and the blocks that are read."""
    users = np.array([f"user{n}" for n in range(211)], object) if text else np.arange(211) * 7
    with publish(out, kind="embeddings", options=None, inputs={}) as attempt:
        for part, rows in enumerate(np.split(np.arange(211), [60, 61])):
            table = to_table(users[rows], -targets[rows], targets[rows], "float32")
            pq.write_table(table, attempt / f"part-{part}.parquet", row_group_size=37)
        write_centroids(attempt, CENTROIDS)
    return str(out)


def call_index(options: dict[str, Any]) -> str:
    """What stopped it, or nothing."""
    joined = patch.object(build_clusters, "process_group", nullcontext)
    small = patch.object(embedding_parts, "BLOCK", 16)
    with joined, small:
        try:
            index.main(IndexOptions(kind="clusters", **options))
        except FriendrecError as error:
            return str(error)
    return ""


def files(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in open_published(directory, "index", verify=True)[1].files}


@pytest.mark.parametrize(
    ("ranks", "options", "text"),
    [
        (2, {"copies": 2, "dtype": "int8", "nprobe": 3}, False),
        (3, {"copies": 1, "dtype": "float16", "nprobe": 99}, True),
        pytest.param(2, {"recall": 0.9}, False, marks=pytest.mark.long),
    ],
)
def test_ranks_build_what_one_would(
    workers: Workers, tmp_path: Path, ranks: int, options: dict[str, Any], text: bool
) -> None:
    words = {"embeddings": publish_embeddings(tmp_path / "embeddings", text), **options}
    for world in (1, ranks):
        said = workers.run(world, call_index, words | {"out": str(tmp_path / str(world))})
        assert said == [""] * world
    alone, together = files(tmp_path / "1"), files(tmp_path / str(ranks))
    assert alone.keys() == together.keys()
    assert [name for name in alone if alone[name] != together[name]] == []
    assert {"segments/0000/rows.npy", "meta.json", "centroids.npz"} <= alone.keys()


def test_the_files_are_what_a_segment_in_memory_is(workers: Workers, tmp_path: Path) -> None:
    words = {
        "embeddings": publish_embeddings(tmp_path / "embeddings", False),
        "copies": 2,
        "dtype": "int8",
        "nprobe": 1,
    }
    assert workers.run(2, call_index, words | {"out": str(tmp_path / "index")}) == ["", ""]
    (built,) = open_index(tmp_path / "index").segments
    distances = ((TARGETS[:, None] - CENTROIDS.vectors) ** 2).sum(axis=2)
    assigned = np.argsort(distances, axis=1)[:, :2].astype(np.int32)
    expected = build_segment(TARGETS, np.arange(211, dtype=np.int32), assigned, 12, "int8")
    for name in ("offsets", "ids", "primary", "rows", "scale"):
        assert np.array_equal(getattr(built, name), getattr(expected, name)), name


def test_all_ranks_hear_of_a_vector_that_is_not_finite(workers: Workers, tmp_path: Path) -> None:
    broken = TARGETS.copy()
    broken[200] = np.nan  # of the last rank
    words = {"embeddings": publish_embeddings(tmp_path / "embeddings", False, broken), "out": str(tmp_path / "index")}
    for said in workers.run(2, call_index, words):
        assert "holds vectors that are not finite: train and export again" in said
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings"]


def test_more_ranks_than_users(workers: Workers, tmp_path: Path) -> None:
    with publish(tmp_path / "embeddings", kind="embeddings", options=None, inputs={}) as attempt:
        table = to_table(np.array([5, 6]), TARGETS[:2], TARGETS[:2], "float32")
        pq.write_table(table, attempt / "part-0.parquet")
        write_centroids(attempt, CENTROIDS)
    words = {"embeddings": str(tmp_path / "embeddings"), "out": str(tmp_path / "index"), "copies": 1, "nprobe": 1}
    assert workers.run(3, call_index, words) == ["", "", ""]
    opened = open_index(tmp_path / "index")
    assert opened.user_ids.tolist() == [5, 6] and sorted(opened.segments[0].ids.tolist()) == [0, 1]
