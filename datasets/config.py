"""What a query sees and what a batch holds; free of torch, so that the command line stays quick."""

from dataclasses import asdict, dataclass, field, replace
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
class NegativeCounts:
    """Negatives of an example by source; `shared` ones are drawn once for all examples of a global batch."""

    uniform: int = 0
    recent: int = 0
    popularity: int = 0
    shared: int = 0


DEFAULT_NEGATIVES = {
    "mixed": NegativeCounts(uniform=32, recent=32, shared=64),
    "in_batch": NegativeCounts(shared=128),
    "uniform": NegativeCounts(uniform=128),
    "popularity": NegativeCounts(popularity=128),
    "none": NegativeCounts(),
}


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """What a global batch holds."""

    order: Literal["user", "time"] = "user"
    """`user`: all examples of a chunk of a user's sequence together; `time`: contiguous runs of the log."""
    batch_size: int = 512
    """Examples in a global batch, whatever the number of processes; at least the prepared chunk length."""
    temporal: bool = True
    """Every out event is an example; off: only each user's last one of the train period."""
    negatives: Literal["mixed", "in_batch", "uniform", "popularity", "none"] = "mixed"
    """Where negatives come from: one source, or `mixed`, several of them together; `none` are needed for tokens, whose
    softmax is over all of a level."""
    uniform_negatives: int | None = None
    """Negatives of each example drawn uniformly from the users seen before it; None is 32 if `mixed`, 128 if
    `uniform`."""
    recent_negatives: int | None = None
    """Negatives of each example drawn from the targets of the most recent events before it; None is 32 if `mixed`."""
    recent_window: float = 0.05
    """Length of the window that recent negatives come from, as a share of the train events."""
    popularity_negatives: int | None = None
    """Negatives of each example drawn from the targets of all events before it; None is 128 if `popularity`."""
    shared_negatives: int | None = None
    """In-batch negatives, targets of the global batch shared by all its examples; None is 64 if `mixed`, 128 if
    `in_batch`."""
    logq: bool = True
    """Lower a sampled candidate's score by the log of how often it is expected to be drawn (logQ correction)."""
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
        self._check_negatives()
        for name in ("recent_window", "action_dropout", "actor_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise FriendrecError(f"{name} is {getattr(self, name)}; give a share between 0 and 1")
        if any(weight < 0 for weight in self.action_weights.values()):
            raise FriendrecError("action_weights must not be negative")

    @property
    def negative_counts(self) -> NegativeCounts:
        """How many negatives each source gives, those left at None filled in."""
        default = DEFAULT_NEGATIVES[self.negatives]
        given = {name: getattr(self, f"{name}_negatives") for name in asdict(default)}
        return replace(default, **{name: count for name, count in given.items() if count is not None})

    def _check_negatives(self) -> None:
        counts = asdict(self.negative_counts)
        if min(counts.values()) < 0:
            raise FriendrecError("uniform_, recent_, popularity_ and shared_negatives must be at least 0")
        if self.negatives == "mixed":
            if not self.negative_counts.uniform:
                raise FriendrecError("mixed negatives need uniform_negatives of at least 1: the others leave users out")
            return
        own = next((name for name, count in asdict(DEFAULT_NEGATIVES[self.negatives]).items() if count), None)
        other = next((name for name, count in counts.items() if count and name != own), None)
        if other is not None:
            raise FriendrecError(
                f"negatives {self.negatives} draws no {other}_negatives: leave that count out, or choose mixed"
            )
        if own is not None and not counts[own]:
            raise FriendrecError(f"negatives {self.negatives} needs {own}_negatives of at least 1")
