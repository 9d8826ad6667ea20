"""Validation during training: every rank ranks the candidates it owns, and the counts add up.

No rank ever holds the target vectors of all users: rank r encodes its ⌈N / W⌉ of them, and a target's rank is one
plus the sum over ranks of the candidates scored higher, and half of those tied.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from friendrec.datasets.packing import Packer
from friendrec.errors import FriendrecError
from friendrec.models.stu import Stu
from friendrec.models.two_tower import TwoTower
from friendrec.pipeline.clustering import load_of, spread
from friendrec.pipeline.evaluation.metrics import summary
from friendrec.pipeline.evaluation.scoring import places_among
from friendrec.pipeline.evaluation.tasks import LEVEL, Events, Exclusions, scored_events
from friendrec.pipeline.inference import centroids_of, encode_queries, encode_targets, num_blocks, writer
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.stu import StuIndex

T = TypeVar("T")
TASKS = ("next_contact", "new_link")
DEPTH = 50
"""Places that are searched for, and beams, where a model writes codes."""


@dataclass(frozen=True)
class Validation:
    """Events of the validation period to rank, live."""

    packer: Packer
    events: Events
    exclusions: Exclusions

    @classmethod
    def sample(cls, packer: Packer, num_events: int, stop_on: str) -> "Validation":
        """Up to `num_events` scored events, spread evenly over the validation period; some of the task `stop_on`."""
        exclusions = Exclusions.of(packer.data)
        events, _ = scored_events(packer.data, "validation", exclusions)
        total = len(events.index)
        chosen = np.linspace(0, total - 1, min(num_events, total)).astype(np.int64)
        sampled = events.take(chosen)
        if not sampled.of_task(stop_on).any():
            raise FriendrecError(
                f"no {stop_on} among {len(chosen)} events of the validation period: "
                "pass another --stop-on or a larger --validation-events, or use a longer log"
            )
        return cls(packer, sampled, exclusions)

    def metrics(self, model: TwoTower | Stu) -> dict[str, dict[str, float]]:
        """Metrics of each task, and of a model with clusters how even its lists are; all ranks call it together."""
        model.eval()
        metrics = self._generated(model) if isinstance(model, Stu) else self._ranked(model)
        model.train()
        return metrics

    def _ranked(self, model: TwoTower) -> dict[str, dict[str, float]]:
        """All queries against every rank's share of the candidates."""
        queries, shard = Queries.concatenate(_gathered(self._own_queries(model))), self._own_candidates(model)
        metrics = {task: summary(self._ranks(task, queries, *shard)) for task in TASKS}
        if (centroids := centroids_of(model, self.packer)) is not None:
            metrics["clusters"] = spread(_sum(load_of(centroids, shard[1].vectors)))
        return metrics

    def _generated(self, model: Stu) -> dict[str, dict[str, float]]:
        """Every rank searches for its share of the events: the codes of the candidates are on each."""
        codes = self.packer.codes
        assert codes is not None
        num = self.packer.data.num_train_users
        index = StuIndex.build(codes.tokens[:num], np.arange(num), codes.sizes, DEPTH)
        index = replace(index, decoder=writer(model, self.packer))
        own, queries = self._own_events(), self._own_queries(model)
        metrics = {}
        for task in TASKS:
            chosen = np.flatnonzero(own.of_task(task))
            events = own.take(chosen)
            hidden = self.exclusions.at(LEVEL[task], events.actor, events.timestamp)
            found = index.search(queries.take(chosen).excluding(*hidden), DEPTH)
            ranks = places_among(*found, events.target)
            metrics[task] = summary(np.concatenate(_gathered(ranks)), until=DEPTH)
        return metrics

    def _shares(self) -> list[NDArray[np.int64]]:
        return np.array_split(np.arange(len(self.events.index)), dist.get_world_size())

    def _own_events(self) -> Events:
        """This rank's share."""
        return self.events.take(self._shares()[dist.get_rank()])

    def _own_queries(self, model: TwoTower | Stu) -> Queries:
        """The queries of this rank's events."""
        own, blocks = self._own_events(), num_blocks(len(self._shares()[0]))
        return encode_queries(model, self.packer, own.actor, own.timestamp, blocks)

    def _own_candidates(self, model: TwoTower) -> tuple[int, ExactIndex]:
        """The first candidate of this rank's share, and the share as an index."""
        total = self.packer.data.num_train_users
        share = -(-total // dist.get_world_size())
        first = min(dist.get_rank() * share, total)
        own = np.arange(first, min(first + share, total))
        return first, ExactIndex(encode_targets(model, self.packer, own, num_blocks(share)), own)

    def _ranks(self, task: str, queries: Queries, first: int, shard: ExactIndex) -> NDArray[np.float64]:
        chosen = np.flatnonzero(self.events.of_task(task))
        events = self.events.take(chosen)
        hidden = self.exclusions.at(LEVEL[task], events.actor, events.timestamp)
        local = queries.take(chosen).excluding(*hidden).within(first, len(shard))
        targets = events.target - first
        owned = (targets >= 0) & (targets < len(shard))
        scores = np.zeros(len(chosen), np.float32)
        scores[owned] = shard.scores_of(local.take(np.flatnonzero(owned)), targets[owned, None])[:, 0]
        scores = _sum(scores)  # every target has one owner
        higher, tied = shard.count_better(local, scores, np.where(owned, targets, -1))
        return 1 + _sum(higher) + _sum(tied) / 2


def _gathered(own: T) -> list[T]:
    """What every rank has, in order."""
    gathered = [own] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def _sum(values: np.ndarray) -> np.ndarray:
    """Sum over ranks."""
    total = torch.from_numpy(values.copy())
    dist.all_reduce(total)
    return total.numpy()
