"""Simulate the log of a friend network whose true parameters are known.

Writes interactions/, users/ (profiles), truth/ (communities, joining times and activity: for tests only, never an
input of a model) and a manifest with the parameters of the network. The same options give the same bytes.
"""

import shlex
from dataclasses import dataclass
from typing import Literal

from friendrec.pipeline.publish import is_finished, publish

PRESETS = {"regular": (2_000, 20_000), "4x": (8_000, 80_000)}
"""Users and events."""

EXAMPLES = """
friendrec simulate --out log
friendrec simulate --preset 4x --seed 1 --out log-4x
friendrec simulate --users 100000 --events 1000000 --out log-1m
"""


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    out: str
    """Directory or URL to create."""
    preset: Literal["regular", "4x"] = "regular"
    """regular: 2,000 users and 20,000 events in about 180 days; 4x: four times as many of both."""
    users: int | None = None
    """Number of users, 2 or more, instead of the preset's. Some may never act."""
    events: int | None = None
    """Exact number of events, 1 or more, instead of the preset's."""
    seed: int = 0
    """Another seed draws another network with the same parameters."""

    @property
    def size(self) -> tuple[int, int]:
        """Users and events."""
        users, events = PRESETS[self.preset]
        return users if self.users is None else self.users, events if self.events is None else self.events


def main(options: SimulateOptions) -> None:
    """Publish the log at `options.out`, or find it there already."""
    if is_finished(options.out, kind="log", options=options, inputs={}):
        print(f"{options.out} is this log already.")
    else:
        _publish_log(options)
    interactions, users = (shlex.quote(f"{options.out.rstrip('/')}/{name}") for name in ("interactions", "users"))
    print(f"next: friendrec prepare --interactions {interactions} --users {users} --out data")


def _publish_log(options: SimulateOptions) -> None:
    import pyarrow.parquet as pq

    from friendrec.datasets.simulator import DEFAULTS, simulate

    users, events = options.size
    truth = {"users": users, "events": events, "seed": options.seed, "parameters": DEFAULTS._asdict()}
    with publish(options.out, kind="log", options=options, inputs={}, extra=truth) as attempt:
        log = simulate(users, events, options.seed)
        tables = {"interactions": log.interactions, "users": log.users, "truth": log.truth}
        for name, table in tables.items():
            (attempt / name).mkdir()
            pq.write_table(table, attempt / name / "part-0.parquet", compression="zstd")
    kinds = log.interactions["action"].value_counts().to_pylist()
    counted = ", ".join(sorted(f"{kind['values']} {kind['counts']:,}" for kind in kinds))
    first, last = (log.interactions["timestamp"][i].as_py().date() for i in (0, -1))
    print(f"{options.out}: {users:,} users, {events:,} events ({counted}) from {first} to {last}")
