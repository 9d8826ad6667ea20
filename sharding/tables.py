"""The embedding tables of a model: their config, and first rows that no world size can change."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

from friendrec.errors import FriendrecError
from friendrec.hashing import GOLDEN, splitmix64


@dataclass(frozen=True)
class Table:
    """One table of `rows` × `dim` float32, read by the named features of the batch; bags are summed."""

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise FriendrecError(f"table {self.name!r} has {self.rows} rows: give it at least one")
        if self.dim < 4 or self.dim % 4:
            raise FriendrecError(f"table {self.name!r} has dimension {self.dim}: FBGEMM wants a multiple of 4")


def embedding_bag_collection(tables: Sequence[Table]) -> EmbeddingBagCollection:
    """The unsharded module, on device meta: no rank ever holds a whole table. `parallel.shard` gives it rows."""
    configs = [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.rows,
            embedding_dim=table.dim,
            feature_names=list(table.features),
            pooling=PoolingType.SUM,
            init_fn=_leave,
        )
        for table in tables
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device("meta"))


def initial_rows(seed: int, table: str, rows: range, dim: int) -> Tensor:
    """First values of the given rows, float32 `[len(rows), dim]`: uniform, mean 0, deviation 1/√dim.

    Every value is splitmix64 of its place, so a row is a function of (seed, table, row) alone: whoever holds it,
    at any world size and however long the table, draws the same.

    >>> bool((initial_rows(0, "user", range(5, 9), 4) == initial_rows(0, "user", range(9), 4)[5:]).all())
    True
    """
    digest = hashlib.blake2b(f"{seed}/{table}".encode(), digest_size=8).digest()
    key = np.frombuffer(digest, dtype="<u8")
    place = np.arange(rows.start * dim, rows.stop * dim, dtype=np.uint64)
    uniform = (splitmix64(key + place * GOLDEN) >> np.uint64(40)).astype(np.float32)  # 24 bits: exact in float32
    values = (uniform + np.float32(0.5)) * np.float32(2**-24) - np.float32(0.5)
    return torch.from_numpy((values * np.float32((12 / dim) ** 0.5)).reshape(-1, dim))


def _leave(weight: Tensor) -> Tensor:
    """TorchRec's init hook, doing nothing: rows come after sharding, and torch's RNG is left for the dense part."""
    return weight
