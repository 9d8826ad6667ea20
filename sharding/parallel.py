"""From a plain model to a sharded one: process group, DistributedModelParallel, first rows, a rank's own rows."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim import RowWiseAdagrad

from friendrec.sharding.plan import Sharder, tables_of
from friendrec.sharding.tables import initial_rows

_CHUNK = 1 << 16  # rows

# What this pair of releases says of its own calls into each other is no news to a user.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.distributed")
warnings.filterwarnings("ignore", category=FutureWarning, message="Please use DTensor instead")
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@contextmanager
def process_group(device: str = "cpu") -> Iterator[torch.device]:
    """The default process group for the length of a block; yields this rank's device.

    Under torchrun (RANK and its kin in the environment) it joins the others; alone it is a group of one without
    any port. CPU tensors always travel by gloo, CUDA tensors by NCCL.
    """
    local = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield local
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, plan: ShardingPlan, device: torch.device, seed: int) -> DistributedModelParallel:
    """Spread the tables of `model` over the default process group by `plan`; the rest is data-parallel.

    Call it on every rank with the same model, which it takes over: EmbeddingBagCollection on meta, the rest on any
    device (on meta: made here from `seed` by the modules' own reset_parameters; rank 0's values win). Backward then
    also updates the tables by row-wise Adagrad, at the rate that `Optimizers` sets: 0 until then.

    The loss of a rank must be such that the mean over ranks is the loss meant, as gradients are averaged.
    """
    _materialise(model, device, seed)
    _apply_optimizer_in_backward(RowWiseAdagrad, tables_of(model).parameters(), {"lr": 0.0, "eps": 1e-8})
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    # A static graph would hide a parameter that stops getting gradients; without it DDP says so.
    wrapper = DefaultDataParallelWrapper(static_graph=False)
    dmp = DistributedModelParallel(model, env, device, plan, [Sharder()], data_parallel_wrapper=wrapper)
    for name in sharded_tables(dmp).embedding_bags:
        _fill(*local_rows(dmp, name), seed, name)
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


@torch.no_grad()
def _fill(first_row: int, rows: Tensor, seed: int, table: str) -> None:
    """Write initial rows a chunk at a time: the scratch memory stays small beside the shard."""
    for chunk in rows.split(_CHUNK):
        chunk.copy_(initial_rows(seed, table, range(first_row, first_row + len(chunk)), rows.shape[1]))
        first_row += len(chunk)


def sharded_tables(dmp: DistributedModelParallel) -> ShardedEmbeddingBagCollection:
    """The one sharded EmbeddingBagCollection of a sharded model."""
    (collection,) = (m for m in dmp.modules() if isinstance(m, ShardedEmbeddingBagCollection))
    return collection


def local_rows(dmp: DistributedModelParallel, table: str) -> tuple[int, Tensor]:
    """First row and values `[rows, dim]` of the table's shard on this rank: the storage itself, not a copy.

    A rank that holds none of the table gets (0, empty `[0, dim]`).
    """
    weight: ShardedTensor = sharded_tables(dmp).state_dict()[f"embedding_bags.{table}.weight"]
    shards = weight.local_shards()
    if not shards:
        return 0, torch.empty(0, weight.size(1), device=dmp.device)
    (only,) = shards
    return only.metadata.shard_offsets[0], only.tensor
