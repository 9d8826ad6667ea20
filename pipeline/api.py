"""The Python API: a run, an index or prepared data, opened to be asked. What comes back is a pyarrow table.

`friendrec.open_run`, `friendrec.open_index` and `friendrec.open_data` import this module when they are called.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from friendrec.datasets.prepared import PreparedData, load_prepared
from friendrec.errors import FriendrecError
from friendrec.pipeline.config import RunConfig
from friendrec.pipeline.embeddings import to_table
from friendrec.pipeline.lineage import input_path
from friendrec.pipeline.publish import open_published, read_manifest
from friendrec.pipeline.recommend import recommendations, user_rows
from friendrec.pipeline.retrieval.kinds import VectorIndex, load_index
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.times import end_of_log, parse_time

if TYPE_CHECKING:
    from friendrec.pipeline.inference import Recommender

UserId = int | str
"""As in the log."""
Time = str | datetime | None
"""ISO 8601 or datetime, UTC where it names no zone; None is the end of the log."""


class Run:
    """A finished run with the data it was trained on, in this process."""

    def __init__(self, recommender: "Recommender") -> None:
        self._recommender = recommender

    @classmethod
    def open(cls, run: str | Path, data: str | Path | None = None, index: str | Path | None = None) -> "Run":
        """See `friendrec.open_run`."""
        from friendrec.pipeline.inference import open_recommender

        read_manifest(run, "run")
        return cls(open_recommender(run, data or input_path(str(run), "data"), index))

    @property
    def config(self) -> RunConfig:
        """What it was trained with."""
        return self._recommender.config

    @property
    def data(self) -> PreparedData:
        """What it was trained on."""
        return self._recommender.data

    def recommend(self, user_ids: Iterable[UserId], k: int = 10, as_of: Time = None) -> pa.Table:
        """The best k new friends of each user as of a time: `user_id`, `rank` (from 1), `candidate_id`, `score`.

        What `friendrec recommend` writes. Left out are the user, whom the user has contacted, and who is blocked either
        way; fewer than k come back where fewer are left. Raises FriendrecError for users whom the data does not know.
        """
        if k < 1:
            raise FriendrecError(f"k is {k}: ask for at least 1 recommendation")
        return recommendations(self._recommender, self._rows(user_ids), self._time(as_of), k)

    def embeddings(self, user_ids: Iterable[UserId], as_of: Time = None) -> pa.Table:
        """Vectors of users as of a time: `user_id`, and `query` and `target` as lists of float32.

        What `friendrec export` writes. score(u, v) = query(u) · target(v), plus the copy term, which is in no vector.
        Raises FriendrecError for users whom the train period does not know: they have no vector of their own; and for a
        run of preset stu, which has codes in place of vectors.
        """
        from friendrec.models.two_tower import TwoTower
        from friendrec.pipeline.inference import encode_targets

        model = self._recommender.model
        if not isinstance(model, TwoTower):
            raise FriendrecError(
                "a run of preset stu has codes of users and no vectors: open the run whose embeddings were tokenized"
            )
        rows = self._rows(user_ids)
        late = rows[rows >= self.data.num_train_users]
        if len(late):
            raise FriendrecError(
                f"{len(late)} users came after the train period, the first is {self.data.user_ids[late[0]]}: "
                "they have no vectors; leave them out, or prepare and train anew"
            )
        queries = self._recommender.queries(rows, np.full(len(rows), self._time(as_of)))
        targets = encode_targets(model, self._recommender.packer, rows)
        return to_table(self.data.user_ids[rows], queries.vector, targets, "float32")

    def _rows(self, user_ids: Iterable[UserId]) -> NDArray[np.int64]:
        kind = pa.array(self.data.user_ids[:1]).type
        try:
            wanted = pa.array(user_ids.tolist() if isinstance(user_ids, np.ndarray) else list(user_ids), kind)
        except (pa.ArrowException, TypeError) as error:
            raise FriendrecError(f"user_ids must be a list of {kind}, as in the log: {error}") from None
        if not len(wanted):
            raise FriendrecError("user_ids is empty: name at least one user")
        return user_rows(wanted, self.data, "user_ids")

    def _time(self, as_of: Time) -> int:
        if as_of is None:
            return end_of_log(self.data)
        return parse_time(as_of.isoformat() if isinstance(as_of, datetime) else as_of, "as_of")


class Index:
    """A retrieval index of vectors, of any kind, alone: it ranks by them, without copy term and exclusions."""

    def __init__(self, retriever: VectorIndex) -> None:
        self._retriever = retriever

    @classmethod
    def open(cls, index: str | Path) -> "Index":
        """See `friendrec.open_index`."""
        opened = load_index(open_published(index, "index")[0])
        if not isinstance(opened, VectorIndex):
            raise FriendrecError(f"{index} holds codes, which a run writes: pass it to open_run(RUN, index=INDEX)")
        return cls(opened)

    def __len__(self) -> int:
        """Candidates."""
        return len(self._retriever)

    @property
    def user_ids(self) -> Sequence[UserId]:
        """Its candidates, in the order of the vocabulary."""
        ids: list[UserId] = self._retriever.user_ids.tolist()
        return ids

    def search(self, vectors: ArrayLike, k: int = 10) -> pa.Table:
        """The best k candidates of each query vector `[Q, D]`: `query` (its row), `rank`, `candidate_id`, `score`."""
        if k < 1:
            raise FriendrecError(f"k is {k}: ask for at least 1 candidate")
        queries = np.asarray(vectors, np.float32)
        wanted = self._retriever.vectors_of(np.zeros(1, np.int64)).shape[1]
        if queries.ndim != 2 or queries.shape[1] != wanted:
            raise FriendrecError(f"vectors are of shape {queries.shape}: the index takes [queries, {wanted}]")
        ids, scores = self._retriever.search(Queries.dense(np.ascontiguousarray(queries)), k)
        query, place = np.nonzero(ids >= 0)
        found = {"query": query, "rank": (place + 1).astype(np.int32)}
        found |= {"candidate_id": self._retriever.user_ids[ids[query, place]], "score": scores[query, place]}
        return pa.table(found)


def open_data(data: str | Path) -> PreparedData:
    """See `friendrec.open_data`."""
    return load_prepared(open_published(data, "data")[0])
