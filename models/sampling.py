"""How to draw friends by chance in place of the best: the settings alone, so that a command line can check them."""

from dataclasses import dataclass

from friendrec.errors import FriendrecError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """At each level tokens are drawn from softmax(log P / temperature) over the legal among `top_k` and `nucleus`."""

    temperature: float = 1.0
    """Below 1 the likely are preferred, above 1 the unlikely get more of a chance."""
    top_k: int | None = None
    """The most likely legal tokens that may be drawn at a level; by default all."""
    nucleus: float | None = None
    """Share of probability: of the tokens that `top_k` leaves the fewest that reach it (Holtzman et al. 2020)."""
    seed: int = 0
    """The same seed draws the same for a query, whatever else is asked."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise FriendrecError(
                f"temperature {self.temperature}: give a positive number; for the best ask no sampling"
            )
        if self.top_k is not None and self.top_k < 1:
            raise FriendrecError(f"top-k {self.top_k}: at least 1 token must be left to draw")
        if self.nucleus is not None and not 0 < self.nucleus <= 1:
            raise FriendrecError(f"nucleus {self.nucleus}: give a share of probability above 0, up to 1")
        if not 0 <= self.seed < 1 << 63:
            raise FriendrecError(f"seed {self.seed}: give a whole number from 0 to 2⁶³ − 1")
