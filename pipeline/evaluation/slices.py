"""Which events a figure may hold for, and for which it does not: the ways in which a period's events are cut up.

What a query knew of its actor differs live and frozen, and so may the slice of an event. Each event is in one slice of
every slicing.
"""

from dataclasses import dataclass
from typing import Self

import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.contacts import FirstContacts
from friendrec.datasets.prepared import IN, PreparedData
from friendrec.datasets.state import lower_bounds
from friendrec.pipeline.evaluation.scoring import asked
from friendrec.pipeline.evaluation.tasks import STATES, Events

HISTORY_BINS = {"0": 0, "1-5": 1, "6-20": 6, "21-50": 21, "51+": 51}
"""Slices by the number of events, sent or received, that the query knew of its actor: the first of each."""
DECILES = tuple(str(decile) for decile in range(1, 11))
DISTANCES = ("one hop", "two hops", "further")


@dataclass(frozen=True)
class Slicing:
    """Names of the slices, and the place among them of each event's, `[E]` by state."""

    names: tuple[str, ...]
    of: dict[str, NDArray[np.int64]]

    @classmethod
    def same(cls, names: tuple[str, ...], place: NDArray[np.int64]) -> Self:
        """One that is the same live and frozen."""
        return cls(names, dict.fromkeys(STATES, place))

    @classmethod
    def no_or_yes(cls, is_so: NDArray[np.bool_]) -> Self:
        return cls.same(("no", "yes"), is_so.astype(np.int64))


def slicings(data: PreparedData, events: Events) -> dict[str, Slicing]:
    """All of them by name."""
    met = FirstContacts.met(data)
    lengths = {state: history_length(data, events, state) for state in STATES}
    starts = np.array(list(HISTORY_BINS.values()))
    return {
        "history_length": Slicing(
            tuple(HISTORY_BINS), {state: np.searchsorted(starts, n, side="right") - 1 for state, n in lengths.items()}
        ),
        "target_degree_decile": Slicing.same(DECILES, degree_deciles(data, met)[events.target]),
        "action": Slicing.same(
            tuple(action.name for action in data.actions), data.action[data.event_entry[events.index]].astype(np.int64)
        ),
        "distance": Slicing(DISTANCES, {state: distances(data, met, events, state) for state in STATES}),
        "new_actor": Slicing.no_or_yes(events.actor >= data.num_train_users),
        "new_target": Slicing.no_or_yes(~received_in_train(data)[events.target]),
    }


def history_length(data: PreparedData, events: Events, state: str) -> NDArray[np.int64]:
    """How many events of the actor each query knows, `[E]`."""
    actors, as_of, query = asked(data, events, state)
    begins = data.offsets[actors]
    known: NDArray[np.int64] = lower_bounds(data.timestamp, begins, data.offsets[actors + 1], as_of) - begins
    return known[query]


def degree_deciles(data: PreparedData, met: FirstContacts) -> NDArray[np.int64]:
    """The tenth, from 0, to which each candidate belongs by how many others it met in the train period, `[N]`.

    Who ties shares the tenth in the middle of them all, so some tenths may be empty.
    """
    candidates = np.arange(data.num_train_users)
    degree = met.degrees(candidates, np.full(len(candidates), data.train_until))
    below, upto = (np.searchsorted(np.sort(degree), degree, side=side) for side in ("left", "right"))
    deciles: NDArray[np.int64] = 10 * (below + upto) // (2 * len(candidates))
    return np.minimum(deciles, 9)


def received_in_train(data: PreparedData) -> NDArray[np.bool_]:
    """Whom anybody had turned to in the train period, `[U]`."""
    entries = np.flatnonzero((data.direction == IN) & (data.timestamp < data.train_until))
    users = np.searchsorted(data.offsets, entries, side="right") - 1
    return np.bincount(users, minlength=data.num_users) > 0


def distances(data: PreparedData, met: FirstContacts, events: Events, state: str) -> NDArray[np.int64]:
    """Places in DISTANCES of each event's target from its actor, in the graph of who the query knew had met, `[E]`."""
    as_of = events.timestamp if state == "live" else np.full(len(events.actor), data.train_until)
    degrees = met.degrees(events.actor, as_of), met.degrees(events.target, as_of)
    return _distances(met.offsets, met.other, events.actor, events.target, *degrees)


@numba.njit(cache=True, nogil=True)
def _distances(offsets, other, actor, target, actor_degree, target_degree):  # type: ignore[no-untyped-def]
    """0 where they have met, 1 where they share a neighbour, 2 where neither; `[E]`."""
    found = np.full(len(actor), 2)
    marked = np.full(len(offsets) - 1, -1)  # the last event whose actor each user is a neighbour of
    for e in range(len(actor)):
        for n in other[offsets[actor[e]] : offsets[actor[e]] + actor_degree[e]]:
            marked[n] = e
        if marked[target[e]] == e:
            found[e] = 0
            continue
        for n in other[offsets[target[e]] : offsets[target[e]] + target_degree[e]]:
            if marked[n] == e:
                found[e] = 1
                break
    return found
