"""Where every table's rows live: TorchRec's planner, its answer as plain rows, and the memory a rank needs."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from rich.table import Table as RichTable
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ShardingPlan, ShardingType

_FLOAT = 4  # bytes
_UNLIMITED = 1 << 60  # the plan states what a rank needs, also on a machine that is too small for it


class Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # TorchRec is untyped
    """TorchRec's sharder, offering row-wise on CPU too: exact there, only not on the list."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types: list[str] = super().sharding_types(compute_device_type)
        return types if ShardingType.ROW_WISE.value in types else [*types, ShardingType.ROW_WISE.value]


@dataclass(frozen=True)
class Shard:
    """The rows of one table on one rank. Row-wise Adagrad keeps one float a row."""

    table: str
    sharding: str
    rank: int
    first_row: int
    rows: int
    dim: int

    @property
    def weight_bytes(self) -> int:
        return self.rows * self.dim * _FLOAT

    @property
    def optimizer_bytes(self) -> int:
        return self.rows * _FLOAT


def make_plan(
    model: nn.Module, world_size: int, device: str = "cpu", group: dist.ProcessGroup | None = None
) -> ShardingPlan:
    """Plan the tables of `model` (which may be on meta).

    Without `group` nothing is communicated, so any world size can be planned from one process; with it, rank 0
    plans and the others receive.
    """
    trainer = TrainerConfig(
        world_size=world_size,
        local_world_size=min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size))),
        hbm_cap_bytes=_UNLIMITED,
        ddr_cap_bytes=_UNLIMITED,
    )
    topology = TopologyFactory.create_topology(trainer, kernel_config=KernelConfig(compute_device=device))
    constraints = {
        config.name: ParameterConstraints(sharding_types=[_sharding_type(config.num_embeddings, world_size)])
        for config in tables_of(model).embedding_bag_configs()
    }
    planner = EmbeddingShardingPlanner(
        topology=topology, storage_reservation=FixedPercentageStorageReservation(0.0), constraints=constraints
    )
    if group is None:
        return planner.plan(model, [Sharder()])
    return planner.collective_plan(model, [Sharder()], group)


def _sharding_type(rows: int, world_size: int) -> str:
    """Row-wise, ⌈rows / world_size⌉ rows a rank: one input exchange and one reduce-scatter serve all such tables.

    A table too short to give every rank a row lies whole on one: FBGEMM's backward refuses an empty shard.
    """
    per_rank = -(-rows // world_size)
    every_rank_has_some = per_rank * (world_size - 1) < rows
    return str((ShardingType.ROW_WISE if every_rank_has_some else ShardingType.TABLE_WISE).value)


def tables_of(model: nn.Module) -> EmbeddingBagCollection:
    """The one EmbeddingBagCollection of an unsharded model."""
    (collection,) = (module for module in model.modules() if isinstance(module, EmbeddingBagCollection))
    return collection


def shards(plan: ShardingPlan) -> list[Shard]:
    """The plan as plain rows, one for each table and rank that holds some of it."""
    return list(_shards(plan))


def _shards(plan: ShardingPlan) -> Iterator[Shard]:
    for module in plan.plan.values():
        for table, sharding in module.items():
            for shard in sharding.sharding_spec.shards:
                (first_row, _), (rows, dim) = shard.shard_offsets, shard.shard_sizes
                yield Shard(table, sharding.sharding_type, shard.placement.rank(), first_row, rows, dim)


def dense_bytes(model: nn.Module) -> int:
    """What every rank holds of the dense part: parameter, gradient and Adam's two moments; buffers once."""
    tables = {id(parameter) for parameter in tables_of(model).parameters()}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)
    return 4 * parameters + sum(b.numel() * b.element_size() for b in model.buffers())


def rank_bytes(model: nn.Module, plan: ShardingPlan, world_size: int) -> list[int]:
    """Bytes of weights and optimizer state on each rank; activations and the batch come on top."""
    need = [dense_bytes(model)] * world_size
    for shard in shards(plan):
        need[shard.rank] += shard.weight_bytes + shard.optimizer_bytes
    return need


def plan_table(model: nn.Module, plan: ShardingPlan, world_size: int) -> RichTable:
    """The plan to print before training: table, rank, rows, bytes; then what each rank needs in all.

    `model` is the unsharded one: `parallel.shard` takes it over.
    """
    table = RichTable(title="Sharding plan")
    for column in ("table", "sharding"):
        table.add_column(column)
    for column in ("rank", "rows", "weights", "optimizer"):
        table.add_column(column, justify="right")
    for shard in shards(plan):
        weights, optimizer = human_bytes(shard.weight_bytes), human_bytes(shard.optimizer_bytes)
        table.add_row(shard.table, shard.sharding, str(shard.rank), f"{shard.rows:,}", weights, optimizer)
    table.add_section()
    table.add_row("dense, gradient, Adam", "data_parallel", "each", "", human_bytes(dense_bytes(model)), "")
    table.add_section()
    for rank, need in enumerate(rank_bytes(model, plan, world_size)):
        table.add_row("[bold]needed in all", "", str(rank), "", human_bytes(need), "")
    return table


def human_bytes(count: float) -> str:
    """
    >>> human_bytes(512), human_bytes(1_500_000)
    ('512 B', '1.4 MiB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"
