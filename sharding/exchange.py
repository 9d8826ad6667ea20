"""How pooled rows come home from row-wise tables on gloo.

Every rank pools all bags of all ranks over the rows that it holds; a rank's bags are the sum over ranks of its part.
TorchRec calls that a reduce-scatter, for which gloo reduces everything on every rank and then takes a slice. An
all-to-all and a sum where the parts arrive move half as much.

    pooled on rank 0   [bags of 0 | bags of 1]         rank 0   own part + the part that rank 1 sends
    pooled on rank 1   [bags of 0 | bags of 1]         rank 1   the part that rank 0 sends + own part
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.types import NoWait


class AllToAllSum(nn.Module):
    """Stands in for TorchRec's PooledEmbeddingsReduceScatter."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, pooled: Tensor, input_splits: list[int]) -> NoWait[Tensor]:
        """Bags of all ranks, as many as `input_splits` says, `[Σ bags, D]` -> sums of this rank's `[bags, D]`."""
        return NoWait(_AllToAllSum.apply(pooled, input_splits, self.group))  # type: ignore[no-untyped-call]


class _AllToAllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooled: Tensor, bags: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.bags, ctx.group = bags, group
        own = [bags[group.rank()]] * len(bags)
        received = pooled.new_empty(sum(own), pooled.shape[1])
        dist.all_to_all_single(received, pooled, own, bags, group=group)
        return received.unflatten(0, (len(bags), own[0])).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Every rank that added to a bag gets the bag's gradient."""
        sent = gradient.repeat(len(ctx.bags), 1)
        if get_gradient_division():
            sent /= len(ctx.bags)
        received = gradient.new_empty(sum(ctx.bags), gradient.shape[1])
        dist.all_to_all_single(received, sent, ctx.bags, [len(gradient)] * len(ctx.bags), group=ctx.group)
        return received, None, None


def exchange_by_all_to_all(tables: ShardedEmbeddingBagCollection) -> None:
    """Replace the reduce-scatter of every row-wise lookup."""
    for output in tables._output_dists:
        if isinstance(output, RwPooledEmbeddingDist):
            output._dist = AllToAllSum(output._pg)
