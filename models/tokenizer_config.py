"""How users are tokenized; free of torch, so that the command line stays quick."""

from dataclasses import dataclass, field
from typing import Literal

from friendrec.errors import FriendrecError
from friendrec.models.rqvae_config import RqVaeConfig

MOST_CODEBOOKS = 8
MOST_TOKENS = 65536
"""Tokens of a level at most: one output of the decoder each."""
DEFAULT_SIZE = 256
USERS_A_TOKEN = 4
"""The default codebook has at least so many users a token to learn from."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Method and shape of the codes."""

    method: Literal["rqkmeans", "rqvae"] = "rqkmeans"
    """`rqkmeans`: k-means of the vectors, then of what each level leaves; `rqvae`: codebooks trained together with an
    encoder and a decoder."""
    num_codebooks: int = 3
    """Levels of a code, 1 to 8: more tell users apart more finely, and take a step of decoding each."""
    codebook_size: int | None = None
    """Tokens of each level; by default 256, and fewer where there are under 1,024 users. There should be more codes,
    codebook_size to the power of num_codebooks, than users."""
    balanced: bool = False
    """rqkmeans: no token of a level may stand for more than 1.1 times its share of the users. Later levels then tell
    more users apart; fewer near users have the same first token."""
    seed: int = 0
    """Seed of all that is drawn: the same embeddings and seed give the same codes."""

    rqvae: RqVaeConfig = field(default_factory=RqVaeConfig)
    """How the networks of rqvae are shaped and trained."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_codebooks <= MOST_CODEBOOKS:
            raise FriendrecError(f"--num-codebooks {self.num_codebooks}: give a number from 1 to {MOST_CODEBOOKS}")
        if self.codebook_size is not None and not 1 <= self.codebook_size <= MOST_TOKENS:
            raise FriendrecError(f"--codebook-size {self.codebook_size}: give a number from 1 to {MOST_TOKENS}")
        if self.balanced and self.method != "rqkmeans":
            raise FriendrecError("--balanced means nothing to rqvae: leave it out, or pass --method rqkmeans")

    def size_for(self, num_users: int) -> int:
        """Tokens of a level for so many users; raises FriendrecError where it was given and is more than there are."""
        fitting = min(DEFAULT_SIZE, num_users, max(2, _power_of_two(num_users // USERS_A_TOKEN)))
        if self.codebook_size is not None and self.codebook_size > num_users:
            raise FriendrecError(
                f"--codebook-size {self.codebook_size} is more than the {num_users:,} users: "
                f"pass --codebook-size {fitting}, or leave it out"
            )
        return self.codebook_size or fitting


def _power_of_two(number: int) -> int:
    """The largest that is at most `number`; 0 for 0."""
    return 1 << (number.bit_length() - 1) if number else 0
