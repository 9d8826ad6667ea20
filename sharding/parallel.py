"""From a plain model to a sharded one: process group, DistributedModelParallel, first rows, a rank's own rows."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard as ShardOfTensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType
from torchrec.optim import RowWiseAdagrad

from friendrec.errors import FriendrecError
from friendrec.sharding.exchange import exchange_by_all_to_all
from friendrec.sharding.plan import Sharder, tables_of
from friendrec.sharding.tables import initial_rows

EPSILON = 1e-8  # of row-wise Adagrad
_CHUNK = 1 << 16  # rows

# What this pair of releases says of its own calls into each other is no news to a user.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.distributed")
warnings.filterwarnings("ignore", category=FutureWarning, message="Please use DTensor instead")
# Nor is that a copied table's lookup has no autograd kernel for CPU: its gradient is checked by the tests.
warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function")
for chatty in ("torch.fx._symbolic_trace", "torchrec.distributed.utils"):
    logging.getLogger(chatty).setLevel(logging.ERROR)


@contextmanager
def process_group(device: Literal["auto", "cpu", "cuda"] = "cpu") -> Iterator[torch.device]:
    """The default process group for the length of a block; yields this rank's device.

    Under torchrun (RANK and its kin in the environment) it joins the others; alone it is a group of one without
    any port. CPU tensors always travel by gloo, CUDA tensors by NCCL.
    """
    local = _local_device(device)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if local.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield local
    finally:
        dist.destroy_process_group()


def _local_device(device: str) -> torch.device:
    """This process's own: the GPU of its number, or the CPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise FriendrecError("--device cuda: torch finds no CUDA here; pass --device cpu, or see docs/install.md")
    own, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if own >= gpus:
        raise FriendrecError(f"process {own} of this machine has no GPU, there are {gpus}: start one process a GPU")
    return torch.device("cuda", own)


def shard(model: nn.Module, plan: ShardingPlan, device: torch.device, seed: int) -> DistributedModelParallel:
    """Spread the tables of `model` over the default process group by `plan`; the rest is data-parallel.

    Call it on every rank with the same model, which it takes over: EmbeddingBagCollection on meta, the rest on any
    device (on meta: made here from `seed` by the modules' own reset_parameters; rank 0's values win). Backward then
    also updates the tables by row-wise Adagrad, at the rate that `Optimizers` sets: 0 until then.

    The loss of a rank must be such that the mean over ranks is the loss meant, as gradients are averaged.
    """
    _materialise(model, device, seed)
    _apply_optimizer_in_backward(RowWiseAdagrad, tables_of(model).parameters(), {"lr": 0.0, "eps": EPSILON})
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    # A static graph would hide a parameter that stops getting gradients; without it DDP says so.
    wrapper = DefaultDataParallelWrapper(static_graph=False)
    dmp = DistributedModelParallel(model, env, device, plan, [Sharder()], data_parallel_wrapper=wrapper)
    if device.type == "cpu" and env.world_size > 1:
        exchange_by_all_to_all(sharded_tables(dmp))
    for name in sharded_tables(dmp).embedding_bags:
        for part in local_shards(dmp, name):
            _fill(part, seed, name)
    return dmp


def _materialise(model: nn.Module, device: torch.device, seed: int) -> None:
    """Make dense parameters that are on meta, before DMP would: it draws for the shards first, more the more it has."""
    inside_tables = set(tables_of(model).modules())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if module not in inside_tables and any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
                module.reset_parameters()  # type: ignore[operator]  # every torch module with parameters has it


@dataclass(frozen=True)
class LocalShard:
    """What this rank holds of a table, `dim` columns wide: the storage itself, not a copy."""

    first_row: int
    first_column: int
    dim: int
    values: Tensor  # [rows, columns]

    @property
    def columns(self) -> slice:
        return slice(self.first_column, self.first_column + self.values.shape[1])


@torch.no_grad()
def _fill(part: LocalShard, seed: int, table: str) -> None:
    """Write initial rows a chunk at a time: the scratch memory stays small beside the shard."""
    first_row = part.first_row
    for chunk in part.values.split(_CHUNK):
        rows = initial_rows(seed, table, range(first_row, first_row + len(chunk)), part.dim)
        chunk.copy_(rows[:, part.columns])
        first_row += len(chunk)


def sharded_tables(dmp: DistributedModelParallel) -> ShardedEmbeddingBagCollection:
    """The one sharded EmbeddingBagCollection of a sharded model."""
    (collection,) = (m for m in dmp.modules() if isinstance(m, ShardedEmbeddingBagCollection))
    return collection


def local_shards(dmp: DistributedModelParallel, table: str) -> list[LocalShard]:
    """The table's shards on this rank: none, one, or several ranges of columns; a data-parallel one is whole."""
    weight = sharded_tables(dmp).state_dict()[f"embedding_bags.{table}.weight"]
    if not isinstance(weight, ShardedTensor):
        return [LocalShard(0, 0, weight.shape[1], weight)]
    return [_local_shard(part, weight.size(1)) for part in weight.local_shards()]


def _local_shard(part: ShardOfTensor, dim: int) -> LocalShard:
    row, column = part.metadata.shard_offsets
    return LocalShard(row, column, dim, part.tensor)


@torch.no_grad()
def whole_table(dmp: DistributedModelParallel, table: str) -> Tensor:
    """A copy of all of a table `[rows, dim]` on every rank, which all ranks ask for together: for one that is short."""
    weight = sharded_tables(dmp).state_dict()[f"embedding_bags.{table}.weight"]
    if not isinstance(weight, ShardedTensor):
        return weight.detach().clone()
    whole = torch.zeros(weight.size(), device=dmp.device)
    for part in local_shards(dmp, table):
        whole[part.first_row : part.first_row + len(part.values), part.columns] = part.values
    dist.all_reduce(whole)
    return whole


def replicated_tables(dmp: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """Weights of the data-parallel tables by parameter name: TorchRec's fused optimizer does not reach them."""
    collection = sharded_tables(dmp)
    kinds = {table: sharding.sharding_type for table, sharding in collection.module_sharding_plan.items()}
    copies = [table for table, kind in kinds.items() if kind == ShardingType.DATA_PARALLEL.value]
    weights = {id(collection.embedding_bags[table].weight) for table in copies}
    return {name: p for name, p in dmp.named_parameters() if id(p) in weights}


def column_shards(dmp: DistributedModelParallel) -> dict[str, int]:
    """Tables that are split by columns, and into how many shards."""
    tables = sharded_tables(dmp)
    weights = {name: tables.state_dict()[f"embedding_bags.{name}.weight"] for name in tables.embedding_bags}
    parts = {
        name: len({shard.shard_offsets[1] for shard in weight.metadata().shards_metadata})
        for name, weight in weights.items()
        if isinstance(weight, ShardedTensor)
    }
    return {name: count for name, count in parts.items() if count > 1}
