"""Rows a second of `friendrec prepare` against a bare Parquet scan and sort of the same file, in one run.

python benchmarks/prepare.py --rows 5000000 --users 200000
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import report, table

from friendrec.pipeline.prepare import PrepareOptions, main


def write_log(path: Path, rows: int, users: int, seed: int) -> None:
    """A year of events with popular and idle users, and a few self-loops and duplicates."""
    random = np.random.default_rng(seed)
    actor, target = (np.minimum(users * random.random(rows) ** 3, users - 1).astype(np.int64) for _ in range(2))
    action = pa.DictionaryArray.from_arrays(random.integers(0, 3, rows, np.int32), ["accept", "message", "request"])
    time = pa.array(random.integers(1_600_000_000, 1_631_536_000, rows) * 1_000_000, pa.timestamp("us", tz="UTC"))
    log = pa.table({"actor_id": actor, "target_id": target, "action": action, "timestamp": time})
    pq.write_table(log, path, compression="zstd")


def scan_and_sort(path: Path, directory: Path, memory_limit: str) -> None:
    """Read every column, sort in total order, hand the rows over: what any preparation must do at least."""
    config = {"memory_limit": memory_limit, "temp_directory": str(directory), "preserve_insertion_order": False}
    engine = duckdb.connect(config=config)
    ordered = f"SELECT * FROM read_parquet('{path}') ORDER BY timestamp, actor_id, target_id, action"
    for _ in engine.sql(ordered).to_arrow_reader(1 << 20):
        pass


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--memory-limit", default="2GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write results/prepare.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.parquet"
        write_log(log, options.rows, options.users, seed=0)
        bare, whole = [], []
        for repeat in range(options.repeats):
            start = time.perf_counter()
            scan_and_sort(log, Path(folder) / "spill", options.memory_limit)
            bare.append(time.perf_counter() - start)
            start = time.perf_counter()
            out = str(Path(folder) / f"data-{repeat}")
            main(PrepareOptions(interactions=str(log), out=out, memory_limit=options.memory_limit))
            whole.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        size = log.stat().st_size / 2**20
    seconds = {"scan + sort": statistics.median(bare), "friendrec prepare": statistics.median(whole)}
    rows = [[name, f"{value:.2f}", f"{options.rows / value:,.0f}"] for name, value in seconds.items()]
    title = f"{options.rows:,} rows ({size:.0f} MiB), {options.users:,} users, medians of {options.repeats}"
    ratio = f"{seconds['friendrec prepare'] / seconds['scan + sort']:.1f}"
    text = f"{title}:\n\n{table(['', 'seconds', 'rows/s'], rows)}\n\nratio {ratio}, peak memory {peak:.2f} GiB"
    report("prepare", text, options.write)


if __name__ == "__main__":
    run()
