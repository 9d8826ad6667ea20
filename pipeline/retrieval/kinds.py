"""Every kind of index by its name."""

from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.pipeline.retrieval.files import UserIds, read_meta
from friendrec.pipeline.retrieval.protocol import Retriever

Kind = Literal["exact", "ivf", "hnsw", "clusters", "milvus", "stu"]


class Index(Retriever, Protocol):
    """A retriever over known users."""

    @property
    def user_ids(self) -> UserIds: ...  # [N]

    def __len__(self) -> int: ...

    def save(self, directory: Path) -> None: ...


@runtime_checkable
class VectorIndex(Index, Protocol):
    """Of every kind but stu: it ranks by inner product with vectors that it stores."""

    def vectors_of(self, ids: NDArray[np.int64]) -> NDArray[np.float32]: ...


def load_index(directory: Path) -> Index:
    """Open what `save` of any kind wrote; the caller has checked the manifest."""
    kind = read_meta(directory, "kind")["kind"]
    if kind == "exact":
        from friendrec.pipeline.retrieval.exact import ExactIndex

        return ExactIndex.load(directory)
    if kind in ("ivf", "hnsw"):
        from friendrec.pipeline.retrieval.approximate import ApproximateIndex

        return ApproximateIndex.load(directory)
    if kind == "clusters":
        from friendrec.pipeline.retrieval.clusters import ClusterIndex

        return ClusterIndex.load(directory)
    if kind == "milvus":
        from friendrec.pipeline.retrieval.milvus import MilvusIndex

        return MilvusIndex.load(directory)
    if kind == "stu":
        from friendrec.pipeline.retrieval.stu import StuIndex

        return StuIndex.load(directory)
    raise FriendrecError(f"{directory} is an index of kind {kind}, which this version does not know: make it again")
