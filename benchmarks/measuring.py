"""What the benchmarks share: data to work on, medians of interleaved repetitions, a dated result."""

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from friendrec.pipeline import prepare, simulate
from friendrec.pipeline.publish import open_published

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark that works on prepared data."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[], help="prepared data sets beside the simulated log")
    parser.add_argument("--users", type=int, default=2_000, help="users of the simulated log")
    parser.add_argument("--events", type=int, default=20_000, help="events of the simulated log")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, of which the median counts")
    parser.add_argument("--write", action="store_true", help="write results/<name>.md")
    return parser


@contextmanager
def workplace(prefix: str = "friendrec-benchmark-") -> Iterator[Path]:
    """A folder that goes when the block ends."""
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        yield Path(folder)


def simulated(folder: Path, users: int, events: int) -> Path:
    """A simulated log, prepared."""
    log, data = folder / f"log-{users}-{events}", folder / f"simulated {users:,} users {events:,} events"
    simulate.main(simulate.SimulateOptions(out=str(log), users=users, events=events))
    prepare.main(prepare.PrepareOptions(interactions=str(log / "interactions"), out=str(data)))
    return data


def opened(paths: Sequence[str]) -> list[Path]:
    """Prepared data sets that the user named."""
    return [open_published(path, "data")[0] for path in paths]


def medians(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way: see `in_turns`."""
    return {name: statistics.median(values) for name, values in in_turns(ways, repeats).items()}


def in_turns(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, after one call to warm up; they take turns, so a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of neighbours in time: the median is bold, the range tells how quiet the machine was."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"**{statistics.median(ratios):.2f}×** ({min(ratios):.2f}–{max(ratios):.2f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned to be read in a terminal too."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [header, *rows]]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def report(name: str, text: str, write: bool) -> None:
    """Print the result; with `write` keep it, with the date, the command and the machine."""
    print(text)
    if not write:
        return
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(["python", f"benchmarks/{name}.py", *(a if " " not in a else repr(a) for a in sys.argv[1:])])
    kept = f"# {name}\n\n{datetime.date.today()}, {machine()}\n\n```\n{command}\n```\n\n{text}\n"
    (RESULTS / f"{name}.md").write_text(kept)


def machine() -> str:
    """Cores, processor, load."""
    info = Path("/proc/cpuinfo")
    names = {line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")}
    processor = ", ".join(sorted(names)) or platform.processor()
    return f"{os.cpu_count()} cores ({processor}), load average before the end {os.getloadavg()[0]:.1f}"
