"""From the log as read to clean events: rejects bad rows, drops what is no event, counts both by kind.

Every row of the log ends up in exactly one count:

    rows = rejected + deselected + self_loops + duplicates + exclusions + events
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ibis
import pyarrow as pa
from ibis.expr.types import StringValue, Table

from friendrec.datasets.preparation_config import Correctable, PreparationConfig
from friendrec.datasets.prepared import Action
from friendrec.errors import FriendrecError

MAX_ACTIONS = 1000


@dataclass(frozen=True)
class Cleaning:
    """Rows of the log by what became of them. `exclusions` feed the exclusion set only; some name unknown users."""

    rows: int
    rejected: int
    rejected_by_reason: Mapping[str, int]
    deselected: int
    self_loops: int
    duplicates: int
    exclusions: int
    exclusions_of_unknown_users: int
    events: int


@dataclass(frozen=True)
class Counts:
    """Rows of the log by what can be told of each row alone; `accepted` are neither rejected, deselected nor loops."""

    rejected: Mapping[str, int]
    deselected: int
    self_loops: int
    accepted: int

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    @property
    def rows(self) -> int:
        return self.num_rejected + self.deselected + self.self_loops + self.accepted

    def __str__(self) -> str:
        kinds = {"rejected": self.num_rejected, "deselected": self.deselected, "self-loops": self.self_loops}
        return ", ".join([f"{self.rows} rows", *(f"{rows} {kind}" for kind, rows in kinds.items() if rows)])

    def cleaning(self, events: int, exclusions: int, known_exclusions: int) -> Cleaning:
        """All counts, from the distinct accepted rows: events, exclusions and those between users of the vocabulary."""
        return Cleaning(
            rows=self.rows,
            rejected=self.num_rejected,
            rejected_by_reason=self.rejected,
            deselected=self.deselected,
            self_loops=self.self_loops,
            duplicates=self.accepted - events - exclusions,
            exclusions=exclusions,
            exclusions_of_unknown_users=exclusions - known_exclusions,
            events=events,
        )


def judge(log: Table, latest: int) -> Table:
    """Add `reason` (null: none) for rejecting a row; `latest` is the last credible timestamp, in microseconds."""
    blank = [(_is_blank(log, name), f"no {name}") for name in ("actor_id", "target_id", "action")]
    timestamp = log.timestamp
    reason = ibis.cases(
        *blank,
        (timestamp.isnull(), "no timestamp"),
        (timestamp < 0, "timestamp before 1970"),
        (timestamp > latest, "timestamp in the future"),
    )
    return log.mutate(reason=reason)


def count_rows(judged: Table) -> pa.Table:
    """Rows by reason, action and whether actor and target are the same."""
    return (
        judged.group_by("reason", "action", loop=judged.actor_id == judged.target_id)
        .agg(rows=ibis._.count())
        .order_by("reason", "action", "loop")
        .to_pyarrow()
    )


def decide(judged: Table, config: PreparationConfig) -> tuple[tuple[Action, ...], Counts]:
    """The actions that count and what becomes of the rows; raises if too many are rejected or none is left."""
    counts = count_rows(judged)
    found = sorted({row["action"] for row in counts.to_pylist() if row["reason"] is None})
    actions = choose_actions(found, config.selected, config.role_of) if found else ()
    counted = sum_up(counts, actions)
    if counted.num_rejected > config.max_reject * counted.rows:
        reasons = ", ".join(f"{reason}: {rows}" for reason, rows in counted.rejected.items())
        raise Correctable(
            f"{counted.num_rejected} of {counted.rows} rows are malformed ({reasons}); mend the log or allow them",
            max_reject=-(-counted.num_rejected * 1000 // counted.rows) / 1000,
        )
    if not counted.accepted:
        raise nothing_left(counted)
    return actions, counted


def nothing_left(counts: Counts) -> FriendrecError:
    return FriendrecError(f"no event is left after cleaning ({counts}): check --interactions, --actions and --roles")


def choose_actions(found: Sequence[str], selected: Sequence[str], roles: Mapping[str, str]) -> tuple[Action, ...]:
    """The actions that count with their roles: kept ones by name, then those of role exclude by name.

    The place of an action in this order is its code. `selected` empty: all that were found.
    """
    known = ", ".join(found[:20]) + (", …" if len(found) > 20 else "")
    if len(found) > MAX_ACTIONS:
        raise FriendrecError(f"the log has {len(found)} actions ({known}): name the right column by --columns action=…")
    chosen = sorted(set(selected or found))
    for option, names, allowed in (("--actions", chosen, found), ("--roles", roles, chosen)):
        for name in names:
            if name not in allowed:
                extra = f", and --actions selects {', '.join(chosen)}" if selected and option == "--roles" else ""
                close = difflib.get_close_matches(name, allowed, n=1)
                remedy = f"did you mean {close[0]}?" if close else f"correct {option}"
                raise FriendrecError(f"{option} names the action {name}, the log has {known}{extra}: {remedy}")
    actions = [Action(name, roles.get(name, "target")) for name in chosen]
    if actions and not any(action.role == "target" for action in actions):
        raise FriendrecError("--roles leaves no action with the role target, so nothing to predict: correct --roles")
    return tuple(sorted(actions, key=lambda action: (action.role == "exclude", action.name)))


def sum_up(counts: pa.Table, actions: Sequence[Action]) -> Counts:
    """What `count_rows` says once the actions are chosen."""
    chosen = {action.name for action in actions}
    rejected: dict[str, int] = {}
    kinds = {"deselected": 0, "self_loops": 0, "accepted": 0}
    for row in counts.to_pylist():
        if row["reason"]:
            rejected[row["reason"]] = rejected.get(row["reason"], 0) + row["rows"]
        else:
            kind = "deselected" if row["action"] not in chosen else "self_loops" if row["loop"] else "accepted"
            kinds[kind] += row["rows"]
    return Counts(rejected=rejected, **kinds)


def clean(judged: Table, actions: Sequence[Action]) -> Table:
    """Distinct accepted rows: actor_id, target_id, action (its place among `actions`, int16), timestamp."""
    names = [action.name for action in actions]
    accepted = judged.filter(judged.reason.isnull(), judged.action.isin(names), judged.actor_id != judged.target_id)
    code = accepted.action.cases(*((name, code) for code, name in enumerate(names))).cast("int16")
    return accepted.select("actor_id", "target_id", "timestamp", action=code).distinct()


def _is_blank(log: Table, name: str) -> ibis.expr.types.BooleanValue:
    column = log[name]
    return column.isnull() | (column == "") if isinstance(column, StringValue) else column.isnull()
