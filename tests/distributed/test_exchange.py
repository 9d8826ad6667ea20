"""The all-to-all in place of TorchRec's reduce-scatter: the same sums and gradients, also of uneven parts."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.dist_data import PooledEmbeddingsReduceScatter

from friendrec.sharding.exchange import AllToAllSum

from .harness import Workers


def draw(rank: int, bags: list[int]) -> tuple[Tensor, Tensor]:
    """What a rank has pooled, and the gradient that its own bags will get."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(sum(bags), 4, generator=generator), torch.randn(bags[rank], 4, generator=generator)


def sums_and_gradient(exchange: type[nn.Module], bags: list[int]) -> tuple[Tensor, Tensor]:
    pooled, weight = draw(dist.get_rank(), bags)
    sums = exchange(dist.group.WORLD)(pooled.requires_grad_(), input_splits=bags).wait()
    (sums * weight).sum().backward()
    assert pooled.grad is not None
    return sums.detach(), pooled.grad


@pytest.mark.parametrize(
    ("exchange", "bags"),
    [(AllToAllSum, [3, 3]), (AllToAllSum, [2, 0, 5]), (PooledEmbeddingsReduceScatter, [3, 3])],
)
def test_sums_and_gradients(workers: Workers, exchange: type[nn.Module], bags: list[int]) -> None:
    """TorchRec's own module stands here to show that both are the same; its backward refuses uneven parts."""
    drawn = [draw(rank, bags) for rank in range(len(bags))]
    sums = sum(pooled for pooled, _ in drawn).split(bags)  # type: ignore[union-attr]
    gradient = torch.cat([weight for _, weight in drawn]) / len(bags)
    for answer, expected in zip(workers.run(len(bags), sums_and_gradient, exchange, bags), sums, strict=True):
        torch.testing.assert_close(answer[0], expected)
        torch.testing.assert_close(answer[1], gradient)
