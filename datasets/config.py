"""What a query sees and what a batch holds; free of torch, so that the command line stays quick."""

from dataclasses import dataclass, field
from typing import Literal

from friendrec.errors import FriendrecError


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """How much of a user's past a query sees."""

    context_length: int = 50
    """Most recent events in the history, in and out together."""
    contacts: int = 48
    """Most recent distinct partners that the query names as sparse candidates; 0 names none."""

    def __post_init__(self) -> None:
        if self.context_length < 1 or self.contacts < 0:
            raise FriendrecError("context_length must be at least 1 and contacts at least 0")


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """What a global batch holds."""

    order: Literal["user", "time"] = "user"
    """`user`: all examples of a chunk of a user's sequence together; `time`: contiguous runs of the log."""
    batch_size: int = 512
    """Examples in a global batch, whatever the number of processes; at least the prepared chunk length."""
    uniform_negatives: int = 32
    """Negatives of each example drawn uniformly from the users seen before it."""
    recent_negatives: int = 32
    """Negatives of each example drawn from the targets of the most recent events before it."""
    recent_window: float = 0.05
    """Length of the window that recent negatives come from, as a share of the train events."""
    shared_negatives: int = 64
    """In-batch negatives: targets of the global batch shared by all its examples."""
    action_dropout: float = 0.5
    """Chance that an example hides which action it asks for, so that the condition `any` is learned."""
    actor_dropout: float = 0.05
    """Chance that an example hides who its actor is, so that the row of unknown users is learned."""
    action_weights: dict[str, float] = field(default_factory=dict)
    """Weight of the examples of an action in the loss; 1 where none is given."""
    workers: int = 1
    """Processes that prepare batches ahead of training; 0 prepares them in the training process."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise FriendrecError("batch_size must be at least 1 and workers at least 0")
        if self.uniform_negatives < 1 or min(self.recent_negatives, self.shared_negatives) < 0:
            raise FriendrecError("negative counts must be at least 0, and uniform_negatives at least 1")
        for name in ("recent_window", "action_dropout", "actor_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise FriendrecError(f"{name} is {getattr(self, name)}; give a share between 0 and 1")
        if any(weight < 0 for weight in self.action_weights.values()):
            raise FriendrecError("action_weights must not be negative")
