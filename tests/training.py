"""Small published data sets, and the verbs run on them, alone or on the workers of `tests/distributed/harness.py`."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from friendrec.pipeline import export, index, recommend, tokenize, train
from friendrec.pipeline.export import ExportOptions
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.publish import publish
from friendrec.pipeline.recommend import RecommendOptions
from friendrec.pipeline.tokenize import TokenizeOptions
from tests.synthetic import prepared_from_events

DAY = 86_400_000_000  # µs
CHUNK = 32
SMALL = (
    "--dim=8", "--num-heads=2", "--hidden=16", f"--batch-size={CHUNK}", "--uniform-negatives=4", "--recent-negatives=4",
    "--shared-negatives=8", "--contacts=6", "--context-length=12", "--validation-events=80", "--actor-dropout=0.2",
)  # fmt: skip
SMALL_STU = (*(option for option in SMALL if "negatives" not in option), "--decoder-hidden=16", "--memory=6")
ROLES = {"request": "history", "block": "exclude"}


def publish_data(out: Path, users: int = 150, events: int = 1200, seed: int = 0, text: bool = False) -> Path:
    """Circles of ten who write each other, again and again; requests are history, blocks exclusions, ids have gaps.

    Every user has a profile of zero to two of five courses; the last twelve users come after the train period.
    """
    rng = np.random.default_rng(seed)
    actor = (users * rng.random(events) ** 1.5).astype(np.int64)
    near = actor // 10 * 10 + rng.integers(0, 10, events)
    target = np.where(rng.random(events) < 0.8, np.minimum(near, users - 1), rng.integers(0, users, events))
    early, late_users = np.arange(events) < 0.85 * events, 12
    actor[early], target[early] = actor[early] % (users - late_users), target[early] % (users - late_users)
    action = rng.choice(["message", "request", "poke", "block"], events, p=[0.6, 0.2, 0.15, 0.05])
    time = 400 * DAY + np.sort(rng.integers(0, 100 * DAY, events))
    time[1::7] = time[::7][: len(time[1::7])]  # some events share a time
    ids = 7 * np.arange(users) + 1000
    names = np.array([f"user-{i}" for i in ids], object) if text else ids
    extra: dict[str, Any] = {}
    with publish(out, kind="data", options={"seed": seed, "users": users}, inputs={}, extra=extra) as attempt:
        data = prepared_from_events(
            names[actor], names[target], action, time, roles=ROLES, chunk_length=CHUNK, path=attempt
        )
        extra.update(users=data.num_users, events=data.num_events, cleaning={"rows": events})
        courses = rng.integers(0, 3, data.num_users)
        (attempt / "profiles").mkdir()
        pq.write_table(pa.table({"code": range(1, 6), "value": list("abcde")}), attempt / "profiles" / "course.parquet")
        np.save(attempt / "arrays" / "profile_course_offsets.npy", np.concatenate([[0], np.cumsum(courses)]))
        codes = rng.integers(1, 6, courses.sum()).astype(np.int32)
        np.save(attempt / "arrays" / "profile_course_values.npy", codes)
    return out


@contextmanager
def joined() -> Iterator[None]:
    """Verbs in a worker of the harness, which is in a process group already, or in a process without; all steps log."""
    import torch
    import torch.distributed as dist

    from friendrec.pipeline import job
    from friendrec.sharding import parallel

    with ExitStack() as stack:
        for module in (job, parallel) if dist.is_initialized() else ():
            stack.enter_context(patch.object(module, "process_group", lambda *_: nullcontext(torch.device("cpu"))))
        stack.enter_context(patch.object(job, "LOG_EVERY", 1))
        yield


def train_run(data: Path, out: Path, *args: str) -> None:
    """`friendrec train two_tower_mlp` with small widths; on workers called on every rank."""
    options = train.parse(["two_tower_mlp", f"--data={data}", f"--out={out}", *SMALL, *args])
    with joined():
        train.main(options)


def export_run(**options: Any) -> None:
    with joined():
        export.main(ExportOptions(**options))


def recommend_run(**options: Any) -> None:
    with joined():
        recommend.main(RecommendOptions(**options))


def index_embeddings(embeddings: Path, out: Path) -> Path:
    index.main(IndexOptions(embeddings=str(embeddings), out=str(out)))
    return out


def recorded(run: Path) -> dict[int, Any]:
    """The lines of metrics.jsonl by step: a loss, or (under the negative step) the metrics of a validation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keyed = [(-line["step"], line["validation"]) if "validation" in line else (line["step"], line) for line in lines]
    assert len(dict(keyed)) == len(keyed), "a step stands there twice"
    return {step: line if step < 0 else line["loss"] for step, line in keyed}


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    return {step: line for step, line in recorded(run).items() if step > 0}


def at_step(wanted: int, act: Callable[[], None]) -> Any:
    """While this patch holds, `act` is called at the end of step `wanted` of training."""
    from friendrec.pipeline.job import Job

    log = Job.log

    def noticed(job: Job, progress: Any, **values: Any) -> None:
        log(job, progress, **values)
        if progress.step == wanted and "loss" in values:
            act()

    return patch.object(Job, "log", noticed)


def kill(signum: int = signal.SIGKILL) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), signum)


def tokenize_embeddings(embeddings: Path, out: Path, codebook_size: int = 8, **options: Any) -> Path:
    tokenize.main(TokenizeOptions(embeddings=str(embeddings), codebook_size=codebook_size, out=str(out), **options))
    return out


def train_stu_run(data: Path, tokens: Path, out: Path, *args: str) -> None:
    """`friendrec train stu` with small widths; on workers called on every rank."""
    options = train.parse(["stu", f"--data={data}", f"--tokens={tokens}", f"--out={out}", *SMALL_STU, *args])
    with joined():
        train.main(options)
