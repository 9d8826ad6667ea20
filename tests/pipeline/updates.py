"""Updates of a small index of clusters for tests: what it was before, what is to change, what it is after."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from friendrec.pipeline import index
from friendrec.pipeline.embeddings import write_centroids, write_part
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.publish import publish
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.segments import restored
from friendrec.pipeline.retrieval.store import open_index
from friendrec.pipeline.update import UpdateOptions

DIM = 3
CENTROIDS = Centroids(np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 2], [-2, 0, 0], [2, 2, 2]], np.float32), 2)
Vectors = Mapping[Any, list[int]]


def publish_embeddings(out: Path, vectors: Vectors, centroids: Centroids | None = CENTROIDS) -> str:
    """Target vectors of users by raw id, in two parts."""
    users = np.array(list(vectors), object if any(isinstance(user, str) for user in vectors) else np.int64)
    targets = np.array(list(vectors.values()), np.float32).reshape(len(users), -1 if vectors else DIM)
    with publish(out, kind="embeddings", options=None, inputs={}) as attempt:
        for part, rows in enumerate(np.array_split(np.arange(len(users)), 2)):
            write_part(attempt / f"part-{part}.parquet", users[rows], -targets[rows], targets[rows], "float32")
        if centroids is not None:
            write_centroids(attempt, centroids)
    return str(out)


def users_file(path: Path, users: list[Any]) -> str:
    pq.write_table(pa.table({"user_id": users}), path)
    return str(path)


def contents(directory: Path) -> dict[Any, list[float]]:
    """The vector of each live user by raw id, read from the rows; both rows of a user must say the same."""
    opened = open_index(directory)
    found: dict[Any, list[float]] = {}
    for segment in opened.segments:
        vectors = restored(segment.rows, segment.scale)
        for row in range(len(segment.ids)):
            if not (len(segment.dead) and segment.dead[row]):
                user = opened.user_ids[segment.ids[row]]
                assert found.setdefault(user, vectors[row].tolist()) == vectors[row].tolist()
    return found


BEFORE: Vectors = {user: [user % 3, user % 2, -(user % 4)] for user in range(10, 22)}
CHANGES: Vectors = {12: [2, 2, 1], 13: BEFORE[13], 30: [1, 1, 1], 14: [0, 2, 0], 31: [2, 0, 1]}
LEAVING = [14, 15, 31, 99]
AFTER: Vectors = {u: v for u, v in BEFORE.items() if u not in LEAVING} | {12: [2, 2, 1], 30: [1, 1, 1]}


def build(place: Path) -> Path:
    """An index of `BEFORE`."""
    embeddings = publish_embeddings(place / "embeddings", BEFORE)
    index.main(IndexOptions(embeddings=embeddings, kind="clusters", copies=2, out=str(place / "index")))
    return place / "index"


def options_of(built: Path) -> UpdateOptions:
    """Changes and leaving users of `built`."""
    place = built.parent
    embeddings = place / "changes"
    if not embeddings.exists():
        publish_embeddings(embeddings, CHANGES)
        users_file(place / "leaving.parquet", LEAVING)
    return UpdateOptions(index=str(built), embeddings=str(embeddings), delete=str(place / "leaving.parquet"))
