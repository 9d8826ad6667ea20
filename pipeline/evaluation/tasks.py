"""Which events are predicted, and among whom: the four tasks of the temporal protocol.

Every task is a set of events and a level of exclusion, so that one pass over three levels answers all four:

    task              events                                        not suggested (besides the actor and who is blocked)
    next_contact      every event                                   -
    new_link          first contact of the ordered pair             everyone the actor had contacted
    reply             ... whom the target had contacted before      the same
    unprompted_link   ... and had not                               also everyone who had contacted the actor

All of it strictly before the event's timestamp: events that share one never see each other.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.contacts import FirstContacts
from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError
from friendrec.pipeline.retrieval.exclusion import Jagged, one_each, union

TASKS = ("next_contact", "new_link", "reply", "unprompted_link")
STATES = ("live", "frozen")
PERIODS = ("validation", "test")
LEVELS = 3
LEVEL = {"next_contact": 0, "new_link": 1, "reply": 1, "unprompted_link": 2}


@dataclass(frozen=True)
class Events:
    """The scored events of a period, in total order. E events; users are dense rows, times µs."""

    index: NDArray[np.int64]  # [E] in the log's total order
    actor: NDArray[np.int64]
    target: NDArray[np.int64]
    timestamp: NDArray[np.int64]
    is_new: NDArray[np.bool_]  # the actor had not contacted the target
    is_reply: NDArray[np.bool_]  # is_new, and the target had contacted the actor

    def of_task(self, task: str) -> NDArray[np.bool_]:
        """Which events belong to a task, `[E]`."""
        everything = np.ones(len(self.index), bool)
        return {
            "next_contact": everything,
            "new_link": self.is_new,
            "reply": self.is_reply,
            "unprompted_link": self.is_new & ~self.is_reply,
        }[task]

    def at_level(self, level: int) -> NDArray[np.bool_]:
        """Which events some task ranks at a level of exclusion, `[E]`."""
        return np.logical_or.reduce([self.of_task(task) for task in TASKS if LEVEL[task] == level])

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Self:
        return replace(self, **{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Exclusions:
    """Who is no candidate for an actor at a time, by level."""

    num_candidates: int
    blocked: FirstContacts
    contacted: FirstContacts
    contacted_by: FirstContacts

    @classmethod
    def of(cls, data: PreparedData) -> Self:
        relations = FirstContacts.blocked(data), FirstContacts.contacted(data), FirstContacts.contacted_by(data)
        return cls(data.num_train_users, *relations)

    def at(self, level: int, actors: NDArray[np.int64], times: NDArray[np.int64]) -> Jagged:
        """Candidates that a level hides from each actor strictly before its time, the actor first of all."""
        relations = (self.blocked, self.contacted, self.contacted_by)[: level + 1]
        return union(self.num_candidates, one_each(actors), *(r.before(actors, times) for r in relations))


def scored_events(data: PreparedData, period: str, exclusions: Exclusions) -> tuple[Events, dict[str, int]]:
    """The events of a period that are scored, and the counts: events, uncovered, and those of each task.

    An event whose target is no candidate is uncovered.
    """
    events = period_events(data, period, exclusions)
    covered = events.target < exclusions.num_candidates
    covered &= ~exclusions.blocked.known(events.actor, events.target, events.timestamp)
    scored = events.take(covered)
    if not len(scored.index):
        raise FriendrecError(
            f"the {period} period has no event towards a user of the train period: nothing to score; "
            "use a longer log or other --splits"
        )
    counts = {"events": len(events.index), "uncovered": int((~covered).sum())}
    return scored, counts | {task: int(scored.of_task(task).sum()) for task in TASKS}


def period_events(data: PreparedData, period: str, exclusions: Exclusions) -> Events:
    """All events of a period that could be predicted: only actions of role `target` are."""
    train, validation = data.num_train_events, data.num_train_events + data.num_validation_events
    begin, end = {"validation": (train, validation), "test": (validation, data.num_events)}[period]
    predicted = np.array([action.role == "target" for action in data.actions])
    index = np.arange(begin, end)
    index = index[predicted[data.action[data.event_entry[index]]]]
    entry = data.event_entry[index]
    actor = np.searchsorted(data.offsets, entry, side="right") - 1
    target, time = data.partner[entry].astype(np.int64), data.timestamp[entry]
    is_new = ~exclusions.contacted.known(actor, target, time)
    is_reply = is_new & exclusions.contacted.known(target, actor, time)
    return Events(index, actor, target, time, is_new, is_reply)
