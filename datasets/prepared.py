"""The prepared data set, opened: memory-mapped user-major event arrays and what the split files say.

Every event u→v of the log stands twice: in u's sequence as *out*, in v's as *in*. A sequence is in total order
(timestamp, actor, target, action), and all sequences lie end to end:

    offsets    0        3            7          <- entry range of each dense user row
    partner    5 9 5    0 2 2 1      ...        <- dense row of the other user
    direction  0 1 0    1 0 0 1                 <- OUT or IN
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

OUT, IN = 0, 1
ROLES = ("target", "history", "negative", "exclude")


@dataclass(frozen=True)
class Action:
    """An action of the log, its code being its place in the list; `role` is one of ROLES."""

    name: str
    role: str


@dataclass(frozen=True)
class PreparedData:
    """What `friendrec prepare` published. U users, n events, 2n entries; timestamps are epoch microseconds (int64).

    `event_entry[k]` is the entry of the out side of the k-th event of the log's total order. The train period holds
    the events before `train_until`, validation those before `validation_until`, test the rest. Rows below
    `num_train_users` are the users seen in the train period: the candidates.
    """

    path: Path
    offsets: NDArray[np.int64]
    partner: NDArray[np.int32]
    action: NDArray[np.int16]
    direction: NDArray[np.int8]
    timestamp: NDArray[np.int64]
    event_entry: NDArray[np.int64]
    actions: tuple[Action, ...]
    train_until: int
    validation_until: int
    num_train_events: int
    num_validation_events: int
    num_train_users: int
    context_length: int
    chunk_length: int

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_events(self) -> int:
        return len(self.event_entry)

    @cached_property
    def user_ids(self) -> NDArray[np.int64] | NDArray[np.object_]:
        """Raw user id of each dense row, `[U]`."""
        return pq.read_table(self.path / "vocabulary", columns=["user_id"])["user_id"].to_numpy()

    @cached_property
    def profile_rows(self) -> dict[str, int]:
        """Number of codes of each profile column, code 0 (unknown) included."""
        files = sorted((self.path / "profiles").glob("*.parquet"))
        return {file.stem: pq.read_metadata(file).num_rows + 1 for file in files}

    def array(self, name: str) -> np.ndarray:
        """One of the derived arrays beside the sequences, memory-mapped, by its file name without `.npy`."""
        return np.load(self.path / "arrays" / f"{name}.npy", mmap_mode="r")


def load_prepared(path: Path) -> PreparedData:
    """Map a prepared directory whose manifest the caller has checked."""
    splits = json.loads((path / "splits.json").read_text())
    actions = json.loads((path / "actions.json").read_text())
    arrays = {
        name: np.load(path / "arrays" / f"{name}.npy", mmap_mode="r")
        for name in ("offsets", "partner", "action", "direction", "timestamp", "event_entry")
    }
    return PreparedData(path=path, actions=tuple(Action(**a) for a in actions), **splits, **arrays)
