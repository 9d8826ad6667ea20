"""What an update changes of an index of clusters: worked out before anything is written."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from friendrec.errors import FriendrecError
from friendrec.pipeline.embedding_parts import EmbeddingParts
from friendrec.pipeline.embeddings import read_centroids
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.retrieval.segments import check_ids, stored
from friendrec.pipeline.retrieval.store import Snapshot

Users: TypeAlias = pa.Array | pa.ChunkedArray
"""Raw ids."""


@dataclass(frozen=True)
class Revision:
    """Changes of an index of N places."""

    ids: NDArray[np.int32]
    """[M] whose vectors are written, each once: N and above are new."""
    vectors: NDArray[np.float32]  # [M, D]
    new_users: Users
    """Raw ids of the places N and above."""
    dying: NDArray[np.bool_]  # [N] whose rows so far are dead
    returned: int
    """Users written who had been deleted."""
    stay_deleted: int
    """Users whom the embeddings name, and who are not brought back."""
    unchanged: int
    """Users whose vectors are what the index has."""
    deleted: int
    unknown: int
    """Users to be deleted who are not there."""

    @property
    def appended(self) -> int:
        return len(self.new_users)

    @property
    def replaced(self) -> int:
        return len(self.ids) - self.appended - self.returned

    @property
    def changes(self) -> dict[str, int]:
        """Counts that are not zero."""
        counts = {name: getattr(self, name) for name in ("appended", "replaced", "returned", "deleted")}
        return {name: count for name, count in counts.items() if count}


def revise(opened: Snapshot, embeddings: str | None, leaving: Users | None, restore: bool = False) -> Revision:
    """What embeddings, a directory or URL, and users who leave change.

    Embeddings neither add who leaves nor, but to `restore` them, who has left.
    """
    known, live = pa.array(opened.user_ids), live_users(opened)
    places = _places(leaving, known, "--delete") if leaving is not None else np.empty(0, np.int64)
    dying = np.zeros(len(live), np.bool_)
    dying[places[places >= 0]] = True
    dying &= live
    deleted = int(dying.sum())
    ids, vectors, new_users = np.empty(0, np.int64), np.empty((0, opened.dimensions), np.float32), known[:0]
    unchanged = stay_deleted = 0
    if embeddings is not None:
        parts = _parts(embeddings, opened)
        raw = parts.user_ids()
        ids = _places(raw, known, embeddings)
        stays = np.ones(len(raw), np.bool_)
        if leaving is not None:
            stays = ~pc.is_in(raw.cast(known.type), value_set=leaving.cast(known.type)).to_numpy()
        if not restore:
            gone = stays & (ids >= 0) & ~live[ids]
            stay_deleted = int(gone.sum())
            stays &= ~gone
        new = (ids < 0) & stays
        ids[new] = len(known) + np.arange(new.sum())
        new_users = raw.filter(pa.array(new)).cast(known.type)
        vectors, written = _changed(parts, opened, np.where(stays, ids, -1))
        unchanged = int(stays.sum() - len(written))
        ids = ids[written]
    replaced = ids[ids < len(known)]
    returned = int((~live[replaced]).sum())
    dying[replaced] = live[replaced]
    unknown = len(places) - deleted
    return Revision(
        ids.astype(np.int32), vectors, new_users, dying, returned, stay_deleted, unchanged, deleted, unknown
    )


def live_users(opened: Snapshot) -> NDArray[np.bool_]:
    """Who has a row, `[N]`; raises FriendrecError where a row is of nobody."""
    live = np.zeros(len(opened.user_ids), np.bool_)
    for segment in opened.segments:
        check_ids(segment, len(live))
        live[segment.ids[~segment.dead] if len(segment.dead) else segment.ids] = True
    return live


def dying_rows(opened: Snapshot, dying: NDArray[np.bool_]) -> dict[int, NDArray[np.int64]]:
    """Rows of the users `[N]` that are not dead yet, by the number of their segment."""
    found = {}
    for number, segment in zip(opened.numbers, opened.segments, strict=True):
        rows = dying[segment.ids]
        if len(segment.dead):
            rows &= ~segment.dead
        if rows.any():
            found[number] = np.flatnonzero(rows)
    return found


def _parts(embeddings: str, opened: Snapshot) -> EmbeddingParts:
    """Checked to be of the run that the index is of, as far as can be told."""
    directory, _ = open_published(embeddings, "embeddings")
    parts, centroids = EmbeddingParts.of(directory), read_centroids(directory)
    if parts.dimensions != opened.dimensions:
        raise FriendrecError(
            f"{embeddings} holds vectors of {parts.dimensions} dimensions, the index of {opened.dimensions}: "
            "export the run that the index was made of"
        )
    if centroids is not None and not np.array_equal(centroids.vectors, opened.centroids.vectors):
        raise FriendrecError(
            f"{embeddings} was exported from another run than the index was made of: export that, or index again"
        )
    return parts


def _places(users: Users, known: pa.Array, source: str) -> NDArray[np.int64]:
    """Where the index has each user; -1 where it has none.

    Ids of another type are refused even where they could be cast: "12" and "012" would be one user.
    """
    if not len(users):  # of no type, where a file was made of an empty list
        return np.empty(0, np.int64)
    try:
        if not _comparable(users.type, known.type):
            raise pa.ArrowTypeError
        wanted = users.cast(known.type)
    except pa.ArrowException:
        raise FriendrecError(f"{source} names users as {users.type}, the index as {known.type}: give its ids") from None
    places: NDArray[np.int64] = pc.index_in(wanted, value_set=known).fill_null(-1).to_numpy().astype(np.int64)
    return places


def _comparable(given: pa.DataType, known: pa.DataType) -> bool:
    """Whether both are whole numbers, or both strings."""
    given = given.value_type if pa.types.is_dictionary(given) else given
    if pa.types.is_integer(known):
        return bool(pa.types.is_integer(given))
    return bool(pa.types.is_string(given) or pa.types.is_large_string(given))


def _changed(
    parts: EmbeddingParts, opened: Snapshot, ids: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Vectors that differ from what is stored, and whose they are, as rows of the parts; ids -1 are left out."""
    found, written = [np.empty((0, parts.dimensions), np.float32)], [np.empty(0, np.int64)]
    current = _Current.of(opened)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("users", total=len(parts))
        for first, vectors in parts.blocks("target", 0, len(parts)):
            mine = ids[first : first + len(vectors)]
            changed = (mine >= 0) & ~current.holds(mine, vectors)
            found.append(vectors[changed])
            written.append(first + np.flatnonzero(changed))
            bar.advance(task, len(vectors))
    return np.concatenate(found), np.concatenate(written)


@dataclass(frozen=True)
class _Current:
    """Where the live rows of users are."""

    opened: Snapshot
    segment_of: NDArray[np.int32]  # [N], -1 of who has none
    row_of: NDArray[np.int64]  # [N]

    @classmethod
    def of(cls, opened: Snapshot) -> "_Current":
        segment_of = np.full(len(opened.user_ids), -1, np.int32)
        row_of = np.zeros(len(opened.user_ids), np.int64)
        for s, segment in enumerate(opened.segments):
            rows = np.flatnonzero(~segment.dead) if len(segment.dead) else np.arange(len(segment.ids))
            segment_of[segment.ids[rows]], row_of[segment.ids[rows]] = s, rows
        return cls(opened, segment_of, row_of)

    def holds(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Whether these users `[n]` (-1 and N or more: nobody) have exactly these vectors `[n, D]`."""
        rows, scale = stored(vectors, self.opened.meta["dtype"])
        known = (ids >= 0) & (ids < len(self.segment_of))
        where = np.where(known, self.segment_of[np.where(known, ids, 0)], -1)
        same = np.zeros(len(ids), np.bool_)
        for s, segment in enumerate(self.opened.segments):
            mine = np.flatnonzero(where == s)
            at = self.row_of[ids[mine]]
            same[mine] = (segment.rows[at] == rows[mine]).all(axis=1)
            if len(scale):
                same[mine] &= segment.scale[at] == scale[mine]
        return same
