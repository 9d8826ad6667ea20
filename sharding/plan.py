"""Where every table's rows live: TorchRec's planner, its answer as plain rows, and the memory a rank needs."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table as RichTable
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, PlannerError, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ShardingPlan, ShardingType

from friendrec.errors import FriendrecError
from friendrec.sharding.config import READ_WHOLE, SMALL_TABLE, ShardingConfig

_FLOAT = 4  # bytes
_UNLIMITED = 1 << 60  # the plan states what a rank needs, also on a machine that is too small for it
_ROW_WISE, _TABLE_WISE = ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value
_COLUMN_WISE, _DATA_PARALLEL = ShardingType.COLUMN_WISE.value, ShardingType.DATA_PARALLEL.value
_KERNELS = [EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value]  # rows in the device's own memory

# That a data-parallel table has no sharding spec is no news.
logging.getLogger().addFilter(lambda record: "Sharding spec not found" not in str(record.msg))


class Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # TorchRec is untyped
    """TorchRec's sharder, offering row-wise on CPU too: exact there, only not on the list."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types: list[str] = super().sharding_types(compute_device_type)
        return types if _ROW_WISE in types else [*types, _ROW_WISE]


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one table: `rows` × `dim` of it, from `first_row` and `first_column` on."""

    table: str
    sharding: str
    rank: int
    first_row: int
    first_column: int
    rows: int
    dim: int

    @property
    def weight_bytes(self) -> int:
        return self.rows * self.dim * _FLOAT

    @property
    def optimizer_bytes(self) -> int:
        """Row-wise Adagrad's float a row; a copy's gradient, too, which is as large as the table.

        The other kinds are updated inside the backward pass, and no gradient of theirs is ever whole.
        """
        return self.rows * _FLOAT + (self.weight_bytes if self.sharding == _DATA_PARALLEL else 0)


def make_plan(
    model: nn.Module,
    world_size: int,
    config: ShardingConfig | None = None,
    device: str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> ShardingPlan:
    """Plan the tables of `model` (which may be on meta) by `config`, by default all row-wise.

    Without `group` nothing is communicated, so any world size can be planned from one process; with it, rank 0
    plans and the others receive. A mistake in the config is a FriendrecError, on every rank.
    """
    config = config or ShardingConfig()
    local_world_size = min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    constraints = _constraints(tables_of(model).embedding_bag_configs(), world_size, config)
    chooses = "auto" in (config.sharding, *config.table_sharding.values())
    memory = _device_memory(device, local_world_size) if chooses else _UNLIMITED
    trainer = TrainerConfig(
        world_size=world_size, local_world_size=local_world_size, hbm_cap_bytes=memory, ddr_cap_bytes=memory
    )
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(trainer, kernel_config=KernelConfig(compute_device=device)),
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints=constraints,
    )
    news: list[Any] = [None]  # not collective_plan: where rank 0 finds none, the others would wait for it
    if group is None or dist.get_rank(group) == 0:
        try:
            news = [planner.plan(model, [Sharder()])]
        except PlannerError:
            news = [
                FriendrecError(
                    f"TorchRec's planner finds no place for the tables in {human_bytes(memory)} a process: start more "
                    "processes, choose a smaller --dim, or see with --plan-only --sharding row_wise what they need"
                )
            ]
    if group is not None:
        dist.broadcast_object_list(news, group=group, group_src=0)
    if isinstance(news[0], FriendrecError):
        raise news[0]
    return news[0]


def _constraints(
    tables: list[EmbeddingBagConfig], world_size: int, config: ShardingConfig
) -> dict[str, ParameterConstraints]:
    """What the planner may choose from: one kind a table, or under `auto` all that can move to other world sizes."""
    names = [table.name for table in tables]
    if unknown := set(config.table_sharding) - set(names):
        raise FriendrecError(f"table_sharding names no table {min(unknown)!r}: the tables are {', '.join(names)}")
    return {table.name: _constraint(table, world_size, config) for table in tables}


def _constraint(table: EmbeddingBagConfig, world_size: int, config: ShardingConfig) -> ParameterConstraints:
    # A table too short to give every rank a row cannot be row-wise: FBGEMM's backward refuses an empty shard.
    has_rows_for_all = -(-table.num_embeddings // world_size) * (world_size - 1) < table.num_embeddings
    asked = config.of(table.name)
    if asked == "row_wise" and table.name in config.table_sharding and not has_rows_for_all:
        raise FriendrecError(
            f"table {table.name} cannot be row_wise: its {table.num_embeddings} rows do not go round "
            f"{world_size} processes; leave it out of --table-sharding"
        )
    if asked == "column_wise" and world_size > 1 and table.embedding_dim < 8:
        raise FriendrecError(
            f"table {table.name} cannot be column_wise: FBGEMM wants columns in fours, and it has "
            f"{table.embedding_dim}; pass --dim 8 or more, or another --sharding"
        )
    is_small = table.num_embeddings * table.embedding_dim * _FLOAT <= SMALL_TABLE
    if asked is None and table.name in READ_WHOLE and is_small:
        types = [_DATA_PARALLEL]
    elif asked in (None, "row_wise"):
        types = [_ROW_WISE if has_rows_for_all else _TABLE_WISE]
    elif asked == "auto":
        types = [*([_ROW_WISE] if has_rows_for_all else []), _TABLE_WISE, _DATA_PARALLEL]
    else:
        types = [str(asked)]
    narrowest = -(-table.embedding_dim // world_size)  # TorchRec's own bound is 128 columns a shard
    return ParameterConstraints(sharding_types=types, compute_kernels=_KERNELS, min_partition=narrowest)


def _device_memory(device: str, local_world_size: int) -> int:
    """Bytes that one process of this machine can have."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world_size


def tables_of(model: nn.Module) -> EmbeddingBagCollection:
    """The one EmbeddingBagCollection of an unsharded model."""
    (collection,) = (module for module in model.modules() if isinstance(module, EmbeddingBagCollection))
    return collection


def shards(model: nn.Module, plan: ShardingPlan) -> list[Shard]:
    """The plan of the tables of `model` as plain rows, one for each table and rank that holds some of it."""
    return list(_shards(model, plan))


def _shards(model: nn.Module, plan: ShardingPlan) -> Iterator[Shard]:
    sizes = {
        table.name: (table.num_embeddings, table.embedding_dim) for table in tables_of(model).embedding_bag_configs()
    }
    for module in plan.plan.values():
        for table, sharding in module.items():
            if sharding.sharding_type == _DATA_PARALLEL:
                for rank in sharding.ranks:
                    yield Shard(table, _DATA_PARALLEL, rank, 0, 0, *sizes[table])
                continue
            for shard in sharding.sharding_spec.shards:
                rank = shard.placement.rank()
                yield Shard(table, sharding.sharding_type, rank, *shard.shard_offsets, *shard.shard_sizes)


def dense_bytes(model: nn.Module) -> tuple[int, int]:
    """What every rank holds of the dense part: parameters and buffers; gradients and Adam's two moments."""
    tables = {id(parameter) for parameter in tables_of(model).parameters()}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)
    return parameters + sum(b.numel() * b.element_size() for b in model.buffers()), 3 * parameters


def rank_bytes(model: nn.Module, plan: ShardingPlan, world_size: int) -> list[int]:
    """Bytes of weights, their gradients where kept, and optimizer state on each rank; activations come on top."""
    need = [sum(dense_bytes(model))] * world_size
    for shard in shards(model, plan):
        need[shard.rank] += shard.weight_bytes + shard.optimizer_bytes
    return need


def plan_table(model: nn.Module, plan: ShardingPlan, world_size: int) -> RichTable:
    """The plan to print before training: table, rank, rows, bytes; then what each rank needs in all.

    `model` is the unsharded one: `parallel.shard` takes it over.
    """
    table = RichTable(title="Sharding plan", caption="state: of the optimizer, and gradients that are kept whole")
    for column in ("table", "sharding"):
        table.add_column(column, no_wrap=True)
    for column in ("rank", "rows", "dim", "weights", "state"):
        table.add_column(column, justify="right", no_wrap=True)
    for shard in shards(model, plan):
        sizes = f"{shard.rows:,}", str(shard.dim), human_bytes(shard.weight_bytes), human_bytes(shard.optimizer_bytes)
        table.add_row(shard.table, shard.sharding, str(shard.rank), *sizes)
    table.add_section()
    table.add_row("dense part", _DATA_PARALLEL, "each", "", "", *map(human_bytes, dense_bytes(model)))
    table.add_section()
    for rank, need in enumerate(rank_bytes(model, plan, world_size)):
        table.add_row("[bold]needed in all", "", str(rank), "", "", human_bytes(need), "")
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
