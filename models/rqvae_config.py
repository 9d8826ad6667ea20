"""How an RQ-VAE is trained; free of torch, so that the command line stays quick."""

from dataclasses import dataclass
from typing import Literal

from friendrec.errors import FriendrecError


@dataclass(frozen=True, kw_only=True)
class RqVaeConfig:
    """Shape and training of `--method rqvae`; without meaning to rqkmeans."""

    latent_dim: int = 64
    """Dimensions that are quantised; at most those of the vectors are used."""
    hidden: int = 128
    """Width of the hidden layer of encoder and decoder."""
    codebooks: Literal["ema", "gradient"] = "ema"
    """`ema`: a token's place is the running mean of what falls to it; `gradient`: places are trained like weights."""
    decay: float = 0.95
    """Of the running means a step, and of the counts that tell which tokens are dead."""
    commitment: float = 0.25
    """Weight β of the loss that draws encoded vectors to their tokens. Raise it where they run away from them."""
    revival: float = 0.1
    """A token that gets less than this share of an even load moves to a random vector's place; 0 never moves one."""
    steps: int = 1000
    """Batches of training; more lower the reconstruction error a little."""
    batch_size: int = 1024
    """Vectors a batch; all of them where there are fewer."""
    learning_rate: float = 3e-3
    """Of Adam at the first step; it falls evenly to 0."""

    def __post_init__(self) -> None:
        if min(self.latent_dim, self.hidden, self.steps, self.batch_size) < 1:
            raise FriendrecError("latent_dim, hidden, steps and batch_size of rqvae must be at least 1")
        if not (0 < self.decay < 1 and 0 <= self.revival < 1):
            raise FriendrecError("decay of rqvae must lie between 0 and 1, and revival too or be 0")
        if not (self.commitment >= 0 and self.learning_rate > 0):
            raise FriendrecError("commitment of rqvae must not be negative, and learning_rate be above 0")
