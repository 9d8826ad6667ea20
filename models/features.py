"""The lookup: one sharded EmbeddingBagCollection answers for users, their profiles, events and conditions."""

from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass
class Slots:
    """Vectors by slot, float32 `[slots, D]`; see `datasets/batch.py` for what a slot is."""

    user: Tensor
    event: Tensor
    condition: Tensor
    codebooks: tuple[Tensor, ...] = ()  # a level each: the vector of token i at slot i
    clusters: Tensor | None = None  # [C, D] every centroid, where the model has them


class Lookup(nn.Module):
    """Reads every table in one call.

    A user is its id vector, or the sum of its tokens' vectors, plus the pooled vectors of its profile columns.
    """

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, ids: KeyedJaggedTensor) -> Slots:
        vectors = self.tables(ids).to_dict()
        levels = range(sum(key.startswith("codebook_") for key in vectors))  # by name: the order is the sharding's
        tokens = [vectors[f"stu_{level}"] for level in levels]
        profile = [vector for key, vector in vectors.items() if key.startswith("profile_")]
        user = sum(profile, sum(tokens, vectors.get("user", 0.0)))
        codebooks = tuple(vectors[f"codebook_{level}"] for level in levels)
        return Slots(user, vectors["event"], vectors["condition"], codebooks, vectors.get("cluster"))
