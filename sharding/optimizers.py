"""One step of training: row-wise Adagrad inside the tables' backward, AdamW on the dense part, one schedule."""

import math

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from friendrec.sharding.config import OptimizerConfig
from friendrec.sharding.parallel import sharded_tables


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
    """The two optimizers of a sharded model, stepped together.

    `start_step` comes before forward, because the tables are updated inside backward; `finish_step` after it.
    """

    def __init__(self, dmp: DistributedModelParallel, config: OptimizerConfig) -> None:
        self.config = config
        self.tables = dmp.fused_optimizer
        # By module, not by fused state: a table that lies whole on another rank leaves an empty parameter here.
        tables = {id(p) for p in sharded_tables(dmp).parameters()}
        dense = {name: p for name, p in dmp.named_parameters() if id(p) not in tables and p.requires_grad}
        self.dense = KeyedOptimizerWrapper(dense, self._adamw)
        self._parameters: list[nn.Parameter] = list(dense.values())
        self.combined = CombinedOptimizer([self.tables, ("dense", self.dense)])

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

    def start_step(self, step: int, total: int) -> float:
        """Set both rates for 0-based `step` of `total`, forget the old gradients; returns the schedule's factor."""
        factor = schedule(self.config, step, total)
        for group in self.tables.param_groups:
            group["lr"] = self.config.table_learning_rate * factor
        for group in self.dense.param_groups:
            group["lr"] = self.config.dense_learning_rate * factor
        self.tables.step()  # hands the rate to the fused kernels; no row changes
        self.dense.zero_grad()
        return factor

    def finish_step(self) -> float:
        """Clip the dense gradient, step AdamW; returns the gradient's norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
        self.dense.step()
        return float(norm)
