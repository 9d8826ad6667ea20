"""An index of clusters on disk: files that are written once, and a manifest that says which of them are the index.

    INDEX/meta.json, centroids.npz      what no update changes
    INDEX/segments/0000/                the build: its rows, and the raw ids of its users
    INDEX/segments/0002/                the second update: its rows, and the raw ids of the users it appended
    INDEX/segments/0002/dead-0000.npy   rows of segment 0000 that it replaced or deleted
    INDEX/manifest.json                 the files that count: replacing it is the commit
    INDEX/update.lock                   held by who writes

Who has opened an index goes on with the files of the manifest read then, whatever is written meanwhile. What a killed
writer left behind no manifest names: readers never look at it, and the next writer removes it.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.pipeline.manifest import MANIFEST, Manifest, checksum, files_below, put_manifest, sync
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.files import UserIds, read_meta
from friendrec.pipeline.retrieval.segments import Dtype, Segment, check_ids

CENTROIDS = "centroids.npz"
LOCK = "update.lock"
BLOCK = 1 << 18  # rows
ARRAYS = tuple(field.name for field in fields(Segment) if field.name != "dead")
TYPES = {
    "offsets": ("int64",), "ids": ("int32",), "primary": ("int32",), "rows": get_args(Dtype), "scale": ("float32",)
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """What one manifest says the index is; large arrays are memory-mapped."""

    meta: dict[str, Any]
    centroids: Centroids
    segments: list[Segment]
    numbers: list[int]
    """The directory of each segment."""
    user_ids: UserIds  # [N]

    @property
    def dimensions(self) -> int:
        return self.centroids.vectors.shape[1]


def save_index(
    directory: Path, centroids: Centroids, segments: Sequence[Segment], user_ids: UserIds, **parameters: Any
) -> None:
    """Write an index whole, into a directory without a manifest yet; `parameters` go into meta.json."""
    for number, segment in enumerate(segments):
        dead = {number: np.flatnonzero(segment.dead)} if segment.dead.any() else {}
        write_segment(directory, number, segment, dead)
    write_user_ids(directory, 0, user_ids)
    write_constants(directory, centroids, len(user_ids), **parameters)


def write_constants(directory: Path, centroids: Centroids, num_candidates: int, **parameters: Any) -> None:
    """What no update changes: centroids.npz, and meta.json with the kind and its parameters."""
    np.savez(directory / CENTROIDS, vectors=centroids.vectors, cells=np.int64(centroids.cells))
    lists, dimensions = centroids.vectors.shape
    meta = {"kind": "clusters", "metric": "inner_product", "candidates": num_candidates, "dimensions": dimensions}
    meta |= {"lists": lists, "cells": centroids.cells} | parameters
    (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def write_segment(directory: Path, number: int, segment: Segment, dead: Mapping[int, NDArray[np.int64]]) -> None:
    """The rows of a segment, and which rows of others are dead from now on, by their number."""
    place = segment_path(directory, number)
    place.mkdir(parents=True, exist_ok=True)
    if len(segment.ids):
        for name in ARRAYS:
            np.save(place / f"{name}.npy", getattr(segment, name))
    for other, positions in dead.items():
        np.save(place / f"dead-{other:04}.npy", positions)


def create_segment(place: Path, offsets: NDArray[np.int64], dimensions: int, dtype: Dtype) -> dict[str, Any]:
    """The files of a segment in their full size, to be filled; also by others, once they are there."""
    place.mkdir(parents=True, exist_ok=True)
    num = int(offsets[-1])
    np.save(place / "offsets.npy", offsets)
    shapes = {"ids": ("int32", (num,)), "primary": ("int32", (num,)), "rows": (dtype, (num, dimensions))}
    shapes["scale"] = "float32", (num if dtype == "int8" else 0,)
    return {
        name: np.lib.format.open_memmap(place / f"{name}.npy", "w+", np.dtype(kind), shape)
        for name, (kind, shape) in shapes.items()
    }


def merge_segments(directory: Path, number: int, opened: Snapshot) -> None:
    """Write the rows of all segments that are not dead as one, `number`; what is damaged gets no new checksum."""
    for segment in opened.segments:
        check_ids(segment, len(opened.user_ids))
    live = [np.flatnonzero(~s.dead) if len(s.dead) else np.arange(len(s.ids)) for s in opened.segments]
    lists = [np.searchsorted(s.offsets, rows, "right") - 1 for s, rows in zip(opened.segments, live, strict=True)]
    ids = [s.ids[rows] for s, rows in zip(opened.segments, live, strict=True)]
    every = np.concatenate([np.empty(0, np.int64), *lists])
    place_of = np.empty(len(every), np.int64)
    place_of[np.lexsort((np.concatenate([np.empty(0, np.int32), *ids]), every))] = np.arange(len(every))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(every, minlength=len(opened.centroids)))])
    files = create_segment(segment_path(directory, number), offsets, opened.dimensions, opened.meta["dtype"])
    first = 0
    for segment, rows in zip(opened.segments, live, strict=True):
        for begin in range(0, len(rows), BLOCK):
            block = rows[begin : begin + BLOCK]
            at = place_of[first + begin : first + begin + len(block)]
            for name, file in files.items():
                if len(file):
                    file[at] = getattr(segment, name)[block]
        first += len(rows)
    for file in files.values():
        file.flush()


def write_user_ids(directory: Path, number: int, user_ids: UserIds | pa.ChunkedArray) -> None:
    """Raw ids of the users that a segment appends: whole numbers as .npy, strings as Arrow, both to be mapped."""
    place = segment_path(directory, number)
    place.mkdir(parents=True, exist_ok=True)
    table = pa.table({"user_id": user_ids})
    if pa.types.is_integer(table["user_id"].type):
        np.save(place / "user_ids.npy", table["user_id"].to_numpy().astype(np.int64))
        return
    with pa.ipc.new_file(place / "user_ids.arrow", table.schema) as file:
        file.write_table(table)


def segment_path(directory: Path, number: int) -> Path:
    return directory / "segments" / f"{number:04}"


def open_index(directory: Path) -> Snapshot:
    """What the manifest says, or, in a directory that has none yet, what is there.

    Raises FriendrecError where files are missing or not what they should be.
    """
    while True:
        names = committed(directory)
        try:
            return _open(directory, names)
        except (OSError, LookupError, ValueError, TypeError, BadZipFile, pa.ArrowException) as error:
            if committed(directory) == names:  # else a writer replaced it and removed what it was
                raise FriendrecError(f"{directory} is a damaged index ({_first_line(error)}): make it again") from error


def committed(directory: Path) -> frozenset[str]:
    """The files that count, by their relative paths."""
    manifest = directory / MANIFEST
    if manifest.exists():
        return frozenset(Manifest.from_json(manifest.read_text(), str(directory)).files)
    return frozenset(files_below(directory))


def _open(directory: Path, names: Collection[str]) -> Snapshot:
    meta = read_meta(directory)
    with np.load(directory / CENTROIDS) as file:
        centroids = Centroids(file["vectors"], int(file["cells"]))
    segments, numbers = [], numbers_of(names)
    with_rows = [number for number in numbers if f"segments/{number:04}/offsets.npy" in names]
    for number in with_rows:
        place = segment_path(directory, number)
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        segment = Segment(dead=np.empty(0, np.bool_), **arrays)
        _check(segment, centroids, place)
        marks = [directory / name for name in sorted(names) if name.endswith(f"/dead-{number:04}.npy")]
        segments.append(_marked(segment, [np.load(path) for path in marks]))
    user_ids = [_read_user_ids(segment_path(directory, number)) for number in numbers if _appends(number, names)]
    every: Any = user_ids[0] if len(user_ids) == 1 else np.concatenate(user_ids)
    return Snapshot(meta, centroids, segments, with_rows, every)


def next_number(manifest: Manifest) -> int:
    """Of the segment that an update writes: no committed one has ever had it."""
    return numbers_of(manifest.files)[-1] + 1


def numbers_of(names: Collection[str]) -> list[int]:
    """The segments that files belong to, ascending."""
    found = (re.match(r"segments/(\d+)/", name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def _check(segment: Segment, centroids: Centroids, place: Path) -> None:
    """Shapes, types and offsets: what can be told without reading M of anything. See `check_ids` for the rest."""
    rows, lists = len(segment.ids), len(centroids)
    scales = rows if segment.rows.dtype == np.int8 else 0
    shapes = {
        "offsets": (lists + 1,), "primary": (rows,), "rows": (rows, centroids.vectors.shape[1]), "scale": (scales,)
    }  # fmt: skip
    for name, shape in shapes.items():
        if getattr(segment, name).shape != shape:
            raise ValueError(f"{place / name}.npy is of shape {getattr(segment, name).shape}, not {shape}")
    for name, kinds in TYPES.items():
        if getattr(segment, name).dtype.name not in kinds:
            raise ValueError(f"{place / name}.npy is of {getattr(segment, name).dtype}, not {' or '.join(kinds)}")
    if segment.offsets[0] != 0 or segment.offsets[-1] != rows or (np.diff(segment.offsets) < 0).any():
        raise ValueError(f"{place / 'offsets'}.npy does not ascend from 0 to {rows}")


def _marked(segment: Segment, marks: list[NDArray[np.int64]]) -> Segment:
    if not marks:
        return segment
    dead, rows = np.zeros(len(segment.ids), np.bool_), np.concatenate(marks)
    if rows.min(initial=0) < 0:
        raise ValueError("it marks rows before the first as dead")
    dead[rows] = True
    return replace(segment, dead=dead)


def _appends(number: int, names: Collection[str]) -> bool:
    return any(f"segments/{number:04}/user_ids.{ending}" in names for ending in ("npy", "arrow"))


def _read_user_ids(place: Path) -> UserIds:
    if (place / "user_ids.npy").exists():
        numbers: UserIds = np.load(place / "user_ids.npy", mmap_mode="r")
        return numbers
    table = pa.ipc.open_file(pa.memory_map(str(place / "user_ids.arrow"))).read_all()
    strings: UserIds = table["user_id"].to_numpy()
    return strings


@contextmanager
def writing(directory: Path) -> Iterator[Manifest]:
    """The manifest, while nobody else may write; what a killed writer left behind is gone.

    Raises FriendrecError where another process writes.
    """
    try:
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise FriendrecError(f"cannot write to {directory} ({error.strerror}): update a copy of it") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back by the system however the process ends
        except BlockingIOError:
            raise FriendrecError(f"{directory} is being updated by another process: try again after it") from None
        manifest = Manifest.from_json((directory / MANIFEST).read_text(), str(directory))
        remove_orphans(directory, manifest)
        yield manifest
    finally:
        os.close(lock)


def commit(directory: Path, manifest: Manifest, number: int, extra: Mapping[str, Any], alone: bool = False) -> Manifest:
    """Make segment `number`, written under the lock, part of the index, or, `alone`, all of it."""
    place = segment_path(directory, number)
    own = files_below(place)
    for path in (*own.values(), place, place.parent):
        sync(path)
    files = {name: file for name, file in manifest.files.items() if not alone or not name.startswith("segments/")}
    files |= {f"segments/{number:04}/{name}": checksum(path) for name, path in own.items()}
    changed = replace(manifest, files=files, extra={**manifest.extra, **extra})
    put_manifest(directory, changed)
    return changed


def remove_orphans(directory: Path, manifest: Manifest) -> None:
    """Remove what the manifest does not name; under the lock."""
    kept = {segment_path(directory, number) for number in numbers_of(manifest.files)}
    try:
        for place in set((directory / "segments").iterdir()) - kept:
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink()
        (directory / f"{MANIFEST}.unfinished").unlink(missing_ok=True)
    except OSError as error:
        raise FriendrecError(f"cannot remove {error.filename} ({error.strerror}): see whose it is") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
