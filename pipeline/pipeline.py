"""Run the whole chain: prepare, train, export, index, evaluate, recommend, each stage as a TorchX job.

Writes OUT/{data,run,embeddings,index,report,recommendations} and the jobs' logs to OUT/logs. Preset stu learns to write
codes of users, which are made of a two-tower's embeddings: that run is OUT/base, the codes are OUT/stu, and both models
stand side by side in the report. Preset two_tower_clusters is searched by its own clusters. The same command again goes
on at the first stage that is not finished.
"""

import json
import os
import shlex
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from friendrec.datasets.preparation_config import Correctable
from friendrec.errors import FriendrecError
from friendrec.pipeline.cli import read_verb
from friendrec.pipeline.manifest import absolute
from friendrec.pipeline.prepare import open_inputs, option_words
from friendrec.pipeline.publish import fingerprint, open_published

EXAMPLES = """
friendrec pipeline --interactions log.parquet --out work
friendrec pipeline --interactions log.parquet --out work --nproc 2 --train-args="--max-minutes 5"
friendrec pipeline --interactions log/ --out work --prepare-args="--columns actor_id=src,timestamp=t --time-unit ms"
friendrec pipeline --interactions log.parquet --out work --preset stu --tokenize-args="--codebook-size 128"
friendrec pipeline --interactions log.parquet --out work --preset two_tower_clusters --index-args="--dtype int8"
"""
DECIDES = {
    "interactions": "data", "prepare_args": "data", "base_args": "base", "tokenize_args": "stu", "preset": "run",
    "train_args": "run", "index_args": "index", "evaluate_args": "report",
}  # fmt: skip
"""The first output that depends on an option."""
BASE = "two_tower_mlp"
"""Preset of the run whose embeddings preset stu tokenizes."""
INDEX_KIND = {"two_tower_clusters": "clusters", "stu": "stu"}
"""Kind of index of a preset's run where --index-args names none; of all others it is exact."""


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    interactions: str
    """Interaction log: Parquet file, directory or URL."""
    out: str
    """Directory for everything that is made."""
    preset: str = "two_tower_mlp"
    """What to train: see `friendrec train --help`."""
    nproc: int = 2
    """Processes that train and export together: one a GPU, or a few on a CPU."""
    scheduler: str = "local_cwd"
    """TorchX scheduler that runs the stages: local_cwd is this machine."""
    scheduler_args: str = ""
    """Its options, as in `torchx run -cfg key=value,key=value`."""
    image: str = "friendrec:latest"
    """Container image of the stages, where the scheduler runs containers."""
    mounts: str = ""
    """Volumes of the stages, as TorchX writes them: type=bind,src=/data,dst=/data."""
    prepare_args: str = ""
    """More options of `friendrec prepare`, in one string: --prepare-args="--time-unit ms"."""
    train_args: str = ""
    """More options of `friendrec train`, in one string."""
    base_args: str = ""
    """Preset stu: more options of `friendrec train two_tower_mlp`, whose embeddings are tokenized, in one string."""
    tokenize_args: str = ""
    """Preset stu: more options of `friendrec tokenize`, in one string: --tokenize-args="--num-codebooks 4"."""
    index_args: str = ""
    """More options of `friendrec index`, in one string: --index-args="--kind hnsw". Without --kind the index is exact,
    of preset two_tower_clusters its clusters, of stu its tokens."""
    evaluate_args: str = "--baselines"
    """More options of `friendrec evaluate`, in one string."""

    def __post_init__(self) -> None:
        for name in ("base_args", "tokenize_args"):
            if getattr(self, name) and self.preset != "stu":
                flag = f"--{name.replace('_', '-')}"
                raise FriendrecError(f"{flag} is for preset stu: leave it out, or pass --preset stu")


@dataclass(frozen=True)
class Stage:
    """One job: `friendrec VERB ARGS`, which publishes `output`."""

    verb: str
    output: str
    args: tuple[str, ...]
    nproc: int = 1

    @property
    def name(self) -> str:
        """Of its output."""
        return self.output.rpartition("/")[2]

    @property
    def title(self) -> str:
        """The verb, and of training the preset."""
        return f"train {self.args[0]}" if self.verb == "train" else self.verb


def main(options: PipelineOptions) -> None:
    """Run what is not finished yet, then say what came out."""
    from friendrec.pipeline.summary import print_summary

    out = options.out if "://" in options.out else str(Path(options.out).absolute())
    stages = _stages(options, out)
    finished = [stage.name for stage in stages if _is_finished(stage)]
    _check(stages, finished)
    _remember(options, out, finished)
    for stage in _unfinished(stages):
        _run(stage, options, out)
        if not _is_finished(stage):
            raise FriendrecError(f"{stage.title} stopped before its end: run the same command to go on")
    print_summary(out)


def _stages(options: PipelineOptions, out: str) -> list[Stage]:
    data, run, embeddings, index = (f"{out}/{name}" for name in ("data", "run", "embeddings", "index"))
    prepare, train, evaluate = map(shlex.split, (options.prepare_args, options.train_args, options.evaluate_args))
    kind = () if _names_kind(options) else ("--kind", INDEX_KIND.get(options.preset, "exact"))
    indexed = (*kind, *shlex.split(options.index_args))
    prepared = Stage("prepare", data, ("--interactions", absolute(options.interactions), *prepare))
    if options.preset == "stu":
        base, tokens = f"{out}/base", ("--tokens", f"{out}/stu")
        models = [
            Stage("train", base, (BASE, "--data", data, "--resume", *shlex.split(options.base_args)), options.nproc),
            Stage("export", embeddings, ("--run", base, "--data", data), options.nproc),
            Stage("tokenize", tokens[1], ("--embeddings", embeddings, *shlex.split(options.tokenize_args))),
            Stage("train", run, ("stu", "--data", data, *tokens, "--resume", *train), options.nproc),
            Stage("index", index, (*tokens, *indexed)),
        ]
        evaluate = ["--also", base, *evaluate]
    else:
        models = [
            Stage("train", run, (options.preset, "--data", data, "--resume", *train), options.nproc),
            Stage("export", embeddings, ("--run", run, "--data", data), options.nproc),
            Stage("index", index, ("--embeddings", embeddings, *indexed)),
        ]
    model = ("--run", run, "--data", data, "--index", index)
    return [
        prepared,
        *models,
        Stage("evaluate", f"{out}/report", (*model, *evaluate)),
        Stage("recommend", f"{out}/recommendations", model),
    ]


def _names_kind(options: PipelineOptions) -> bool:
    return any(word.partition("=")[0] == "--kind" for word in shlex.split(options.index_args))


def _unfinished(stages: list[Stage]) -> Iterator[Stage]:
    """The first stage without a result and all after it, whose results would be of something else."""
    fresh = False
    for number, stage in enumerate(stages, 1):
        fresh = fresh or not _is_finished(stage)
        print(f"[{number}/{len(stages)}] {stage.title}{'' if fresh else ': finished before'}", flush=True)
        if fresh:
            yield stage


def _is_finished(stage: Stage) -> bool:
    try:
        open_published(stage.output)
    except FriendrecError:
        return False
    return True


def _check(stages: list[Stage], finished: Container[str]) -> None:
    """Tell mistakes in the options of any stage, and in the log, before the first job starts."""
    for stage in stages:
        _, options = read_verb([stage.verb, *stage.args, "--out", stage.output])
        if stage.verb != "prepare" or stage.name in finished:
            continue
        try:
            open_inputs(options)
        except Correctable as mistake:
            words = option_words(replace(options, **mistake.change), without=("interactions", "out"))
            raise FriendrecError(
                f"{mistake}: run the same command with --prepare-args={shlex.quote(shlex.join(words))}"
            ) from mistake


def _remember(options: PipelineOptions, out: str, finished: Container[str]) -> None:
    """Hold the directory to one log and one set of options: going on with others would mix two models.

    What only stages decide that are not finished may still change.
    """
    import fsspec

    settings = {name: getattr(options, name) for name in DECIDES} | {"interactions": fingerprint(options.interactions)}
    fs, root = fsspec.core.url_to_fs(f"{out}/pipeline.json")
    before = json.loads(fs.cat_file(root)) if fs.exists(root) else {}
    kept = {name: value for name, value in settings.items() if DECIDES[name] in finished}
    changed = [name for name, value in kept.items() if before.get(name, value) != value]
    if changed:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise FriendrecError(f"{out} was begun with other {names}: choose another --out")
    fs.makedirs(root.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(root, json.dumps(settings, indent=1).encode())


def _run(stage: Stage, options: PipelineOptions, out: str) -> None:
    """Run one stage as a job and wait for it, with its output on ours. A signal ends the job, then us."""
    from torchx.runner import get_runner
    from torchx.schedulers.local_scheduler import SignalException
    from torchx.specs import AppState

    from friendrec.torchx_components import components

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the jobs' `python`
    chosen: dict[str, Any] = {"image": options.image, "mounts": options.mounts.split(",") if options.mounts else None}
    chosen |= {"nproc": stage.nproc} if stage.nproc > 1 else {}
    app = getattr(components, stage.verb)(*stage.args, "--out", stage.output, **chosen)
    try:
        with get_runner() as runner:
            cfg = runner.scheduler_run_opts(options.scheduler).cfg_from_str(options.scheduler_args)
            if options.scheduler == "local_cwd" and "://" not in out:
                cfg.setdefault("log_dir", f"{out}/logs")
            handle = runner.run(app, options.scheduler, cfg)
            for line in runner.log_lines(handle, stage.verb, should_tail=True):
                print(line, end="" if line.endswith("\n") else "\n", flush=True)
            status = runner.wait(handle, wait_interval=0.2)
    except SignalException as interrupt:
        sys.exit(128 + interrupt.sigval)
    if status is None or status.state != AppState.SUCCEEDED:
        state = status.state.name.lower() if status else "lost"
        raise FriendrecError(f"{stage.title} {state}, see its output above; the same command goes on from here")
