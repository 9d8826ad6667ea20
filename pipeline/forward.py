"""The forward pass of training behind one call: plain on CPU, overlapped with the next batches' travel on CUDA."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from friendrec.datasets.batch import Batch

Precision = Literal["float32", "bf16"]


def losses(
    loss_of: Callable[[Batch], Tensor],
    tables: ShardedEmbeddingBagCollection,
    batches: Iterator[Batch],
    device: torch.device,
    precision: Precision,
) -> Iterator[Tensor]:
    """Loss of each batch, float32, computed as it is asked for; its backward is the caller's, before the next.

    On CUDA the next batch's ids travel between ranks, and the one after goes to the GPU, while this one computes
    (`TrainPipelineSparseDist`). On CPU there is nothing to overlap.
    """

    def forward(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return loss_of(batch).float()

    if device.type == "cuda":
        yield from overlapped(forward, tables, batches, device)
    else:
        yield from map(forward, batches)


def overlapped(
    forward: Callable[[Batch], Tensor],
    tables: ShardedEmbeddingBagCollection,
    batches: Iterator[Batch],
    device: torch.device,
) -> Iterator[Tensor]:
    """`forward` of each batch by TorchRec's pipeline, which is told that nothing trains: steps are the caller's."""
    seen = _Lookup(tables)
    seen.training = False  # of this module alone: the tables below stay in training
    pipeline: TrainPipelineSparseDist = TrainPipelineSparseDist(
        seen,
        SGD([torch.zeros(0)]),  # never stepped
        device,
        custom_model_fwd=lambda batch: (None, forward(batch)),
    )
    try:
        while True:
            try:
                loss = pipeline.progress(batches)
            except StopIteration:
                return
            yield loss
    finally:
        pipeline.detach()  # validation looks up in its own way


class _Lookup(nn.Module):
    """What the pipeline traces to find the tables and where in a batch their ids are."""

    def __init__(self, tables: ShardedEmbeddingBagCollection) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, batch: Batch) -> object:
        return self.tables(batch.context.ids)
