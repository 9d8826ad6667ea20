"""friendrec: friend recommendation on TorchRec, from a Parquet log to evaluated recommendations.

The Python API:

    import friendrec

    run = friendrec.open_run("DIR/run")
    run.recommend([17, 42], k=10)           # pyarrow table: user_id, rank, candidate_id, score
    run.embeddings([17, 42])                # user_id, query, target
    friendrec.open_index("DIR/index")
    friendrec.open_data("DIR/data")

A mistake raises `FriendrecError`, whose text says what to do.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from friendrec.errors import FriendrecError

if TYPE_CHECKING:
    from friendrec.datasets.prepared import PreparedData
    from friendrec.pipeline.api import Index, Run

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: spinning threads starve each other

__version__ = "0.1.0"
__all__ = ["FriendrecError", "open_data", "open_index", "open_run"]


def open_run(run: str | Path, data: str | Path | None = None, index: str | Path | None = None) -> "Run":
    """Open what `friendrec train` made, a directory or URL.

    `data` is the prepared data it was trained on, by default where it was then, or beside the run. `index` is one of
    the run's embeddings, or of its tokens; by default every candidate is scored exactly, of a run that writes tokens
    those that its beams reach. Raises FriendrecError where they do not fit.
    """
    from friendrec.pipeline.api import Run

    return Run.open(run, data, index)


def open_index(index: str | Path) -> "Index":
    """Open what `friendrec index` made, a directory or URL."""
    from friendrec.pipeline.api import Index

    return Index.open(index)


def open_data(data: str | Path) -> "PreparedData":
    """Open what `friendrec prepare` made, a directory or URL: memory-mapped arrays of every user's events."""
    from friendrec.pipeline.api import open_data

    return open_data(data)
