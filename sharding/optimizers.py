"""One step of training: row-wise Adagrad inside the tables' backward, AdamW on the dense part, one schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from friendrec.sharding.config import OptimizerConfig
from friendrec.sharding.parallel import EPSILON, replicated_tables, sharded_tables


def schedule(config: OptimizerConfig, step: int, total: int) -> float:
    """Factor in [0, 1] on both peak rates at 0-based `step` of `total`: linear warm-up, then decay.

    >>> config = OptimizerConfig(warmup_share=0.2, decay="linear")
    >>> [round(schedule(config, step, 10), 3) for step in range(10)]
    [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    """
    warmup = round(config.warmup_share * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.decay == "linear" else 1.0


class Optimizers:
    """The optimizers of a sharded model, stepped together.

    `start_step` comes before forward, where FBGEMM takes along the rate at which backward will update the tables;
    `finish_step` comes after backward.
    Data-parallel tables have gradients like dense parameters, and are still given row-wise Adagrad, at the tables'
    rate and unclipped: how a table is spread must not change what is learned.
    """

    def __init__(self, dmp: DistributedModelParallel, config: OptimizerConfig) -> None:
        self.config = config
        self.factor = 0.0
        """On both peak rates, in the step at hand."""
        self.tables = dmp.fused_optimizer
        # By module, not by fused state: a table that lies whole on another rank leaves an empty parameter here.
        tables = {id(p) for p in sharded_tables(dmp).parameters()}
        dense = {name: p for name, p in dmp.named_parameters() if id(p) not in tables and p.requires_grad}
        self.dense = KeyedOptimizerWrapper(dense, self._adamw)
        self._parameters: list[nn.Parameter] = list(dense.values())
        self.combined = CombinedOptimizer([self.tables, ("dense", self.dense)])
        self.replicated = replicated_tables(dmp)
        self.replicated_adagrad = RowWiseAdagrad([{"params": [*self.replicated.values()]}], lr=0.0, eps=EPSILON)

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.config.dense_learning_rate)
        for p in parameters:  # what AdamW makes at its first step, made now: a checkpoint fits at any time
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adamw.state[p] = {"step": torch.tensor(0.0), **zeros}
        return adamw

    def start_step(self, step: int, total: int) -> None:
        """Set both rates for 0-based `step` of `total` by the schedule's factor, forget the old gradients."""
        self.factor = factor = schedule(self.config, step, total)
        for group in [*self.tables.param_groups, *self.replicated_adagrad.param_groups]:
            group["lr"] = self.config.table_learning_rate * factor
        for group in self.dense.param_groups:
            group["lr"] = self.config.dense_learning_rate * factor
        self.tables.step()  # hands the rate to the fused kernels; no row changes
        self.dense.zero_grad()
        self.replicated_adagrad.zero_grad()

    def finish_step(self) -> float:
        """Clip the dense gradient, step AdamW; returns the gradient's norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
        self.dense.step()
        self.replicated_adagrad.step()
        return float(norm)

    def accumulators(self, table: str) -> list[Tensor]:
        """Row-wise Adagrad's sum of squares of each row, `[rows]` a shard, in the order of `local_shards`.

        It is the storage itself.
        """
        for name, state in self.state_dict()["state"].items():
            if name.endswith(f".{table}.weight"):
                value = state[f"{table}.momentum1"]
                return [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        return []  # all of it lies on another rank

    def state_dict(self) -> dict[str, Any]:
        """State by parameter, under the same names and in the same shapes however a table is spread.

        Tensors are the storage itself, so that a checkpoint can be read into them.
        """
        return {"state": self.combined.state_dict()["state"] | self._replicated_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; what data-parallel tables have was read in place."""
        names = self._replicated_state()
        self.combined.load_state_dict({"state": {k: v for k, v in state["state"].items() if k not in names}})

    def _replicated_state(self) -> dict[str, dict[str, Tensor]]:
        """As the fused optimizer would have it: `{"….user.weight": {"user.momentum1": [rows]}}`."""
        momentum = {name: self.replicated_adagrad.state[p]["sum"].view(-1) for name, p in self.replicated.items()}
        return {name: {f"{name.split('.')[-2]}.momentum1": value} for name, value in momentum.items()}
