"""The config of a run: every component's own config, composed; and the presets, which are named points in it."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from friendrec.datasets.config import ContextConfig, ReaderConfig
from friendrec.errors import FriendrecError
from friendrec.models.config import TwoTowerConfig
from friendrec.pipeline.arguments import did_you_mean
from friendrec.pipeline.publish import fingerprint
from friendrec.sharding.config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train and when to look."""

    epochs: int = 3
    """Passes over the train period."""
    max_minutes: float = 10.0
    """Wall-clock minutes of training after which it stops with what it has, earlier attempts included."""
    patience: int = 1
    """Validations without improvement after which training stops early; 0 never stops early."""
    stop_on: Literal["next_contact", "new_link"] = "new_link"
    """Task whose live Recall@10 on the validation period picks the checkpoint and stops training."""
    validation_events: int = 2000
    """Events of the validation period scored after every epoch, spread evenly over it."""
    checkpoint_steps: int = 500
    """Steps between checkpoints inside an epoch; one is always written after it."""
    seed: int = 0
    """Seed of initial weights, order, negatives and dropout."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.validation_events, self.checkpoint_steps) < 1:
            raise FriendrecError("epochs, validation_events and checkpoint_steps must be at least 1")
        if not self.max_minutes > 0 or self.patience < 0 or self.seed < 0:
            raise FriendrecError("max_minutes must be above 0, patience and seed at least 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that makes a run, beside its data."""

    preset: Annotated[str, tyro.conf.Suppress]
    context: ContextConfig = field(default_factory=ContextConfig)
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    model: TwoTowerConfig = field(default_factory=TwoTowerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def identity(self, data: Path) -> dict[str, Any]:
        """What makes a run on prepared data the same run as another: its `config.json`."""
        return json.loads(json.dumps({"config": self.to_dict(), "data": fingerprint(data)}))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`."""
        parts = {f.name: f.type for f in dataclasses.fields(cls) if f.name != "preset"}
        return cls(preset=values["preset"], **{name: part(**values[name]) for name, part in parts.items()})  # type: ignore[operator,misc]

    @classmethod
    def load(cls, run: Path) -> "RunConfig":
        """The config that `friendrec train` left in a run's directory."""
        return cls.from_dict(json.loads((run / "config.json").read_text())["config"])


def two_tower_mlp() -> RunConfig:
    """Pooled multi-head attention over the history and an MLP: the first step of the climb."""
    return RunConfig(preset="two_tower_mlp")


PRESETS: dict[str, Callable[[], RunConfig]] = {"two_tower_mlp": two_tower_mlp}


def preset(name: str) -> RunConfig:
    """A preset's config by name."""
    if name not in PRESETS:
        raise FriendrecError(f"unknown preset {name!r}: {did_you_mean(name, PRESETS)}")
    return PRESETS[name]()
