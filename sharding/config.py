"""Where the tables lie, and the rates of training; free of torch, so that the command line stays quick."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from friendrec.errors import FriendrecError

Sharding = Literal["row_wise", "table_wise", "column_wise", "data_parallel", "auto"]

READ_WHOLE = frozenset({"cluster"})
"""Tables that may be long and that every batch reads from the first row to the last."""
SMALL_TABLE = 4 << 20
"""Bytes up to which such a table is copied to every process rather than sent there in every step."""


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Where the tables lie, and on what: free to change when a run is resumed.

    It changes no loss, but for column_wise: row-wise Adagrad keeps one number a row and shard.
    """

    sharding: Sharding = "row_wise"
    """How the user table is spread. row_wise: equal ranges of rows, the one that grows with the number of processes.
    table_wise: whole on one. column_wise: equal ranges of columns; its checkpoints go on with the same sharding and
    number of processes only. data_parallel: a copy on each, for small tables. auto: TorchRec's planner chooses."""
    table_sharding: dict[str, Sharding] = field(default_factory=dict)
    """The same for other tables, by name as --plan-only prints it. Default: row_wise where every process gets a row,
    table_wise for shorter tables; data_parallel for a table that every batch reads whole, as long as it has no more
    than 4 MiB; with --sharding auto, auto."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What trains; auto takes CUDA where torch finds it."""

    def __post_init__(self) -> None:
        known = get_args(Sharding)
        for table, sharding in {"user": self.sharding, **self.table_sharding}.items():
            if sharding not in known:
                raise FriendrecError(f"sharding of table {table} is {sharding!r}: choose one of {', '.join(known)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise FriendrecError(f"device is {self.device!r}: choose auto, cpu or cuda")

    def of(self, table: str) -> Sharding | None:
        """What is asked for a table; None leaves it to its size."""
        if table in self.table_sharding:
            return self.table_sharding[table]
        return self.sharding if table == "user" or self.sharding == "auto" else None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Rates are per step on the mean loss of the global batch, so the world size never enters them."""

    table_learning_rate: float = 0.05
    """Peak rate of row-wise Adagrad on the tables. Raise it when rare users stay near their first rows."""
    dense_learning_rate: float = 3e-3
    """Peak rate of AdamW on everything else. Lower it when the loss spikes."""
    warmup_share: float = 0.1
    """Share of all steps over which both rates rise linearly from 0; 0 starts at the peak."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How both rates go from the peak towards 0 at the last step; constant keeps the peak."""
    weight_decay: float = 1e-4
    """AdamW's decoupled decay of dense matrices; biases, norms and tables are not decayed."""
    clip_norm: float = 1.0
    """Largest global norm of the dense gradient. The tables' fused update is out of its reach."""

    def __post_init__(self) -> None:
        for name in ("table_learning_rate", "dense_learning_rate", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise FriendrecError(f"{name} is {getattr(self, name)}: choose a finite number of at least 0")
        if not 0 <= self.warmup_share < 1:
            raise FriendrecError(f"warmup_share is {self.warmup_share}: choose a share in [0, 1)")
        if not self.clip_norm > 0:
            raise FriendrecError(f"clip_norm is {self.clip_norm}: choose a number above 0 (inf switches it off)")
        if self.decay not in ("cosine", "linear", "constant"):
            raise FriendrecError(f"decay is {self.decay!r}: choose cosine, linear or constant")
