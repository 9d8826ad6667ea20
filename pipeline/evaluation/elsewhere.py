"""Vectors and lists that other programs made, from Parquet: scored frozen, as what was known when training ended.

Users go by raw id. Whoever the prepared data does not know is counted and left out; a candidate without a vector ranks
behind everybody with one, an actor without one asks for nobody in particular, and an actor without a list finds nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError
from friendrec.pipeline.embeddings import vectors_of
from friendrec.pipeline.evaluation.tasks import LEVELS, Events, Exclusions
from friendrec.pipeline.given import parquet_files, rows_of_ids
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.times import format_time

LACKING = np.float32(-1e30)
"""The score of a candidate without a vector: lower than any product of vectors, and tied with the others like it."""
SHORTEST_LIST = 10


@dataclass(frozen=True)
class Vectors:
    """A recommender whose queries never change: those of the vectors of every user."""

    query: NDArray[np.float32]  # [U, D + 1], the last 1
    retriever: ExactIndex  # [N, D + 1], the last 0, or LACKING after a vector of 0

    def queries(self, actors: NDArray[np.int64], as_of: NDArray[np.int64]) -> Queries:
        return Queries.dense(self.query[actors])


@dataclass(frozen=True)
class Lists:
    """Candidates of every user, best first: row u is `candidate[offsets[u]:offsets[u + 1]]`, distinct."""

    offsets: NDArray[np.int64]  # [U + 1]
    candidate: NDArray[np.int64]
    length: int
    """Of the longest list, as given."""


def read_vectors(path: str, data: PreparedData) -> tuple[Vectors, dict[str, int]]:
    """The columns user_id, query and target, and how many users were given, unknown, or lacking."""
    table = _read(path, "embeddings", ("user_id", "query", "target"), data)
    rows = rows_of_ids(table["user_id"], data, path)
    unknown, rows = rows < 0, rows[rows >= 0]
    if len(np.unique(rows)) < len(rows):
        raise FriendrecError(f"--embeddings {path}: a user has two vectors; leave one row a user_id")
    vectors = {}
    for which in ("query", "target"):
        if not _is_of_one_length(table[which]):
            raise FriendrecError(f"--embeddings {path}, column {which}: give lists of numbers, all of one length")
        given = vectors_of(table, which)[~unknown]
        if not np.isfinite(given).all():
            raise FriendrecError(f"--embeddings {path}, column {which} has values that are not finite")
        vectors[which] = np.zeros((data.num_users, given.shape[1] + 1), np.float32)
        vectors[which][rows, :-1] = given
    if vectors["query"].shape != vectors["target"].shape:
        raise FriendrecError(f"--embeddings {path}: query and target differ in length, and have no inner product")
    lacking = np.ones(data.num_users, bool)
    lacking[rows] = False
    vectors["query"][:, -1], vectors["target"][lacking, -1] = 1, LACKING
    candidates = data.num_train_users
    counts = {
        "dimensions": vectors["query"].shape[1] - 1,
        "users": len(table),
        "unknown_users": int(unknown.sum()),
        "candidates_without_vector": int(lacking[:candidates].sum()),
    }
    index = ExactIndex(vectors["target"][:candidates], data.user_ids[:candidates])
    return Vectors(vectors["query"], index), counts


def read_lists(path: str, data: PreparedData) -> tuple[Lists, dict[str, int]]:
    """The columns user_id, rank and candidate_id, and how many rows were given, of unknown users, or no candidates."""
    table = _read(path, "recommendations", ("user_id", "rank", "candidate_id"), data)
    user, candidate = (rows_of_ids(table[column], data, path) for column in ("user_id", "candidate_id"))
    unknown, user = user < 0, user[user >= 0]
    given, place = np.unique(table["user_id"].to_numpy(), return_inverse=True)
    length = int(np.bincount(place).max(initial=0))
    if length < SHORTEST_LIST:
        raise FriendrecError(f"--recommendations {path}: no list has {SHORTEST_LIST} candidates; make longer ones")
    candidate, rank = candidate[~unknown], table["rank"].to_numpy()[~unknown]
    stays = (candidate >= 0) & (candidate < data.num_train_users)
    order = np.flatnonzero(stays)[np.lexsort((rank[stays], user[stays]))]
    keys = user[order] * data.num_users + candidate[order]
    order = order[np.sort(np.unique(keys, return_index=True)[1])]  # a candidate counts at its best place
    offsets = np.searchsorted(user[order], np.arange(data.num_users + 1))
    counts = {
        "length": length,
        "users": len(given),
        "unknown_users": len(np.unique(place[unknown])),
        "rows": len(table),
        "rows_of_no_candidate": int((~stays).sum()),
    }
    return Lists(offsets, candidate[order], length), counts


def list_ranks(events: Events, exclusions: Exclusions, lists: Lists) -> NDArray[np.float64]:
    """Place of each target on its actor's list at each level of exclusion, `[LEVELS, E]`.

    Whom a level hides is passed over. Infinite where the target is not on the list, nan where no task asks.
    """
    ranks = np.full((LEVELS, len(events.index)), np.nan)
    for level in range(LEVELS):
        at = np.flatnonzero(events.at_level(level))
        hidden = exclusions.at(level, events.actor[at], events.timestamp[at])
        ranks[level, at] = _places(
            lists.offsets, lists.candidate, events.actor[at], events.target[at], *hidden, exclusions.num_candidates
        )
    return ranks


@numba.njit(cache=True, nogil=True)
def _places(offsets, candidate, actors, targets, hidden_offsets, hidden, num_candidates):  # type: ignore[no-untyped-def]
    ranks = np.full(len(actors), np.inf)
    hidden_in = np.full(num_candidates, -1)  # the last query that hides each candidate
    for q in range(len(actors)):
        hidden_in[hidden[hidden_offsets[q] : hidden_offsets[q + 1]]] = q
        place = 1
        for v in candidate[offsets[actors[q]] : offsets[actors[q] + 1]]:
            if v == targets[q]:
                ranks[q] = place
                break
            place += hidden_in[v] != q
    return ranks


def _read(path: str, kind: str, columns: Sequence[str], data: PreparedData) -> pa.Table:
    """Columns of a published directory, of a folder of Parquet files, or of one file.

    What friendrec made says as of when, and must not know of what it is asked about.
    """
    files, manifest = parquet_files(path, kind, f"--{kind} {path}")
    if manifest is not None and manifest.extra.get("as_of", data.train_until) > data.train_until:
        until = format_time(data.train_until)
        raise FriendrecError(
            f"--{kind} {path} knows events until {format_time(manifest.extra['as_of'])}, "
            f"and so what it would be asked: make it again with --as-of {until}"
        )
    try:
        table = pa.concat_tables([pq.read_table(file) for file in files]).combine_chunks()
        table.select(columns)
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise FriendrecError(f"--{kind} {path}: {reason}; give Parquet with {', '.join(columns)}") from None
    return table


def _is_of_one_length(column: pa.ChunkedArray) -> bool:
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    return pa.types.is_fixed_size_list(column.type) or (is_list and len(pc.unique(pc.list_value_length(column))) == 1)
