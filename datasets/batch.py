"""The one batch of every model: a rank's slice of a global batch, all ids in one KeyedJaggedTensor.

The tables are read by *slots*: slot i of key `user` (and of every profile column) is the i-th distinct user of the
slice, slot i of `event` and `condition` is row i of those small tables, and everything else points at slots.

    user       [7] [3] [9] [ ] [ ]    <- distinct users; trailing bags are empty, so that all ranks can send as many
    city       [2] []  [5] [ ] [ ]    <- their profile
    event      [0] [1] [2] [3] [ ]    <- kinds of event: 2 · action + direction
    condition  [0] [1] [2] [ ] [ ]    <- action asked for: 0 is any
    cluster    [0] [1] [2] [3] …      <- every centroid, where the model has clusters

With tokenized users there is no key `user`: slot i of `stu_l` is the token of the i-th distinct user at level l, and
slot i of `codebook_l` is token i of that level, read from the same table.

    stu_0       [8] [2] [4] [ ] [ ]   <- 8 of sizes (8, …) is the row of users without a code, the third is of level 0
    stu_1       [ ] [5] [5] [ ] [ ]
    codebook_0  [0] [1] [2] [3] [4] … <- every token

Histories are packed, and laid out in blocks of L = context_length positions, each sequence starting a block of its
own. A window holds at most L events, so that it spans at most two blocks: what the O(L) encoders need.

    packed event      0 1 2 3 4 5 | 6 7        two sequences, L = 4
    event_position    0 1 2 3 4 5   8 9        blocks: [0 1 2 3] [4 5 . .] [6 7 . .]
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


class _Movable:
    """Moves every tensor of a dataclass at once."""

    def _each(self, move: Any) -> Self:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        moved = {
            name: move(value) if isinstance(value, Tensor | KeyedJaggedTensor | _Movable) else value
            for name, value in fields.items()
        }
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that another stream uses these tensors (CUDA prefetching)."""
        self._each(lambda value: (value.record_stream(stream), value)[1])


@dataclass
class Context(_Movable):
    """What is known at B queries. E packed events, T contacts, all user references are slots (int64)."""

    ids: KeyedJaggedTensor
    event_user: Tensor  # [E] partner of each event
    event_kind: Tensor  # [E] 2 · action + direction
    event_sequence: Tensor  # [E] number of the packed sequence, ascending
    event_time: Tensor  # [E] µs
    event_gap: Tensor  # [E] float32: 0.1 · log1p(seconds since the sequence's previous event)
    event_position: Tensor  # [E] place in the block layout
    num_blocks: int
    window_begin: Tensor  # [B] block position of the first event of the query's history
    window_end: Tensor  # [B] one past the last; equal to window_begin where there is no history
    actor: Tensor  # [B]
    condition: Tensor  # [B] 0 any, 1 + action otherwise
    clock: Tensor  # [B, 2] float32: 0.1 · log1p(seconds since the last event), log1p(events before) / 4
    contact_offsets: Tensor  # [B + 1]
    contact_user: Tensor  # [T]
    contact_features: Tensor  # [T, len(PAIR_FEATURES)] float32
    num_candidates: int  # contacts and candidates are slots below this; the others only stand in histories
    codes: Tensor  # [slots, L] tokens of each distinct user, -1 where there is none; L = 0 where users are ids


@dataclass
class Batch(_Movable, Pipelineable):
    """Examples with their candidates: B examples, K own negatives each, M negatives shared by the global batch."""

    context: Context
    target: Tensor  # [B]
    weight: Tensor  # [B] float32
    example: Tensor  # [B] index in the log's total order
    negative: Tensor  # [B, K]
    negative_log_count: Tensor  # [B, K] log of how often sampling is expected to draw it; +inf: not a negative here
    shared: Tensor  # [M]
    shared_log_count: Tensor  # [B, M]
    scale: float  # world size / weight of the global batch: makes the mean over ranks the global weighted mean

    def with_bags(self, bags: int) -> Self:
        """The same batch with so many bags a key, trailing ones empty."""
        ids = self.context.ids
        lengths = pad(ids.lengths().unflatten(0, (len(ids.keys()), -1)), (0, bags - ids.stride()))
        padded = KeyedJaggedTensor(keys=ids.keys(), values=ids.values(), lengths=lengths.flatten())
        return dataclasses.replace(self, context=dataclasses.replace(self.context, ids=padded))
