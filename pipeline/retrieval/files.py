"""What every index directory holds beside its vectors: meta.json, and the raw user ids in row order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from friendrec.errors import FriendrecError

UserIds = NDArray[np.int64] | NDArray[np.object_]


def write_users(directory: Path, kind: str, user_ids: UserIds, dimensions: int, **parameters: Any) -> None:
    """Write users.parquet, and meta.json with the kind and its parameters."""
    pq.write_table(pa.table({"user_id": user_ids}), directory / "users.parquet")
    meta = {"kind": kind, "metric": "inner_product", "candidates": len(user_ids), "dimensions": dimensions}
    (directory / "meta.json").write_text(json.dumps(meta | parameters, indent=1) + "\n")


def read_users(directory: Path) -> UserIds:
    users: UserIds = pq.read_table(directory / "users.parquet")["user_id"].to_numpy()
    return users


def read_meta(directory: Path, *names: str) -> dict[str, Any]:
    """What meta.json says; raises FriendrecError where it is damaged, or lacks one of these names."""
    try:
        meta: dict[str, Any] = json.loads((directory / "meta.json").read_text())
        if not isinstance(meta, dict):
            raise ValueError
    except (OSError, ValueError) as error:
        raise FriendrecError(f"{directory} is a damaged index (meta.json is no description): make it again") from error
    if lacking := [name for name in names if name not in meta]:
        raise FriendrecError(f"{directory} is a damaged index (meta.json lacks {lacking[0]}): make it again")
    return meta
