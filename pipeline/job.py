"""A training job: what `train.fit` steps through, set up on every rank."""

import atexit
import dataclasses
import gc
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchrec.distributed import DistributedModelParallel

from friendrec.datasets.batch import Batch
from friendrec.datasets.packing import Tables
from friendrec.datasets.prepared import load_prepared
from friendrec.datasets.reader import Reader
from friendrec.errors import FriendrecError
from friendrec.pipeline import forward
from friendrec.pipeline.build import build_model
from friendrec.pipeline.clustering import ClusterTraining
from friendrec.pipeline.config import RunConfig, run_inputs
from friendrec.pipeline.initial import open_given, start_from
from friendrec.pipeline.tokens import TOKENS, codes_of, read_tokens, write_tokens
from friendrec.pipeline.validation import Validation
from friendrec.sharding import checkpoint
from friendrec.sharding.optimizers import Optimizers
from friendrec.sharding.parallel import process_group, shard, sharded_tables
from friendrec.sharding.plan import make_plan, plan_table, shards

LOG_EVERY = 10  # steps between scalars

# The reader forks its workers, and gloo's threads do not come along: collecting a process group that was garbage in the
# parent would block or crash a worker. So a child leaves alone whatever existed before it.
os.register_at_fork(after_in_child=gc.freeze)

# Nor is the last collection worth its seconds: what the process ends for, other ranks must not wait to hear.
atexit.register(gc.freeze)


@dataclass(kw_only=True)
class Progress:
    """How far training is: all of its state that is not in tensors, saved with every checkpoint."""

    epoch: int = 0
    batch: int = 0
    """Batches read in this epoch."""
    step: int = 0
    seconds: float = 0.0
    validation_seconds: float = 0.0
    """Those of them that validating took."""
    best_recall: float = -1.0
    best_step: int = 0
    stale: int = 0
    """Validations since the best."""
    done: bool = False
    """Nothing is left to train: the last epoch, the time limit or early stopping came."""
    preempted: bool = False
    revived: int = 0
    """Dead centroids that were put elsewhere."""


@dataclass
class Job:
    """One rank's share of a training job."""

    config: RunConfig
    out: Path
    reader: Reader
    model: DistributedModelParallel
    optimizers: Optimizers
    validation: Validation
    clusters: ClusterTraining | None
    """What places the lists of a model with clusters."""
    parameters: int
    rank: int
    world_size: int
    device: torch.device
    writer: SummaryWriter | None = None
    """Rank 0's, from `restore` on."""

    def batches(self, epoch: int, batch: int) -> Iterator[Batch]:
        """This rank's batches from there on, each with as many bags as the rank that needs most has.

        Row-wise tables must be asked for equally many on all ranks, and every bag travels. The ranks agree on a batch
        while they train on the one before.
        """
        ahead: deque[tuple[Batch, Tensor, dist.Work]] = deque()
        for read in self.reader.batches(epoch, batch):
            bags = torch.tensor(read.context.ids.stride())
            ahead.append((read, bags, dist.all_reduce(bags, dist.ReduceOp.MAX, async_op=True)))
            if len(ahead) > 1:
                yield _level(*ahead.popleft())
        yield from (_level(*last) for last in ahead)

    def losses(self, progress: Progress, total: int) -> Iterator[Tensor]:
        """This rank's loss in each step that is left of the epoch, out of `total` in all; its backward comes next.

        The mean over ranks is the loss of the global batch. Before each forward the rates of its step are set.
        """

        def loss_of(batch: Batch) -> Tensor:
            self.optimizers.start_step(progress.step, total)
            if self.clusters is not None:
                progress.revived += self.clusters.start_step(progress.step, total)
            loss: Tensor = self.model(batch)
            return loss

        for batches in self._parts(progress):
            precision = self.config.training.precision
            yield from forward.losses(loss_of, sharded_tables(self.model), batches, self.device, precision)

    def _parts(self, progress: Progress) -> Iterator[Iterator[Batch]]:
        """The batches left of the epoch, at one go, or in two with k-means between them: it looks up on its own."""
        batches = self.batches(progress.epoch, progress.batch)
        if self.clusters is not None and progress.step <= self.clusters.first:
            yield islice(batches, self.clusters.first - progress.step)
            self._refuse_to_go_on_with_nan()
            self.clusters.place()
        yield batches

    def agree(self, loss: Tensor, stop: bool, late: bool) -> Callable[[], tuple[float, bool, bool]]:
        """Ask all ranks for their loss, and whether they were asked to stop or are late, without waiting for them.

        What it returns waits, and answers with the mean loss over the global batch and whether any rank is to stop or
        is late. A step on a loss that is no number has then been taken, but is never saved.
        """
        sums = torch.stack([loss.detach(), loss.new_tensor(float(stop)), loss.new_tensor(float(late))])
        asked = dist.all_reduce(sums, async_op=True)

        def answer() -> tuple[float, bool, bool]:
            asked.wait()
            mean, stops, lates = (sums / self.world_size).tolist()
            if not math.isfinite(mean):
                raise _diverged(f"the loss is {mean}")
            return mean, stops > 0, lates > 0

        return answer

    def settle(self) -> None:
        """After an epoch, or when time is up: lists as even as they are to be published."""
        self._refuse_to_go_on_with_nan()
        if self.clusters is not None:
            self.clusters.settle()

    def validate(self) -> dict[str, dict[str, float]]:
        """Metrics of the tasks on events of the validation period, live."""
        self._refuse_to_go_on_with_nan()
        return self.validation.metrics(self.model.module)

    def save(self, progress: Progress) -> None:
        """A checkpoint of this step; the one before it stays, and the best."""
        self._refuse_to_go_on_with_nan()
        extra = {"progress": dataclasses.asdict(progress)}
        checkpoint.save(
            self.out / "checkpoints", progress.step, self.model, self.optimizers, extra, protect=progress.best_step
        )

    def restore(self) -> Progress:
        """Progress of the newest checkpoint, loaded; from the start where there is none."""
        newest = checkpoint.latest(self.out / "checkpoints")
        saved = checkpoint.load(newest, self.model, self.optimizers)["progress"] if newest else {}
        progress = Progress(**saved | {"preempted": False})
        if self.rank == 0:
            _forget_later(self.out / "metrics.jsonl", progress.step)
            self.writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=progress.step + 1)
        return progress

    def log(self, progress: Progress, **values: Any) -> None:
        """A line of metrics.jsonl and TensorBoard scalars: losses every LOG_EVERY steps, validations always.

        Losses are the global batch's; what the model tells beside them is of this rank's slice.
        """
        if self.writer is None or ("validation" not in values and progress.step % LOG_EVERY):
            return
        if "loss" in values:
            values |= self.model.module.scalars()
            if self.clusters is not None:
                values["clusters"]["revived"] = progress.revived
        line = {"step": progress.step, "epoch": progress.epoch, "seconds": round(progress.seconds, 2), **values}
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in _flat(values).items():
            self.writer.add_scalar(name, value, progress.step)

    def close(self) -> None:
        """Write out what is still in memory."""
        if self.writer is not None:
            self.writer.close()

    def _refuse_to_go_on_with_nan(self) -> None:
        """A step may blow up the weights after its loss was found finite: no checkpoint or metric must come of them."""
        broken = torch.tensor(sum(not p.sum().isfinite() for p in self.model.parameters()))
        dist.all_reduce(broken)
        if broken:
            raise _diverged(f"{int(broken)} parameters are not finite any more")

    @contextmanager
    def progress_bar(self, total: int, done: int) -> Iterator[Callable[[float], None]]:
        """A bar on rank 0 with loss, examples/s and the time left; yields what to call with each step's loss."""
        if self.rank:
            yield lambda loss: None
            return
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:,.0f} examples/s"), TimeRemainingColumn(),
        )  # fmt: skip
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total, completed=done, loss=math.nan, rate=0.0)

            def advance(loss: float) -> None:
                bar.update(task, advance=1, loss=loss, rate=(bar.tasks[0].speed or 0) * self.config.reader.batch_size)

            yield advance


@contextmanager
def start(
    config: RunConfig, data_path: Path, out: Path, init_from: str | None = None, tokens: str | None = None
) -> Iterator[Job]:
    """Set up this rank: process group, reader, sharded model, optimizers; the plan is printed on rank 0.

    A run that has no checkpoint yet takes the first rows of its users from the vectors at `init_from`. Users are their
    codes in the STU table at `tokens`, where it is given; the run keeps a copy.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    data = load_prepared(data_path)
    is_new = checkpoint.latest(out / "checkpoints") is None
    given = open_given(init_from, data, config.model.dim) if init_from and is_new else None
    table = read_tokens(tokens)[0] if tokens else None
    codes = codes_of(table, data, f"--tokens {tokens}") if table else None
    with process_group(config.sharding.device) as device:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        clusters = config.model.clusters_of(data.num_train_users)
        reader = Reader(data, config.context, config.reader, config.training.seed, rank, world_size, codes, clusters)
        model = build_model(config, reader.packer.tables)
        if model.copy_term is not None:
            model.copy_term.standardise(_contact_sample(reader))
        parameters = sum(p.numel() for p in model.parameters())
        validation = Validation.sample(reader.packer, config.training.validation_events, config.training.stop_on)
        plan = make_plan(model, world_size, config.sharding, device.type, dist.group.WORLD)
        if rank == 0:
            Console(stderr=True).print(plan_table(model, plan, world_size))
            out.mkdir(parents=True, exist_ok=True)
            _write(out / "plan.json", [dataclasses.asdict(s) for s in shards(model, plan)])
            identity = config.identity(run_inputs(data_path, init_from, tokens))
            _write(out / "config.json", identity)  # from here on it is a run, to be resumed
            if table is not None:
                write_tokens(out / TOKENS, table.user_ids, table.tokens)
        sharded = shard(model, plan, device, config.training.seed)
        if given is not None:
            start_from(given, sharded)
        optimizers = Optimizers(sharded, config.optimizer)
        total = config.training.epochs * reader.steps
        yield Job(
            config=config,
            out=out,
            reader=reader,
            model=sharded,
            optimizers=optimizers,
            validation=validation,
            clusters=ClusterTraining.of(sharded, optimizers, reader.packer, total, reader.steps),
            parameters=parameters,
            rank=rank,
            world_size=world_size,
            device=device,
        )


def print_plan(config: RunConfig, data_path: Path, world_size: int, tokens: str | None = None) -> None:
    """The sharding plan for a number of processes, made without them."""
    sizes = read_tokens(tokens)[0].sizes if tokens else ()
    data = load_prepared(data_path)
    model = build_model(config, Tables.of(data, sizes, config.model.clusters_of(data.num_train_users)))
    Console().print(plan_table(model, make_plan(model, world_size, config.sharding), world_size))


def _level(read: Batch, bags: Tensor, agreed: dist.Work) -> Batch:
    agreed.wait()
    return read.with_bags(int(bags))


def _contact_sample(reader: Reader, size: int = 2000) -> Tensor:
    """Pair features at examples spread evenly over the train period, the same on every rank."""
    chosen = np.linspace(0, len(reader.entry) - 1, min(size, len(reader.entry))).astype(np.int64)
    times = reader.data.timestamp[reader.entry[chosen]]
    contacts = reader.packer.state.contacts(reader.user[chosen], times, reader.packer.config.contacts)
    return torch.from_numpy(contacts.features)


def _diverged(what: str) -> FriendrecError:
    return FriendrecError(
        f"{what}: lower --dense-learning-rate or --table-learning-rate and start again in another --out; "
        "the last checkpoint is untouched"
    )


def _write(path: Path, content: Any) -> None:
    """Whole or not at all, wherever the run is killed."""
    attempt = path.with_name(f".{path.name}")
    attempt.write_text(json.dumps(content, indent=1))
    attempt.rename(path)


def _forget_later(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again, and the half line of a killed one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested scalars by path: `{"a": {"b": 1}}` -> `{"a/b": 1}`."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: float(value)}
    return flat
