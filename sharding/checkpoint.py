"""Checkpoints by torch.distributed.checkpoint: whole or absent, and loadable at any world size.

    FOLDER/step-200/   .metadata  __0_0.distcp  __1_0.distcp  checkpoint.json
    FOLDER/.step-300/  an attempt: being written, or what a killed run left

Every rank writes its own shards; what is in them has the same names and shapes at any world size and however a table
is spread, but for tables split by columns. Rank 0 writes `checkpoint.json` (what the model is, the files' sizes, the
caller's `extra`) and renames the attempt last, so a `step-` directory is complete.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed import DistributedModelParallel

from friendrec.errors import FriendrecError
from friendrec.sharding.optimizers import Optimizers
from friendrec.sharding.parallel import column_shards
from friendrec.sharding.plan import tables_of

_DESCRIPTION = "checkpoint.json"


def save(
    folder: Path,
    step: int,
    dmp: DistributedModelParallel,
    optimizers: Optimizers,
    extra: dict[str, Any],
    keep: int = 2,
    protect: int | None = None,
) -> Path:
    """Write FOLDER/step-<step> from all ranks; the `keep` newest stay, and step `protect`.

    `extra` (JSON, rank 0's) comes back by `load`.

    Holds weights, momentum, Adam's moments, each rank's torch RNG state and `extra`. Learning rates are not state:
    `Optimizers.start_step` computes them from the step.
    """
    extra = json.loads(json.dumps(extra))  # what JSON cannot hold fails here, on all ranks, not while they wait
    final, attempt = folder / f"step-{step}", folder / f".step-{step}"
    if dist.get_rank() == 0:
        for abandoned in folder.glob(".step-*"):
            shutil.rmtree(abandoned)
        attempt.mkdir(parents=True)
    dist.barrier()
    with _one_line(f"{attempt} cannot be written", "free space or choose another --out"):
        dcp.save(_state(dmp, optimizers) | _rng_state(), checkpoint_id=attempt)
    if dist.get_rank() == 0:
        files = {file.name: file.stat().st_size for file in sorted(attempt.iterdir())}
        description = {
            "ranks": dist.get_world_size(),
            "shapes": _shapes(dmp),
            "column_shards": column_shards(dmp),
            "files": files,
            "extra": extra,
        }
        _write_durably(attempt / _DESCRIPTION, description)
        shutil.rmtree(final, ignore_errors=True)
        attempt.rename(final)
        for old in set(_steps(folder)[:-keep]) - {protect}:
            shutil.rmtree(folder / f"step-{old}")
    dist.barrier()
    return final


def load(path: Path, dmp: DistributedModelParallel, optimizers: Optimizers | None = None) -> dict[str, Any]:
    """Restore in place what `save` wrote at any world size and sharding; returns its `extra`. Call it on every rank.

    Without `optimizers` only the model is read; with them, a table split by columns must be split alike. The RNG state
    of a rank comes back where the saving run had it.
    """
    description = _describe(path)
    _refuse_another_model(path, description["shapes"], _shapes(dmp))
    if optimizers is not None:
        _refuse_other_columns(path, description.get("column_shards", {}), column_shards(dmp))
    state = _state(dmp, optimizers)
    if optimizers is not None and dist.get_rank() < description["ranks"]:
        state |= _rng_state()
    with _one_line(f"{path} cannot be read", "choose another step"):
        dcp.load(state, checkpoint_id=path)
    dmp.load_state_dict(state["model"])
    if optimizers is not None:
        optimizers.load_state_dict(state["optimizers"])
        torch.set_rng_state(state.get(_rng_key(), torch.get_rng_state()))
    return dict(description["extra"])


def load_whole(path: Path, model: nn.Module) -> None:
    """Read the model of a checkpoint into one process, tables whole: for inference, without a process group."""
    tables_of(model).to_empty(device="cpu")
    state = {"model": model.state_dict()}
    _refuse_another_model(path, _describe(path)["shapes"], _shapes(model))
    with _one_line(f"{path} cannot be read", "choose another step"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant
        dcp.load(state, checkpoint_id=path, no_dist=True)
    model.load_state_dict(state["model"])


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in FOLDER, or None. Attempts and damaged directories are passed over."""
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step}"
        try:
            _describe(path)
        except FriendrecError:
            continue
        return path
    return None


def _steps(folder: Path) -> list[int]:
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name[1]) for name in names if name)


def _describe(path: Path) -> dict[str, Any]:
    """`checkpoint.json`, once every file it lists is there in full."""
    try:
        description: dict[str, Any] = json.loads((path / _DESCRIPTION).read_text())
        damaged = [name for name, size in description["files"].items() if (path / name).stat().st_size != size]
    except (OSError, ValueError, KeyError) as error:
        raise FriendrecError(f"{path} is not a complete checkpoint ({error}): choose another step") from None
    if damaged:
        raise FriendrecError(f"{path} is damaged ({damaged[0]} has another size): choose another step")
    return description


@contextmanager
def _one_line(what: str, remedy: str) -> Iterator[None]:
    """What failed on any rank, as the user's one line on all."""
    try:
        yield
    except CheckpointException as error:  # a BaseException: `except Exception` would let it through
        reason, _ = next(iter(error.failures.values()))
        raise FriendrecError(f"{what} ({str(reason).splitlines()[0]}): {remedy}") from error


def _state(dmp: DistributedModelParallel, optimizers: Optimizers | None) -> dict[str, Any]:
    state: dict[str, Any] = {"model": dmp.state_dict()}
    return state if optimizers is None else state | {"optimizers": optimizers.state_dict()}


def _rng_state() -> dict[str, Any]:
    return {_rng_key(): torch.get_rng_state()}


def _rng_key() -> str:
    return f"rng.{dist.get_rank()}"


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """Global shape of every parameter and buffer by name: what makes two models the same to a checkpoint."""
    return {name: list(value.size()) for name, value in model.state_dict().items()}


def _refuse_another_model(path: Path, saved: dict[str, list[int]], own: dict[str, list[int]]) -> None:
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            there, here = (f"of shape {shapes[name]}" if name in shapes else "absent" for shapes in (saved, own))
            raise FriendrecError(
                f"{path} is a checkpoint of another model: {name} is {there} there and {here} here; "
                "load it with the preset, options and data set that it was trained with"
            )


def _refuse_other_columns(path: Path, saved: dict[str, int], own: dict[str, int]) -> None:
    """Row-wise Adagrad keeps one number a row and shard, of the shard's columns only: no other split follows."""
    for table in sorted(saved.keys() | own.keys()):
        there, here = saved.get(table, 1), own.get(table, 1)
        if there != here:
            way = f"column_wise on {there} processes" if there > 1 else "another sharding than column_wise"
            raise FriendrecError(
                f"{path} cannot go on here: table {table} has {there} column shards there and {here} here, and "
                f"row-wise Adagrad's state of one shard says nothing of the columns of others; go on with {way}"
            )


def _write_durably(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
