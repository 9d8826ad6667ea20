"""Batches of examples: the same global batch at any world size, of which each rank reads its slice.

An example is an out event of the train period whose action has the role target, or, with `temporal` off, each user's
last one. Two orders: `user` keeps the examples of a chunk of a user's sequence together (a causal encoder trains them
in one pass), `time` takes contiguous runs of the log. The composition of a batch is a function of (seed, epoch, step);
the reader's state is (epoch, step).
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from friendrec.datasets import negatives
from friendrec.datasets.batch import Batch
from friendrec.datasets.config import ContextConfig, ReaderConfig
from friendrec.datasets.packing import Codes, Packer, Queries, Rows, ranges
from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError

UNIFORM, RECENT, SHARED, CONDITION, ACTOR, POPULARITY = range(6)  # streams of random numbers


class Reader(Dataset[Batch]):
    """The slice of one rank. `reader.batches(epoch, step)` reads on from that state, prefetched."""

    def __init__(
        self,
        data: PreparedData,
        context: ContextConfig,
        config: ReaderConfig,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        codes: Codes | None = None,
        clusters: int = 0,
    ) -> None:
        if config.batch_size < data.chunk_length:
            raise FriendrecError(
                f"batch_size {config.batch_size} is below the chunk length {data.chunk_length} of the data; "
                f"pass --batch-size {data.chunk_length} or prepare with a smaller --chunk-length"
            )
        self.data, self.config, self.seed = data, config, seed
        self.rank, self.world_size = rank, world_size
        self.packer = Packer(data, context, codes, clusters)
        targets = np.array([action.role == "target" for action in data.actions])
        entries = data.event_entry[: data.num_train_events]
        self.event = np.flatnonzero(targets[data.action[entries]])
        if not len(self.event):
            raise FriendrecError("no event of the train period has the role target; prepare with other --roles")
        self.entry = np.asarray(entries[self.event])  # of each example, in total order
        self.user = np.searchsorted(data.offsets, self.entry, side="right") - 1
        if not config.temporal:
            last = np.sort(len(self.user) - 1 - np.unique(self.user[::-1], return_index=True)[1])
            self.event, self.entry, self.user = self.event[last], self.entry[last], self.user[last]
        self.chunk = self.user * (1 << 32) + (self.entry - data.offsets[self.user]) // data.chunk_length
        self.event_time = np.asarray(data.timestamp[data.event_entry])
        # Rows are numbered by first appearance, so that the users seen before t are the rows below a bound.
        self.first_seen = np.asarray(data.timestamp[data.offsets[: data.num_train_users]])
        weights = np.array([config.action_weights.get(action.name, 1.0) for action in data.actions])
        self.weight = weights[data.action[self.entry]]

    @property
    def steps(self) -> int:
        """Steps of an epoch; the last one takes the remainder."""
        return max(1, len(self.event) // self.config.batch_size)

    def batches(self, epoch: int, step: int = 0) -> Iterator[Batch]:
        """This rank's slices of the epoch from `step` on."""
        keys = [(epoch, s) for s in range(step, self.steps)]
        workers = min(self.config.workers, len(keys))
        ahead: dict[str, Any] = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
        own = torch.Generator()  # a loader draws a seed for its workers; the trainer's random numbers are not its
        loader = DataLoader(self, sampler=keys, batch_size=None, num_workers=workers, generator=own, **ahead)
        yield from _unpacked_ahead(iter(loader)) if workers else loader

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        chosen = self.global_batch(*key)
        begin, end = (len(chosen) * rank // self.world_size for rank in (self.rank, self.rank + 1))
        part = chosen[begin:end]
        return self._batch(key, chosen, part[np.argsort(self.entry[part])])

    def global_batch(self, epoch: int, step: int) -> Rows:
        """Examples of a global batch, as places in `self.event`; ranks take contiguous parts."""
        order, starts = _order(self, epoch)
        begin, end = starts[np.searchsorted(starts[:-1], np.array([step, step + 1]) * self.config.batch_size)]
        return order[begin : None if step == self.steps - 1 else end]

    def _batch(self, key: tuple[int, int], chosen: Rows, part: Rows) -> Batch:
        """The batch of the examples `part`, in order of entries, out of those `chosen` for the global batch."""
        config, data, counts = self.config, self.data, self.config.negative_counts
        queries = self._queries(key[0], part)
        actor, target = self.user[part], data.partner[self.entry[part]].astype(np.int64)
        seen = np.searchsorted(self.first_seen, queries.times)
        before = np.searchsorted(self.event_time, queries.times)
        window = max(1, round(config.recent_window * data.num_train_events))
        since = self.event_time[np.maximum(before - window, 0)]
        oldest = np.searchsorted(self.event_time, since)
        uniform = self._draw(key[0], UNIFORM, part, counts.uniform) % np.maximum(seen, 1)[:, None]
        recent = self._draw(key[0], RECENT, part, counts.recent) % np.maximum(before - oldest, 1)[:, None]
        past = self._draw(key[0], POPULARITY, part, counts.popularity) % np.maximum(before, 1)[:, None]
        received = self._target_of(np.concatenate([oldest[:, None] + recent, past], axis=1))
        negative = np.concatenate([uniform, received], axis=1)
        drawn = self._draw(key[0], SHARED, np.array([key[1]]), counts.shared)[0] % len(chosen)
        shared = data.partner[self.entry[chosen[drawn]]].astype(np.int64)
        targets, times = np.unique(data.partner[self.entry[chosen]], return_counts=True)
        shares = times / len(chosen)
        contacts = self.packer.state.contacts(queries.users, queries.times, self.packer.config.contacts)

        def log_counts(candidates: Rows) -> Tensor:
            logs = negatives.log_counts(
                candidates, actor, target, contacts.offsets, contacts.partner, since, queries.times, before - oldest,
                before, seen, counts.uniform, counts.recent, counts.popularity, counts.shared, targets, shares,
                data.offsets, data.timestamp, self.packer.state.received,
            )  # fmt: skip
            return torch.from_numpy(logs if config.logq else np.where(np.isinf(logs), logs, np.float32(0)))

        context, slots = self.packer.pack(queries, contacts, [target, negative, shared])
        return Batch(
            context=context,
            target=slots[0],
            negative=slots[1],
            shared=slots[2],
            weight=torch.from_numpy(self.weight[part].astype(np.float32)),
            example=torch.from_numpy(self.event[part]),
            negative_log_count=log_counts(negative),
            shared_log_count=log_counts(np.broadcast_to(shared, (len(part), len(shared)))),
            scale=float(self.world_size / max(self.weight[chosen].sum(), 1e-9)),
        )

    def _queries(self, epoch: int, part: Rows) -> Queries:
        user, entry = self.user[part], self.entry[part]
        hide_action = self._chance(epoch, CONDITION, part) < self.config.action_dropout
        hide_actor = self._chance(epoch, ACTOR, part) < self.config.actor_dropout
        return Queries(
            users=user,
            times=np.asarray(self.data.timestamp[entry]),
            groups=self._groups(part),
            conditions=np.where(hide_action, 0, 1 + self.data.action[entry].astype(np.int64)),
            actors=np.where(hide_actor, self.packer.unknown, user),
        )

    def _target_of(self, event: Rows) -> Rows:
        """Who received each event of the total order."""
        received: Rows = self.data.partner[self.data.event_entry[event]].astype(np.int64)
        return received

    def _draw(self, epoch: int, stream: int, counter: Rows, num: int) -> Rows:
        return negatives.draws(self.seed, epoch, stream, counter, num)

    def _chance(self, epoch: int, stream: int, part: Rows) -> NDArray[np.float64]:
        return self._draw(epoch, stream, part, 1)[:, 0] / 2.0**63

    def _groups(self, part: Rows) -> Rows:
        """What shares a packed sequence: a chunk in the order `user`, a user in the order `time`."""
        return self.chunk[part] if self.config.order == "user" else self.user[part]


def _unpacked_ahead(batches: Iterator[Batch], ahead: int = 2) -> Iterator[Batch]:
    """Receive in a thread: a batch has some thirty tensors, and taking them from a worker costs milliseconds."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        received = deque(thread.submit(next, batches, None) for _ in range(ahead))
        while (batch := received.popleft().result()) is not None:
            received.append(thread.submit(next, batches, None))
            yield batch


@lru_cache(maxsize=2)
def _order(reader: Reader, epoch: int) -> tuple[Rows, Rows]:
    """Examples of an epoch in reading order, and where its units start in it (ending with the number of examples)."""
    total, size = len(reader.event), reader.config.batch_size
    if reader.config.order == "user":
        base = np.argsort(reader.entry)
        begin = np.flatnonzero(np.diff(reader.chunk[base], prepend=-1))
    else:
        base, begin = np.arange(total), np.arange(reader.steps) * size
    lengths = np.diff(begin, append=total)
    shuffled = np.random.default_rng([reader.seed, epoch]).permutation(len(begin))
    return base[ranges(begin[shuffled], lengths[shuffled])], np.concatenate([[0], np.cumsum(lengths[shuffled])])
