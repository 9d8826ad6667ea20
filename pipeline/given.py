"""Parquet that users pass: which files it is, and whose rows they hold."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError
from friendrec.pipeline.manifest import MANIFEST, Manifest
from friendrec.pipeline.publish import open_published


def parquet_files(path: str, kind: str, source: str) -> tuple[list[Path], Manifest | None]:
    """The files of a published directory of that kind, with its manifest, of any folder, or the one file.

    `source` names them in what is said where there is none.
    """
    place, manifest = Path(path), None
    if "://" in path or (place / MANIFEST).exists():
        place, manifest = open_published(path, kind)
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not files:
        raise FriendrecError(f"{source} holds no Parquet file")
    return files, manifest


def rows_of_ids(ids: pa.ChunkedArray, data: PreparedData, source: str) -> NDArray[np.int64]:
    """The dense row of each raw id, -1 for whom the data does not know. `source` names where the ids come from."""
    known = pa.array(data.user_ids)
    try:
        rows = pc.index_in(ids.cast(known.type), value_set=known)
    except pa.ArrowException as error:
        raise FriendrecError(f"{source}: {error}; user ids of the prepared data are {known.type}") from None
    return pc.fill_null(rows, -1).to_numpy().astype(np.int64)
