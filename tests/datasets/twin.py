"""The obvious twin of the prepared arrays and of the point-in-time state: plain Python over lists of events."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from friendrec.datasets.prepared import PreparedData
from tests.synthetic import prepared_from_events

HOUR = 3_600_000_000  # µs
OUT, IN = 0, 1
Entry = tuple[int, str, int, int]  # partner, action, direction, µs

events = st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from("ab"), st.integers(0, 12))
logs = st.lists(events, min_size=1, max_size=40).filter(lambda log: any(a != b for a, b, _, _ in log))
"""Raw events (actor, target, action, hour) with loops, duplicates and many ties."""


@dataclass(frozen=True)
class Twin:
    """A clean log in total order, in dense rows."""

    events: list[tuple[int, int, str, int]]  # actor, target, action, µs

    def entries(self, user: int, before: float = math.inf) -> list[Entry]:
        """A user's sequence strictly before a time."""
        found: list[Entry] = []
        for actor, target, action, time in self.events:
            if time < before and actor == user:
                found.append((target, action, OUT, time))
            if time < before and target == user:
                found.append((actor, action, IN, time))
        return found

    def contacts(self, user: int, before: float, limit: int) -> list[int]:
        """Distinct partners strictly before a time, most recent first."""
        return list(dict.fromkeys(entry[0] for entry in reversed(self.entries(user, before))))[:limit]


def pair_state(entries: list[Entry], partner: int, now: int) -> dict[str, list[float]]:
    """What a user's entries say of one partner: counts and runs, times, decayed counts at `now`; [out, in] each."""
    pair = [entry for entry in entries if entry[0] == partner]
    times = [[entry[3] for entry in pair if entry[2] == side] for side in (OUT, IN)]
    runs = []
    for side in (OUT, IN):
        length = 0
        while length < len(pair) and pair[-1 - length][2] == side:
            length += 1
        runs.append(length)
    decays = [sum(math.exp((t - now) / 1e6 / tau) for t in side) for side in times for tau in (86_400, 30 * 86_400)]
    return {
        "counts": [len(times[OUT]), len(times[IN]), *runs],
        "last": [max(side, default=-math.inf) for side in times],
        "first": [min(side, default=-math.inf) for side in times],
        "decays": decays,
    }


@contextmanager
def prepared(
    log: list[tuple[int, int, str, int]], unit: int = HOUR, chunk_length: int = 256, splits: tuple[int, int] = (80, 90)
) -> Iterator[tuple[PreparedData, Twin]]:
    """A log prepared on disk, and its twin."""
    actor, target, action, time = zip(*log, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        data = prepared_from_events(
            actor, target, action, np.array(time) * unit, splits=splits, chunk_length=chunk_length, path=Path(folder)
        )
        clean = sorted({(t * unit, a, b, name) for a, b, name, t in log if a != b})
        row = {user: place for place, user in enumerate(data.user_ids.tolist())}
        yield data, Twin([(row[a], row[b], name, t) for t, a, b, name in clean])


def random_log(seed: int, users: int, length: int, hours: int, start: int = 0) -> list[tuple[int, int, str, int]]:
    """A log of uniform users at uniform hours in [start, hours); every action comes first, so codes never move."""
    rng = np.random.default_rng(seed)
    columns = rng.integers(0, users, (2, length)).tolist(), rng.integers(start, hours, length).tolist()
    return [(a, b, "ab"[k % 2], t) for k, (a, b, t) in enumerate(zip(*columns[0], columns[1], strict=True))]
