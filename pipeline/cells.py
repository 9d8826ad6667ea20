"""Runs that are to be compared: each trained on the same data with the same budget, in processes of its own, once."""

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from friendrec import __version__
from friendrec.errors import FriendrecError
from friendrec.pipeline import train
from friendrec.pipeline.climb import Row
from friendrec.pipeline.config import RunConfig, run_inputs
from friendrec.pipeline.launch import WORKER
from friendrec.pipeline.publish import Manifest, is_finished, read_manifest

if TYPE_CHECKING:
    from friendrec.datasets.prepared import PreparedData


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every run is made from, and what it may cost."""

    data: str
    minutes: float
    epochs: int
    nproc: int


@dataclass(frozen=True)
class Cell:
    """A row on its way: where it lies, and how it is trained."""

    row: Row
    place: Path
    run: Path
    train: list[str]
    config: RunConfig
    steps: int

    @property
    def tokens(self) -> Path | None:
        """The codes that it writes."""
        return self.place / "stu" if self.row.codes_of else None

    @property
    def base(self) -> Path | None:
        """The run whose embeddings they are made of."""
        return self.place.parent / self.row.codes_of / "run" if self.row.codes_of else None

    def inputs(self, data: str) -> dict[str, str | Path]:
        """What its run is made from."""
        return run_inputs(data, None, str(self.tokens) if self.tokens else None)


def plan(row: Row, place: Path, budget: Budget, data: "PreparedData") -> Cell:
    """How a row is trained: for as many steps as `budget.epochs` passes over every event of `data` take.

    One that was begun otherwise stops it before anything is trained.
    """
    from friendrec.datasets.reader import Reader

    run = place / "run"
    words = [row.preset, "--data", budget.data, "--out", str(run), "--resume", *row.flags]
    words += ["--max-minutes", str(budget.minutes), "--patience", "0"]
    words += ["--tokens", str(place / "stu")] if row.codes_of else []
    config = train.parse(words).config
    every, own = (
        Reader(data, config.context, reader, config.training.seed).steps
        for reader in (train.parse([*words, "--temporal"]).config.reader, config.reader)
    )
    steps = budget.epochs * every
    words += ["--epochs", str(-(-steps // own))]
    cell = Cell(row, place, run, words, train.parse(words).config, steps)
    if _begun_otherwise(cell, budget.data):
        raise FriendrecError(
            f"{run} was trained on other data or with another budget: "
            "pass the same --data, --minutes and --epochs, or choose another --out"
        )
    return cell


def made_before(cell: Cell, budget: Budget, runs: Iterable[Path]) -> Cell:
    """The cell with the first of the finished `runs` that is its own in all but the preset's name; else as it is."""
    wanted = _unnamed(cell.config.identity(cell.inputs(budget.data)))
    for run in runs:
        same = (run / "manifest.json").exists() and _unnamed(json.loads((run / "config.json").read_text())) == wanted
        if same and _made_alike(read_manifest(run, "run"), cell, budget):
            return replace(cell, run=run)
    return cell


def _made_alike(manifest: Manifest, cell: Cell, budget: Budget) -> bool:
    """By this friendrec, and to its last step, or by as many processes: more of them get farther in the same time."""
    whole = manifest.extra["progress"]["step"] >= cell.steps
    return manifest.versions["friendrec"] == __version__ and (whole or manifest.extra["world_size"] == budget.nproc)


def is_trained(cell: Cell, data: str) -> bool:
    """Whether its run, in its own place, is finished."""
    return is_finished(cell.run, kind="run", options=cell.config.settings(), inputs=cell.inputs(data))


def train_cell(cell: Cell, budget: Budget) -> None:
    """Train its run to the end, unless that is done."""
    if not is_trained(cell, budget.data):
        call(cell.place, ["train", *cell.train], budget.nproc, cell.run)


def call(place: Path, words: list[str], nproc: int, out: Path) -> None:
    """Run a verb in processes of its own, which publish `out`; progress is shown here, the rest is in PLACE/VERB.log.

    A signal ends it first, so that training leaves a checkpoint, then us.
    """
    launcher = (*WORKER[:-1], "friendrec.pipeline.launch", "--nproc", str(nproc), "--")
    place.mkdir(parents=True, exist_ok=True)
    log = place / f"{words[0]}.log"
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    with log.open("a") as said:
        process = subprocess.Popen([*(launcher if nproc > 1 else WORKER), *words], stdout=said, env=environment)
        try:
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
    if code or not (out / "manifest.json").exists():
        raise FriendrecError(f"{words[0]} of {place.name} stopped, see above and {log}; the same command goes on here")


def _begun_otherwise(cell: Cell, data: str) -> bool:
    """Whether its run was begun with other settings or data; not where its codes are still to be made again."""
    begun = cell.run / "config.json"
    if not begun.exists() or (cell.tokens and not cell.tokens.exists()):
        return False
    same: bool = json.loads(begun.read_text()) == cell.config.identity(cell.inputs(data))
    return not same


def _unnamed(identity: dict[str, Any]) -> dict[str, Any]:
    """A run's identity but for what its preset is called."""
    return identity | {"config": {name: value for name, value in identity["config"].items() if name != "preset"}}
