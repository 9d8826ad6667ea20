"""Train a model on prepared data, in one process or many.

The loop is `fit`, top to bottom: read, look up, loss, backward, step, log, checkpoint, validate. The same command runs
on CPU and GPU, alone, under torchrun and as a TorchX job; the losses agree at any number of processes.
"""

import dataclasses
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from friendrec.errors import FriendrecError
from friendrec.models.config import StuConfig
from friendrec.pipeline.arguments import parse_options
from friendrec.pipeline.config import PRESETS, RunConfig, preset, run_inputs
from friendrec.pipeline.publish import KINDS, is_finished, open_published, write_manifest
from friendrec.pipeline.together import say

if TYPE_CHECKING:
    from friendrec.pipeline.job import Job, Progress

EXAMPLES = """
friendrec train two_tower_mlp --data DATA --out RUN
friendrec train two_tower_mlp --data DATA --out RUN --epochs 5 --dim 32 --no-copy-term
friendrec train two_tower_mlp --data DATA --out RUN --plan-only --world-size 8
friendrec train two_tower_mlp --data DATA --out RUN --init-from EMBEDDINGS
friendrec train stu --data DATA --tokens STU --out RUN
torchrun --nproc-per-node 2 --no-python -- friendrec train two_tower_mlp --data DATA --out RUN --resume
"""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What to train, on what, and where to put it."""

    data: str
    """Prepared data set: what `friendrec prepare` made."""
    out: str
    """Directory of the run: config, checkpoints, metrics."""
    init_from: str | None = None
    """Vectors to start the user table from: what `friendrec export` made, or Parquet with user_id and a list column
    target or vector of --dim numbers. Users without one, and whatever is no user, keep their random first rows."""
    tokens: str | None = None
    """Codes of the users, which preset stu learns to write: what `friendrec tokenize` made."""
    resume: bool = False
    """Go on from the newest checkpoint in --out; start there where there is none."""
    plan_only: bool = False
    """Print the sharding plan and the memory a rank needs, and stop."""
    world_size: int = 1
    """Processes to plan for with --plan-only; training itself takes as many as were started."""
    config: Annotated[RunConfig, tyro.conf.OmitArgPrefixes]
    """The preset's fields, each to be overridden."""

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise FriendrecError(f"--world-size {self.world_size}: plan for at least 1 process")


def parse(argv: list[str]) -> TrainOptions:
    """`PRESET --data DATA --out RUN [any config field]`."""
    names = ", ".join(PRESETS)
    if not argv or argv[0].startswith("-"):
        if not {"-h", "--help"} & set(argv):
            raise FriendrecError(f"name a preset first: friendrec train PRESET --data DATA --out RUN; presets: {names}")
        argv = [next(iter(PRESETS)), "--help"]
    default = TrainOptions(data=tyro.MISSING, out=tyro.MISSING, config=preset(argv[0]))
    description = f"{__doc__}\n\nPresets: {names}. Defaults below are those of {argv[0]}."
    return parse_options(
        TrainOptions, argv[1:], prog=f"friendrec train {argv[0]}", description=description, examples=EXAMPLES,
        default=default,
    )  # fmt: skip


def main(options: TrainOptions) -> None:
    """Plan, train, publish."""
    if "://" in options.out:
        raise FriendrecError(f"--out {options.out}: checkpoints need a directory that every process can write to")
    _check_tokens(options)
    data, _ = open_published(options.data, "data")
    if options.plan_only:
        from friendrec.pipeline.job import print_plan

        print_plan(options.config, data, options.world_size, options.tokens)
        return
    inputs = run_inputs(data, options.init_from, options.tokens)
    if is_finished(options.out, kind="run", options=options.config.settings(), inputs=inputs):
        say(f"{options.out} is up to date")
        return
    out = _free(options, options.config.identity(inputs))
    from friendrec.pipeline import job

    with job.start(options.config, data, out, options.init_from, options.tokens) as running:
        progress = fit(running, running.restore())
        if progress.preempted:
            say(f"stopped on request after step {progress.step}; go on with --resume")
        elif running.rank == 0:
            _publish(running, progress, options)


def _check_tokens(options: TrainOptions) -> None:
    """Tokens come with preset stu, and with no other."""
    if not isinstance(options.config.model, StuConfig):
        if options.tokens is not None:
            raise FriendrecError(f"--tokens is for preset stu: leave it out, or train stu, not {options.config.preset}")
    elif options.tokens is None:
        raise FriendrecError("preset stu needs --tokens STU: what friendrec tokenize makes of exported embeddings")
    elif options.init_from is not None:
        raise FriendrecError("preset stu has no user table that --init-from could start: leave it out")


def fit(job: "Job", progress: "Progress") -> "Progress":
    """Train to the last epoch, the time limit, early stopping or SIGTERM, whichever comes first."""
    training = job.config.training
    total = training.epochs * job.reader.steps
    started = time.monotonic() - progress.seconds
    late = False
    with _StopRequest() as stop, job.progress_bar(total, progress.step) as bar:
        while not progress.done:
            for loss in job.losses(progress, total):
                agreed = job.agree(loss, stop.requested, progress.seconds > 60 * training.max_minutes)
                loss.backward()
                norm = job.optimizers.finish_step()
                mean_loss, stopping, late = agreed()
                progress.step, progress.batch = progress.step + 1, progress.batch + 1
                progress.seconds = time.monotonic() - started
                bar(mean_loss)
                job.log(progress, loss=mean_loss, learning_rate_factor=job.optimizers.factor, gradient_norm=norm)
                if stopping:
                    progress.preempted = True
                    job.save(progress)
                    return progress
                if late:
                    break
                if progress.step % training.checkpoint_steps == 0 and progress.batch < job.reader.steps:
                    job.save(progress)
            progress.epoch, progress.batch = progress.epoch + 1, 0
            _judge(job, progress)
            progress.done = late or progress.epoch == training.epochs or 0 < training.patience <= progress.stale
            job.save(progress)
    return progress


def _judge(job: "Job", progress: "Progress") -> None:
    """Make what there is fit to be published, validate it, remember the best step."""
    began = time.monotonic()
    job.settle()
    metrics = job.validate()
    taken = time.monotonic() - began
    progress.seconds, progress.validation_seconds = progress.seconds + taken, progress.validation_seconds + taken
    recall = metrics[job.config.training.stop_on]["recall@10"]
    progress.stale += 1
    if recall > progress.best_recall:
        progress.best_recall, progress.best_step, progress.stale = recall, progress.step, 0
    job.log(progress, validation=metrics)


class _StopRequest:
    """SIGTERM, noted for the end of the step. After an error it ends the process as it did before."""

    def __enter__(self) -> "_StopRequest":
        self.requested = False
        self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True


def _free(options: TrainOptions, identity: dict[str, Any]) -> Path:
    """The run's directory, once it is known to be free, or to hold an unfinished run of the same identity.

    Every rank looks before any writes, so that all of them end by the same line.
    """
    out = Path(options.out)
    if (out / "manifest.json").exists():
        kind, _, _ = KINDS[open_published(out)[1].kind]
        raise FriendrecError(f"{out} already holds {kind}, of other config or data: choose another --out")
    if (out / "config.json").exists():
        if not options.resume:
            raise FriendrecError(f"{out} holds an unfinished run: pass --resume to go on, or choose another --out")
        if json.loads((out / "config.json").read_text()) != identity:
            raise FriendrecError(f"{out} was begun with another config or data: choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FriendrecError(f"{out} exists and is no run: choose another --out")
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise FriendrecError(f"{out} cannot be made, {parent} is not a directory to write to: choose another --out")
    return out


def _publish(job: "Job", progress: "Progress", options: TrainOptions) -> None:
    """The manifest makes the directory a run; it names the best checkpoint."""
    job.close()
    examples = progress.step * job.config.reader.batch_size
    extra: dict[str, Any] = {
        "checkpoint": f"checkpoints/step-{progress.best_step}",
        "preset": job.config.preset,
        "parameters": job.parameters,
        "world_size": job.world_size,
        "sharding": dataclasses.asdict(job.config.sharding),
        "device": job.device.type,
        "train_seconds": round(progress.seconds, 1),
        "examples_per_second": round(examples / max(progress.seconds - progress.validation_seconds, 1e-9)),
        "progress": dataclasses.asdict(progress),
    }
    if job.reader.packer.codes is not None:
        extra["sizes"] = list(job.reader.packer.codes.sizes)
    inputs = run_inputs(options.data, options.init_from, options.tokens)
    write_manifest(job.out, kind="run", options=job.config.settings(), inputs=inputs, extra=extra)
    say(
        f"trained {progress.step} steps in {progress.seconds:.0f} s ({extra['examples_per_second']:,} examples/s); "
        f"best live {job.config.training.stop_on} Recall@10 {progress.best_recall:.3f} at step {progress.best_step}: "
        f"{options.out}"
    )
