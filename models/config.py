"""Shape of the models; free of torch, so that the command line stays quick."""

from dataclasses import dataclass

from friendrec.errors import FriendrecError


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """Shape of the two towers."""

    dim: int = 64
    """Dimensions of every table and of the dot product; a multiple of 4 and of num_heads."""
    num_heads: int = 4
    """Learned queries that pool the history."""
    hidden: int = 128
    """Width of the hidden layers."""
    copy_term: bool = True
    """Learn a bonus for the actor's own contacts; off shows what ids alone can do."""
    dense_loss: float = 0.1
    """Weight of a second loss on the dot product alone; more finds more new friends and fewer old ones."""

    def __post_init__(self) -> None:
        if min(self.dim, self.num_heads, self.hidden) < 1 or self.dim % 4 or self.dim % self.num_heads:
            raise FriendrecError(
                f"dim {self.dim} must be a multiple of 4 and of num_heads {self.num_heads}; all widths at least 1"
            )
        if self.dense_loss < 0:
            raise FriendrecError(f"dense_loss {self.dense_loss} must not be negative")
