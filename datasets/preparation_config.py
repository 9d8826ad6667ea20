"""The options of preparation, and how their texts are read. Light, because `friendrec prepare --help` imports it."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from friendrec.errors import FriendrecError

COLUMNS = ("actor_id", "target_id", "action", "timestamp", "user_id")


class Correctable(FriendrecError):
    """A mistake that other values of the options in `change` mend; the CLI shows the command that has them."""

    def __init__(self, message: str, **change: Any) -> None:
        super().__init__(message)
        self.change = change


@dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """How a log is read, cleaned, split and laid out."""

    columns: str | None = None
    """Names of the columns where they differ, as `actor_id=src,target_id=dst,action=kind,timestamp=t,user_id=id`."""
    time_unit: Literal["s", "ms", "us", "ns"] | None = None
    """Unit of integer timestamps: s, ms, us or ns since 1970. Leave out where timestamps have a type of their own."""
    single_action: str | None = None
    """Where the log has no column of actions: what to call the one that every row is, as `message`."""
    actions: str | None = None
    """The actions to keep, as `message,accept`; all where left out."""
    roles: str | None = None
    """What actions are for, as `request=history,accept=target,block=exclude`. Roles: target (context, and something to
    predict; where nothing is said), history (context only), negative (context marked as bad), exclude (whom never to
    recommend; no context)."""
    splits: str = "0.8,0.1,0.1"
    """Shares of the events for train, validation and test, in order of time; they add up to 1."""
    max_reject: float = 0.01
    """Stop if more than this share of the rows is malformed."""
    context_length: int = 50
    """Earlier entries that a chunk of a user's sequence repeats: the longest history a model can see."""
    chunk_length: int = 256
    """Entries of a chunk, besides its context. Shorter chunks take less memory in training."""
    buckets: int | None = None
    """Files that the sequences are split into, by user; one for every 1,000,000 events where left out."""
    memory_limit: str = "2GB"
    """Memory that the table engine may use; what exceeds it goes to disk beside the output."""

    def __post_init__(self) -> None:
        from friendrec.datasets.prepared import ROLES  # not above: --help imports this file and must be quick

        parse_splits(self.splits)
        for name in self.column_of:
            if name not in COLUMNS:
                raise FriendrecError(f"--columns maps {name}: write one of {', '.join(COLUMNS)} before the =")
        if self.single_action is not None and "action" in self.column_of:
            raise FriendrecError(
                f"--single-action {self.single_action} leaves no use for the column action={self.column_of['action']} "
                "of --columns: leave one of them out"
            )
        for name, role in self.role_of.items():
            if role not in ROLES:
                raise FriendrecError(f"--roles gives {name} the role {role}: it is one of {', '.join(ROLES)}")
        for option, least in (("context_length", 0), ("chunk_length", 1), ("buckets", 1), ("max_reject", 0)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise FriendrecError(f"--{option.replace('_', '-')} is {value}: it must be at least {least}")

    @property
    def column_of(self) -> dict[str, str]:
        return parse_pairs(self.columns, "columns")

    @property
    def role_of(self) -> dict[str, str]:
        return parse_pairs(self.roles, "roles")

    @property
    def boundaries(self) -> tuple[Fraction, Fraction]:
        return parse_splits(self.splits)

    @property
    def selected(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.actions or "").split(",") if name.strip())


def parse_pairs(text: str | None, option: str) -> dict[str, str]:
    """`a=b,c=d` as a mapping.

    >>> parse_pairs("actor_id=src, target_id=dst", "columns")
    {'actor_id': 'src', 'target_id': 'dst'}
    """
    pairs = [part.split("=", 1) for part in (text or "").split(",") if part.strip()]
    if any(len(pair) < 2 or not pair[0].strip() or not pair[1].strip() for pair in pairs):
        raise FriendrecError(f"--{option} {text} is not a list like name=value,name=value: correct --{option}")
    return {name.strip(): value.strip() for name, value in pairs}


def parse_splits(text: str) -> tuple[Fraction, Fraction]:
    """Where validation and test begin, as exact shares of the events.

    >>> parse_splits("0.8,0.1,0.1")
    (Fraction(4, 5), Fraction(9, 10))
    """
    try:
        train, validation, test = (Fraction(part.strip()) for part in text.split(","))
        good = train > 0 and min(validation, test) >= 0 and train + validation + test == 1
    except (ValueError, ZeroDivisionError):
        good = False
    if not good:
        raise FriendrecError(f"--splits {text} is not three shares that add up to 1: pass one like 0.8,0.1,0.1")
    return train, train + validation
