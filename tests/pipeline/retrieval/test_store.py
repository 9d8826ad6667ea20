"""An index of clusters on disk: what the manifest names is the index, and nothing else."""

import errno
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline.manifest import Manifest
from friendrec.pipeline.publish import open_published, publish
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.clusters import ClusterIndex
from friendrec.pipeline.retrieval.files import UserIds
from friendrec.pipeline.retrieval.kinds import load_index
from friendrec.pipeline.retrieval.segments import Dtype, Segment, build_segment
from friendrec.pipeline.retrieval.store import (
    LOCK,
    Snapshot,
    commit,
    merge_segments,
    next_number,
    open_index,
    remove_orphans,
    save_index,
    write_segment,
    write_user_ids,
    writing,
)
from friendrec.pipeline.revision import live_users

from .contract import make_queries

CENTROIDS = Centroids(np.array([[0, 0, 0], [4, 4, 4]], np.float32), 1)
VECTORS = np.random.default_rng(0).uniform(0, 4, (8, 3)).astype(np.float32)
NUMBERS: UserIds = np.arange(100, 108)
NAMES: UserIds = np.array([f"user{n}" for n in range(8)], object)
PARAMETERS = {"dtype": "float32", "copies": 2, "nprobe": 1, "recall": None}


def segment_of(ids: list[int], vectors: np.ndarray, dtype: Dtype = "float32") -> Segment:
    return build_segment(vectors, np.array(ids, np.int32), CENTROIDS.assign(vectors, 2), 2, dtype)


def make(out: Path, user_ids: UserIds = NUMBERS, dtype: Dtype = "float32") -> Path:
    with publish(out, kind="index", options={"kind": "clusters"}, inputs={}) as attempt:
        segment = segment_of(list(range(8)), VECTORS, dtype)
        save_index(attempt, CENTROIDS, [segment], user_ids, **PARAMETERS | {"dtype": dtype})
    return out


def replace_two(index: Path, user_ids: UserIds = NUMBERS) -> Manifest:
    """Users 1 and 2 get new vectors, and a ninth comes."""
    with writing(index) as manifest:
        opened, number = open_index(index), next_number(manifest)
        dead = np.flatnonzero(np.isin(opened.segments[0].ids, [1, 2]))
        write_segment(index, number, segment_of([1, 2, 8], VECTORS[:3] + 1), {0: dead})
        write_user_ids(index, number, np.array([user_ids[0] + user_ids[-1]], user_ids.dtype))
        return commit(index, manifest, number, {"candidates": 9})


def live_rows(opened: Snapshot) -> dict[int, list[float]]:
    """The vector of each user, of whom every live row must be the same."""
    found: dict[int, list[float]] = {}
    for segment in opened.segments:
        for row, user in enumerate(segment.ids.tolist()):
            if not (len(segment.dead) and segment.dead[row]):
                assert found.setdefault(user, segment.rows[row].tolist()) == segment.rows[row].tolist()
    return found


REPLACED = {n: VECTORS[n].tolist() for n in range(8)} | {
    n: (VECTORS[m] + 1).tolist() for m, n in enumerate([1, 2, 8])
}  # fmt: skip


@pytest.mark.parametrize("user_ids", [NUMBERS, NAMES], ids=["int", "text"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_what_was_saved_is_opened_without_being_read(user_ids: UserIds, dtype: Dtype, tmp_path: Path) -> None:
    opened = open_index(make(tmp_path / "index", user_ids, dtype))
    (segment,) = opened.segments
    expected = segment_of(list(range(8)), VECTORS, dtype)
    for name in ("offsets", "ids", "primary", "rows", "scale"):
        array = getattr(segment, name)
        assert array.dtype == getattr(expected, name).dtype and np.array_equal(array, getattr(expected, name))
    assert isinstance(segment.rows, np.memmap) and not segment.rows.flags.writeable
    assert opened.user_ids.tolist() == user_ids.tolist() and opened.user_ids.dtype == user_ids.dtype
    assert np.array_equal(opened.centroids.vectors, CENTROIDS.vectors) and opened.centroids.cells == 1
    assert opened.meta.items() >= {"candidates": 8, "dimensions": 3, "lists": 2, "copies": 2, "dtype": dtype}.items()


@pytest.mark.parametrize("user_ids", [NUMBERS, NAMES], ids=["int", "text"])
def test_a_commit_adds_rows_and_users_and_marks_the_dead(user_ids: UserIds, tmp_path: Path) -> None:
    index = make(tmp_path / "index", user_ids)
    manifest = replace_two(index, user_ids)
    opened = open_index(index)
    assert live_rows(opened) == REPLACED
    assert opened.numbers == [0, 1]
    assert opened.user_ids.tolist() == [*user_ids.tolist(), user_ids[0] + user_ids[-1]]
    assert open_published(index, "index", verify=True)[1] == manifest
    assert manifest.extra == {"candidates": 9}


def test_who_has_it_open_sees_no_later_commit(tmp_path: Path) -> None:
    index = make(tmp_path / "index")
    before = open_index(index)
    replace_two(index)
    after = open_index(index)
    with writing(index) as manifest:
        merge_segments(index, 2, after)
        write_user_ids(index, 2, after.user_ids)
        remove_orphans(index, commit(index, manifest, 2, {}, alone=True))
    assert sorted(path.name for path in (index / "segments").iterdir()) == ["0002"]
    assert live_rows(before) == {n: VECTORS[n].tolist() for n in range(8)}
    assert live_rows(after) == live_rows(open_index(index)) == REPLACED


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_merged_segments_are_what_one_build_would_write(dtype: Dtype, tmp_path: Path) -> None:
    index = make(tmp_path / "index", dtype=dtype)
    with writing(index) as manifest:
        dead = np.flatnonzero(np.isin(open_index(index).segments[0].ids, [0, 5]))
        write_segment(index, 1, segment_of([5], VECTORS[:1], dtype), {0: dead})
        commit(index, manifest, 1, {})
    merge_segments(index, 2, open_index(index))
    kept = [1, 2, 3, 4, 5, 6, 7]
    expected = segment_of(kept, VECTORS[[1, 2, 3, 4, 0, 6, 7]], dtype)
    for name in ("offsets", "ids", "primary", "rows", "scale"):
        merged = np.load(index / "segments" / "0002" / f"{name}.npy")
        assert merged.dtype == getattr(expected, name).dtype and np.array_equal(merged, getattr(expected, name))


def test_what_the_manifest_does_not_name_is_ignored_and_then_removed(tmp_path: Path) -> None:
    index = make(tmp_path / "index")
    write_segment(index, 1, segment_of([0], VECTORS[:1] + 9), {0: np.array([0])})
    (index / "manifest.json.unfinished").write_text("{")
    assert live_rows(open_index(index)) == {n: VECTORS[n].tolist() for n in range(8)}
    replace_two(index)
    assert live_rows(open_index(index)) == REPLACED
    assert not (index / "manifest.json.unfinished").exists()


def test_the_second_of_two_writers_stops(tmp_path: Path) -> None:
    index = make(tmp_path / "index")
    with writing(index), pytest.raises(FriendrecError, match="is being updated by another process"), writing(index):
        pass
    with writing(index):  # it was given back
        assert (index / LOCK).exists()


DAMAGED = ["ids", "offsets", "primary", "rows", "user_ids"]


@pytest.mark.parametrize("name", [f"segments/0000/{name}.npy" for name in DAMAGED] + ["centroids.npz", "meta.json"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_damaged_files_are_refused(name: str, harm: str, tmp_path: Path) -> None:
    index = make(tmp_path / "index")
    path = index / name
    content = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(content[:-8])
    with pytest.raises(FriendrecError, match=r"is a damaged index .*: make it again"):
        open_index(index)
    with pytest.raises(FriendrecError, match=r"is damaged|lacks"):
        open_published(index, "index")


def test_files_of_different_indices_are_refused(tmp_path: Path) -> None:
    index = make(tmp_path / "index")
    np.save(index / "segments" / "0000" / "primary.npy", np.zeros(3, np.int32))
    with pytest.raises(FriendrecError, match=r"primary.npy is of shape \(3,\), not \(16,\)"):
        open_index(index)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("offsets", np.array([0, 17, 16]), "offsets.npy does not ascend from 0 to 16"),
        ("offsets", np.array([0, -1, 16]), "offsets.npy does not ascend from 0 to 16"),
        ("offsets", np.array([0.0, 8.0, 16.0]), "offsets.npy is of float64, not int64"),
        ("ids", np.zeros(16, np.int64), "ids.npy is of int64, not int32"),
        ("rows", np.zeros((16, 3)), "rows.npy is of float64, not float32 or float16 or int8"),
        ("dead-0000", np.array([-1]), "marks rows before the first as dead"),
        ("dead-0000", np.array([16]), "out of bounds"),
    ],
)
def test_files_that_are_no_index_are_refused(name: str, values: np.ndarray, said: str, tmp_path: Path) -> None:
    index = make(tmp_path / "index")
    (index / "manifest.json").unlink()
    np.save(index / "segments" / "0000" / f"{name}.npy", values)
    with pytest.raises(FriendrecError, match=rf"is a damaged index .*{said}.*: make it again"):
        open_index(index)


@pytest.mark.parametrize(("name", "value"), [("ids", 8), ("ids", -1), ("primary", 2), ("primary", -1)])
def test_rows_of_nobody_are_refused_when_they_are_read(name: str, value: int, tmp_path: Path) -> None:
    index = make(tmp_path / "index")
    path = index / "segments" / "0000" / f"{name}.npy"
    values = np.load(path)
    values[3] = value
    np.save(path, values)
    opened = load_index(index)
    assert isinstance(opened, ClusterIndex)
    reads = [
        lambda: opened.search(make_queries(VECTORS[:1]), 1),
        lambda: opened.vectors_of(np.arange(8)),
        lambda: live_users(open_index(index)),
        lambda: merge_segments(index, 1, open_index(index)),
    ]
    for read in reads:
        with pytest.raises(FriendrecError, match=rf"the index is damaged \({name} from .* of \d\): make it again"):
            read()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda text: text[:-9], "is no description"),
        (lambda text: "[]", "is no description"),
        (lambda text: text.replace("nprobe", "probes"), "lacks nprobe"),
        (lambda text: text.replace("kind", "kinds"), "lacks kind"),
    ],
)
def test_damaged_descriptions_are_refused(harm: Callable[[str], str], said: str, tmp_path: Path) -> None:
    meta = make(tmp_path / "index") / "meta.json"
    meta.write_text(harm(meta.read_text()))
    with pytest.raises(FriendrecError, match=rf"is a damaged index \(meta.json {said}\): make it again"):
        load_index(tmp_path / "index")


def test_what_is_no_directory_is_removed_too(tmp_path: Path) -> None:
    index, other = make(tmp_path / "index"), tmp_path / "other"
    other.mkdir()
    (other / "kept").touch()
    (index / "segments" / "stray").touch()
    (index / "segments" / "0007").symlink_to(other)
    with writing(index):
        assert [path.name for path in (index / "segments").iterdir()] == ["0000"]
    assert (other / "kept").exists()
    failure = PermissionError(errno.EACCES, "Permission denied", "stray")
    (index / "segments" / "stray").touch()
    with (
        patch.object(Path, "unlink", side_effect=failure),
        pytest.raises(FriendrecError, match=r"cannot remove stray \(Permission denied\): see whose it is"),
        writing(index),
    ):
        pass


def test_a_cut_index_of_strings_is_refused(tmp_path: Path) -> None:
    index = make(tmp_path / "index", NAMES)
    path = index / "segments" / "0000" / "user_ids.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FriendrecError, match="is a damaged index"):
        open_index(index)
