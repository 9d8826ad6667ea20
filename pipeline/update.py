"""Change an index of clusters where it lies: new vectors, new users, deleted users, without building it again.

An update writes what it changes beside what is there, and takes effect whole and at once when it is done; whoever has
the index open goes on with what it was. Places of users stay: new ones come after all others, a deleted one is found
no more, and gets its own place back when restored. Done twice, an update changes nothing the second time.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from friendrec.errors import FriendrecError
from friendrec.pipeline.publish import fingerprint, open_published, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

    from friendrec.pipeline.manifest import Manifest
    from friendrec.pipeline.revision import Revision

EXAMPLES = """
friendrec update --index index --embeddings embeddings-of-today
friendrec update --index index --delete users-who-left.parquet
friendrec update --index index --embeddings embeddings-of-today --restore
friendrec update --index index --compact
"""


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    index: str
    """Local directory of an index of kind clusters, which `friendrec index` made."""
    embeddings: str | None = None
    """Directory or URL of embeddings, of all users or of some, made with the centroids of the index. Other vectors than
    it has replace its own, users whom it does not know are added. Who was deleted stays deleted, but with --restore."""
    delete: str | None = None
    """Parquet file with a column user_id: who is to be found no more, even if --embeddings names them. Their vectors
    stay on the disk until --compact."""
    restore: bool = False
    """Bring back who was deleted and is named by --embeddings, under the old id."""
    compact: bool = False
    """Write all rows but those replaced or deleted into one part, after everything else: for speed after many updates,
    and to remove what was deleted. It takes the disk of the index once more while it does so."""


def main(options: UpdateOptions) -> None:
    """Commit what changes, and say what it was."""
    if not (options.embeddings or options.delete or options.compact):
        raise FriendrecError("there is nothing to update: pass --embeddings, --delete or --compact")
    if options.restore and not options.embeddings:
        raise FriendrecError("--restore brings back users whom --embeddings names: pass --embeddings")
    directory = _local_index(options.index)
    from friendrec.pipeline.retrieval.store import writing

    with writing(directory) as manifest:
        if options.embeddings or options.delete:
            manifest = _revise(options, directory, manifest)
        if options.compact:
            _compact(options, directory, manifest)


def _local_index(index: str) -> "Path":
    from friendrec.pipeline.retrieval.files import read_meta

    if "://" in index and not index.startswith("file://"):
        raise FriendrecError(
            f"{index} is a URL, where an update could not take effect at once: "
            "update an index on a local disk, and copy it to a new URL"
        )
    if read_manifest(index, "index").options["kind"] != "clusters":
        raise FriendrecError(
            f"{index} is of a kind that has no updates: make it again, if need be with --kind clusters"
        )
    directory, _ = open_published(index, "index")
    read_meta(directory, "copies", "dtype")
    return directory


def _revise(options: UpdateOptions, directory: "Path", manifest: "Manifest") -> "Manifest":
    """Delete, replace and append; the manifest as it is then."""
    from friendrec.pipeline.retrieval.segments import build_segment
    from friendrec.pipeline.retrieval.store import commit, next_number, open_index, write_segment, write_user_ids
    from friendrec.pipeline.revision import dying_rows, live_users, revise

    opened = open_index(directory)
    leaving = _users_of(options.delete) if options.delete else None
    revision = revise(opened, options.embeddings, leaving, options.restore)
    said = _said(revision, options)
    if not revision.changes:
        print(f"{options.index}: nothing to change ({said})")
        return manifest
    number, lists = next_number(manifest), len(opened.centroids)
    assigned = opened.centroids.assign(revision.vectors, opened.meta["copies"])
    segment = build_segment(revision.vectors, revision.ids, assigned, lists, opened.meta["dtype"])
    write_segment(directory, number, segment, dying_rows(opened, revision.dying))
    if revision.appended:
        write_user_ids(directory, number, revision.new_users)
    candidates = len(opened.user_ids) + revision.appended
    gone = len(opened.user_ids) - int(live_users(opened).sum()) + revision.deleted - revision.returned
    inputs = {name: path for name in ("embeddings", "delete") if (path := getattr(options, name))}
    changed = _extra(manifest, inputs, revision.changes) | {"candidates": candidates, "deleted": gone}
    committed = commit(directory, manifest, number, changed)
    print(f"{options.index}: {candidates - gone:,} users ({said})")
    return committed


def _compact(options: UpdateOptions, directory: "Path", manifest: "Manifest") -> None:
    """One segment in place of all."""
    from friendrec.pipeline.retrieval.store import (
        commit,
        merge_segments,
        next_number,
        numbers_of,
        open_index,
        remove_orphans,
        write_user_ids,
    )

    if len(numbers_of(manifest.files)) == 1:
        print(f"{options.index}: compact already")
        return
    opened, number = open_index(directory), next_number(manifest)
    merge_segments(directory, number, opened)
    write_user_ids(directory, number, opened.user_ids)
    changed = commit(directory, manifest, number, _extra(manifest, {}, {"compacted": len(opened.numbers)}), alone=True)
    remove_orphans(directory, changed)
    print(f"{options.index}: {len(opened.numbers)} parts are one")


def _extra(manifest: "Manifest", inputs: dict[str, str], changes: dict[str, int]) -> dict[str, Any]:
    """What the manifest tells of all updates, with this one."""
    from datetime import UTC, datetime

    from friendrec.pipeline.manifest import absolute, command

    made_from = {name: {"path": absolute(path), "fingerprint": fingerprint(path)} for name, path in inputs.items()}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    update = {"created": created, "command": command(), "inputs": made_from, **changes}
    return {"updates": [*manifest.extra.get("updates", []), update]}


def _said(revision: "Revision", options: UpdateOptions) -> str:
    words = []
    if options.embeddings:
        words += [
            f"{revision.appended:,} added",
            f"{revision.replaced:,} replaced",
            f"{revision.unchanged:,} unchanged",
        ]
        words += [f"{revision.returned:,} returned"] if revision.returned else []
        if revision.stay_deleted:
            words.append(f"{revision.stay_deleted:,} stay deleted: pass --restore to bring them back")
    if options.delete:
        words += [f"{revision.deleted:,} deleted", f"{revision.unknown:,} to delete were not there"]
    return ", ".join(words)


def _users_of(file: str) -> "pa.ChunkedArray":
    """Raw ids, each once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file, columns=["user_id"])["user_id"].drop_null().unique()
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise FriendrecError(f"--delete {file}: {reason}; give a Parquet file with a column user_id") from None
