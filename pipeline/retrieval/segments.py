"""Segments: the inverted lists of one write, their rows sorted by list."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from friendrec.errors import FriendrecError

Stored = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.int8]
Dtype = Literal["float32", "float16", "int8"]


@dataclass(frozen=True)
class Segment:
    """M rows of C lists; arrays may be memory-mapped. Row r of list c lies in `offsets[c]:offsets[c + 1]`."""

    offsets: NDArray[np.int64]  # [C + 1]
    ids: NDArray[np.int32]  # [M] candidates, ascending in each list
    primary: NDArray[np.int32]  # [M] the candidate's first list: of its other row, if it has two, another
    rows: Stored  # [M, D]
    scale: NDArray[np.float32]  # [M] of int8 rows, v = scale · row; empty otherwise
    dead: NDArray[np.bool_]  # [M] replaced by a later segment, or deleted; empty where nothing is


def build_segment(
    vectors: NDArray[np.float32],
    ids: NDArray[np.int32],
    assigned: NDArray[np.int32],
    num_lists: int,
    dtype: Dtype = "float32",
) -> Segment:
    """Vectors `[N, D]` of candidates `[N]`, each once, as rows of the lists `[N, copies]` assigned, primary first."""
    copies = assigned.shape[1]
    lists, owners = assigned.ravel(), np.repeat(np.arange(len(ids)), copies)
    order = np.lexsort((ids[owners], lists))
    owners = owners[order]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(lists, minlength=num_lists))])
    rows, scale = stored(vectors, dtype)
    return Segment(
        offsets=offsets.astype(np.int64),
        ids=ids[owners].astype(np.int32),
        primary=assigned[owners, 0].astype(np.int32),
        rows=rows[owners],
        scale=scale[owners] if dtype == "int8" else scale,
        dead=np.empty(0, np.bool_),
    )


def check_ids(segment: Segment, num_candidates: int) -> None:
    """Raises FriendrecError where a row is of nobody, or of a list that is not there; reads two arrays of M."""
    for name, bound in (("ids", num_candidates), ("primary", len(segment.offsets) - 1)):
        values = getattr(segment, name)
        if len(values) and not 0 <= values.min() <= values.max() < bound:
            raise FriendrecError(
                f"the index is damaged ({name} from {values.min()} to {values.max()}, of {bound:,}): make it again"
            )


def stored(vectors: NDArray[np.float32], dtype: Dtype) -> tuple[Stored, NDArray[np.float32]]:
    """Vectors `[N, D]` as rows of this type, and the scale `[N]` of int8 ones: round(v / scale), max |v| at 127."""
    if dtype == "float16" and np.abs(vectors).max(initial=0) > np.finfo(np.float16).max:
        raise FriendrecError("float16 holds no numbers above 65,504, and the vectors have some: pass --dtype float32")
    if dtype != "int8":
        return vectors.astype(dtype), np.empty(0, np.float32)
    scale = (np.maximum(np.abs(vectors).max(axis=1, initial=0.0), 1e-12) / 127).astype(np.float32)
    return np.rint(vectors / scale[:, None]).astype(np.int8), scale


def restored(rows: Stored, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows `[N, D]` as float32 vectors; `scale` `[N]`, or empty where they have none."""
    vectors = rows.astype(np.float32)
    return vectors * scale[:, None] if len(scale) else vectors
