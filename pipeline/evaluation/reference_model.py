"""Our two-tower model under the concept repository's protocol: a full softmax over all users, in one process.

Without the copy term, for a pair hardly ever comes twice there; whom to follow is a dot product.
"""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from friendrec.datasets.packing import Packer, Queries
from friendrec.datasets.prepared import PreparedData
from friendrec.datasets.state import PAIR_FEATURES, Contacts
from friendrec.models.two_tower import TwoTower
from friendrec.pipeline.build import build_model
from friendrec.pipeline.config import RunConfig
from friendrec.pipeline.evaluation.reference import prefixes
from friendrec.sharding.tables import initial_rows

logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # what TorchRec asks of torch is no news

Rows = NDArray[np.int64]

EPOCHS, PATIENCE = 15, 3
"""Most passes over the train part, and how many without a better validation MRR end training."""
ACTORS = 128
"""Actors of a batch, each with all its examples."""
LEARNING_RATE, WARMUP = 0.01, 30
"""Peak rate of Adam, tables included, and steps until it is reached; from there it falls linearly to 0."""
BLOCK = 4096
"""Examples scored at a time."""


@dataclass(frozen=True)
class Examples:
    """All prefixes of a log, actor by actor in order of time: who (dense row), whom (dense row), when (µs), `[T]`."""

    actor: Rows
    target: Rows
    time: NDArray[np.int64]

    @classmethod
    def of(cls, data: PreparedData) -> Self:
        entries = prefixes(data)
        actor = np.searchsorted(data.offsets, entries, side="right") - 1
        return cls(actor, data.partner[entries].astype(np.int64), np.asarray(data.timestamp[entries]))


class ReferenceModel:
    """A preset's model, whole in this process; `packer.data` must count every user as a train user."""

    def __init__(self, config: RunConfig, packer: Packer, examples: Examples) -> None:
        self.packer, self.examples = packer, examples
        self.users = np.arange(packer.data.num_users)
        model = build_model(config, packer.tables)
        assert isinstance(model, TwoTower)
        self.model = model
        self.seed = config.training.seed
        tables: Any = self.model.lookup.tables.to_empty(device="cpu")
        for name, bag in tables.embedding_bags.items():
            bag.weight.data.copy_(initial_rows(self.seed, name, range(bag.num_embeddings), bag.embedding_dim))

    @property
    def parameters(self) -> int:
        """Number of all weights, tables included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fit(self, rows: Rows, validate: Callable[[], float], advance: Callable[[], None]) -> float:
        """Train on the examples `rows` (ascending), keep the epoch that `validate` finds best; seconds it took.

        `advance` is called after each of the EPOCHS, also for those that early stopping saves.
        """
        begun = time.monotonic()
        rng = np.random.default_rng(self.seed)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        groups = np.split(rows, np.flatnonzero(np.diff(self.examples.actor[rows])) + 1)
        batches = -(-len(groups) // ACTORS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, EPOCHS * batches))
        best, kept, stale = -np.inf, self.model.state_dict(), 0
        for _ in range(EPOCHS):
            if stale < PATIENCE:
                for chosen in np.array_split(rng.permutation(len(groups)), batches):
                    self._step(np.concatenate([groups[i] for i in np.sort(chosen)]), optimizer)
                    schedule.step()
                value, stale = validate(), stale + 1
                if value > best:
                    best, kept, stale = value, copy.deepcopy(self.model.state_dict()), 0
            advance()
        self.model.load_state_dict(kept)
        return time.monotonic() - begun

    def _step(self, rows: Rows, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        cross_entropy(self._scores(rows), torch.from_numpy(self.examples.target[rows])).backward()
        optimizer.step()

    @torch.no_grad()
    def scores(self, rows: Rows) -> NDArray[np.float32]:
        """Scores of every user at the examples `rows`, float32 `[len(rows), U]`."""
        order = np.argsort(rows)
        scores = np.empty((len(rows), len(self.users)), np.float32)
        for block in np.array_split(order, -(-len(rows) // BLOCK)):
            scores[block] = self._scores(rows[block]).numpy()
        return scores

    def _scores(self, rows: Rows) -> Tensor:
        """The same of ascending `rows`, with a gradient."""
        actor, none = self.examples.actor[rows], np.zeros(len(rows), np.int64)
        queries = Queries(users=actor, times=self.examples.time[rows], groups=actor, conditions=none, actors=actor)
        nobody = Contacts(np.append(none, 0), none[:0], np.zeros((0, len(PAIR_FEATURES)), np.float32))
        context, (slots,) = self.packer.pack(queries, nobody, [self.users])
        vectors = self.model.lookup(context.ids)
        targets = self.model.encode_targets(vectors)[slots]
        return self.model.encode_queries(context, vectors).vector @ targets.T


def _factor(step: int, total: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * (1 - step / total)
