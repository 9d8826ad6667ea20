"""The config of a run: every component's own config, composed; and the presets, which are named points in it."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from friendrec.datasets.config import ContextConfig, ReaderConfig
from friendrec.errors import FriendrecError
from friendrec.models.config import StuConfig, TwoTowerConfig
from friendrec.pipeline.arguments import did_you_mean
from friendrec.pipeline.publish import fingerprint
from friendrec.sharding.config import OptimizerConfig, ShardingConfig


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
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 computes matrix products of training in bfloat16, for GPUs; weights and loss stay float32. On a CPU it is
    slower."""

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
    model: Annotated[TwoTowerConfig | StuConfig, tyro.conf.AvoidSubcommands] = field(default_factory=TwoTowerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)

    def __post_init__(self) -> None:
        if self.model.history_encoder == "transformer" and self.model.num_layers >= self.context.context_length:
            raise FriendrecError(
                f"num_layers {self.model.num_layers} is not below context_length {self.context.context_length}: "
                "each layer and the read-out look back at least one event"
            )
        if isinstance(self.model, StuConfig) != (self.reader.negatives == "none"):
            raise FriendrecError(
                f"negatives {self.reader.negatives} are not for preset {self.preset}: two towers need some, tokens none"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def settings(self) -> dict[str, Any]:
        """What makes a run the one it is; where its tables lie is free to change, like the number of processes."""
        return {name: value for name, value in self.to_dict().items() if name != "sharding"}

    def identity(self, inputs: Mapping[str, str | Path]) -> dict[str, Any]:
        """What makes a run from its inputs the same run as another: its `config.json`."""
        fingerprints = {name: fingerprint(path) for name, path in inputs.items()}
        return json.loads(json.dumps({"config": self.settings(), **fingerprints}))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`, and of `settings` up to the sharding, which is then the default."""
        classes = {f.name: f.type for f in dataclasses.fields(cls) if f.name in values and f.name != "preset"}
        classes["model"] = StuConfig if "decoder" in values["model"] else TwoTowerConfig
        return cls(preset=values["preset"], **{name: part(**values[name]) for name, part in classes.items()})  # type: ignore[operator,arg-type]

    @classmethod
    def load(cls, run: Path) -> "RunConfig":
        """The config that `friendrec train` left in a run's directory."""
        return cls.from_dict(json.loads((run / "config.json").read_text())["config"])


def run_inputs(data: str | Path, init_from: str | None, tokens: str | None = None) -> dict[str, str | Path]:
    """What a run is made from, by name."""
    given = {"init_from": init_from, "tokens": tokens}
    return {"data": data} | {name: path for name, path in given.items() if path}


def two_tower_mlp() -> RunConfig:
    """Pooled multi-head attention over the history and an MLP: the first step of the climb."""
    return RunConfig(preset="two_tower_mlp")


def two_tower_moe() -> RunConfig:
    """A transformer over the history and four experts: three times the dense parameters, the same tables."""
    return RunConfig(
        preset="two_tower_moe",
        model=TwoTowerConfig(history_encoder="transformer", interaction="moe"),
        optimizer=OptimizerConfig(dense_learning_rate=1e-3),  # at 3e-3 it finds fewer new friends, on two logs of two
    )


def two_tower_clusters() -> RunConfig:
    """`two_tower_moe` with clusters inside the model, which are the lists of its index."""
    moe = two_tower_moe()
    return replace(moe, preset="two_tower_clusters", model=replace(moe.model, clusters="residual"))


def stu() -> RunConfig:
    """Users as short codes of tokens; a decoder writes the code of the next friend, token by token."""
    return RunConfig(preset="stu", model=StuConfig(), reader=ReaderConfig(negatives="none"))


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "two_tower_mlp": two_tower_mlp,
    "two_tower_moe": two_tower_moe,
    "two_tower_clusters": two_tower_clusters,
    "stu": stu,
}


def preset(name: str) -> RunConfig:
    """A preset's config by name."""
    if name not in PRESETS:
        raise FriendrecError(f"unknown preset {name!r}: {did_you_mean(name, PRESETS)}")
    return PRESETS[name]()
