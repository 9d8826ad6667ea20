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


class Lookup(nn.Module):
    """Reads every table in one call; a user is its id vector plus the pooled vectors of its profile columns."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, ids: KeyedJaggedTensor) -> Slots:
        vectors = self.tables(ids).to_dict()
        profile = [vector for key, vector in vectors.items() if key.startswith("profile_")]
        return Slots(sum(profile, vectors["user"]), vectors["event"], vectors["condition"])
