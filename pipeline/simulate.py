"""Simulate the log of a friend network whose true parameters are known.

Writes interactions/, users/ (profiles), truth/ (communities, joining times and activity: for the oracle, never an
input of a model) and a manifest with the parameters of the network. The same options give the same bytes.
"""

import shlex
from concurrent.futures import Future, wait
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

from friendrec.pipeline.publish import is_finished, publish

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

    from friendrec.datasets.simulator import SocialLog

PRESETS = {
    "regular": (2_000, 20_000),
    "4x": (8_000, 80_000),
    "scale": (1_000_000, 10_000_000),
    "reference": (2_000, 20_000),
}
"""Users and events."""
PART_ROWS = 2_000_000
"""Rows of a Parquet file; the last has the rest."""

EXAMPLES = """
friendrec simulate --out log
friendrec simulate --preset 4x --seed 1 --out log-4x
friendrec simulate --users 100000 --events 1000000 --out log-1m
friendrec simulate --preset scale --out log-10m
friendrec simulate --preset reference --out log-reference
"""


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    out: str
    """Directory or URL to create."""
    preset: Literal["regular", "4x", "scale", "reference"] = "regular"
    """regular: 2,000 users and 20,000 events in about 180 days; 4x: four times as many of both; scale: a million
    users and ten million events, in minutes. reference: as many as regular, follow/like/comment/share by the rules of
    the concept repository, for `evaluate --protocol reference`."""
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
    inputs = ("interactions",) if options.preset == "reference" else ("interactions", "users")
    paths = " ".join(f"--{name} {shlex.quote(options.out.rstrip('/') + '/' + name)}" for name in inputs)
    roles = "" if options.preset == "reference" else " --roles block=exclude"
    print(f"next: friendrec prepare {paths}{roles} --out data")


def _publish_log(options: SimulateOptions) -> None:
    import pyarrow.parquet as pq

    from friendrec.datasets.simulator import DEFAULTS

    users, events = options.size
    truth: dict[str, Any] = {"users": users, "events": events, "seed": options.seed}
    if options.preset != "reference":
        truth["parameters"] = DEFAULTS._asdict()
    with publish(options.out, kind="log", options=options, inputs={}, extra=truth) as attempt:
        tables = _tables(options)
        for name, table in tables.items():
            (attempt / name).mkdir()
            for part, begin in enumerate(range(0, len(table), PART_ROWS)):
                path = attempt / name / f"part-{part}.parquet"
                pq.write_table(table.slice(begin, PART_ROWS), path, compression="zstd")
    interactions = tables["interactions"]
    kinds = interactions["action"].value_counts().to_pylist()
    counted = ", ".join(sorted(f"{kind['values']} {kind['counts']:,}" for kind in kinds))
    first, last = (interactions["timestamp"][i].as_py().date() for i in (0, -1))
    print(f"{options.out}: {users:,} users, {events:,} events ({counted}) from {first} to {last}")


def _tables(options: SimulateOptions) -> "dict[str, pa.Table]":
    if options.preset == "reference":
        from friendrec.datasets.reference_log import reference_log

        return reference_log(*options.size, options.seed)._asdict()
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from friendrec.datasets.simulator import simulate

    events = np.zeros(1, np.int64)
    growing = _begun(lambda: simulate(*options.size, options.seed, progress=events))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("events", total=options.size[1])
        while wait([growing], timeout=0.2).not_done:
            bar.update(task, completed=events[0])
    log = growing.result()
    return {"interactions": log.interactions, "users": log.users, "truth": log.truth}


def _begun(work: "Callable[[], SocialLog]") -> "Future[SocialLog]":
    """Its result, from a thread that the process does not wait for: a pool's would hold up whoever asks to stop."""
    result: Future[SocialLog] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # raised where the result is asked for
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result
