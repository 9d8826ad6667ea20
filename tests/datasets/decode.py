"""Reads a Context back, query by query, in dense rows: what a model can see, and nothing of how it is laid out."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from friendrec.datasets.batch import Context
from friendrec.datasets.packing import Packer, Queries
from friendrec.datasets.state import Contacts, PointInTime

Rows = np.ndarray


@dataclass(frozen=True)
class Seen:
    """One query: its actor's row, its history oldest first, its contacts."""

    actor: int
    condition: int
    clock: tuple[float, ...]
    partners: list[int]
    kinds: list[int]
    times: list[int]
    gaps: list[float]
    contacts: list[int]
    features: list[list[float]]


def decode(context: Context) -> list[Seen]:
    row = table_rows(context)
    event_at = {position: event for event, position in enumerate(context.event_position.tolist())}
    assert len(event_at) == len(context.event_position)
    offsets = context.contact_offsets.tolist()
    seen = []
    for q in range(len(context.actor)):
        window = range(int(context.window_begin[q]), int(context.window_end[q]))
        events = [event_at[position] for position in window]
        contacts = slice(offsets[q], offsets[q + 1])
        seen.append(
            Seen(
                actor=row[int(context.actor[q])],
                condition=int(context.condition[q]),
                clock=tuple(context.clock[q].tolist()),
                partners=[row[slot] for slot in context.event_user[events].tolist()],
                kinds=context.event_kind[events].tolist(),
                times=context.event_time[events].tolist(),
                gaps=context.event_gap[events].tolist(),
                contacts=[row[slot] for slot in context.contact_user[contacts].tolist()],
                features=context.contact_features[contacts].tolist(),
            )
        )
    return seen


def table_rows(context: Context) -> list[int]:
    """Row of the user table that each slot reads."""
    return context.ids["user"].values().tolist()


def rows_of(context: Context, slots: Tensor) -> Rows:
    return np.array(table_rows(context))[slots.numpy()]


def queries(users: Rows, times: Rows, groups: Rows | None = None, actors: Rows | None = None) -> Queries:
    """Queries for any action; each its own packed sequence unless grouped."""
    return Queries(
        users=users,
        times=times,
        groups=np.arange(len(users)) if groups is None else groups,
        conditions=np.zeros(len(users), np.int64),
        actors=users if actors is None else actors,
    )


def pack(packer: Packer, asked: Queries) -> Context:
    return packer.pack(asked, contacts_of(packer, asked))[0]


def contacts_of(packer: Packer, asked: Queries) -> Contacts:
    return PointInTime(packer.data).contacts(asked.users, asked.times, packer.config.contacts)
