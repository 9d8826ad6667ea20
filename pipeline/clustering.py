"""The centroids of a model while it trains: k-means places them, and dead ones go where users are.

    step 0 …           first         first + 50 · i    end of an epoch        last
         warm-up       k-means       revival           lists made even        temperature at its lowest

Everything is a function of the step and of what a checkpoint holds, and the same on every rank: a resumed run goes on
as if nothing had interrupted it, on any number of processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from friendrec.datasets.packing import Packer
from friendrec.models.clustering import Clustering, nearest
from friendrec.models.two_tower import TwoTower
from friendrec.pipeline.inference import encode_targets, num_blocks
from friendrec.pipeline.retrieval.centroids import Centroids, evened, hierarchical_k_means, refitted
from friendrec.sharding.optimizers import Optimizers
from friendrec.sharding.parallel import local_shards, whole_table

TABLE = "cluster"
Fit = Callable[[NDArray[np.float32], NDArray[np.float32], int], NDArray[np.float32]]
"""From vectors, centroids and cells to centroids."""
FIRST_ACCUMULATOR = 1.0
"""Of row-wise Adagrad on centroids that k-means has just placed: from 0 the first step, however small its gradient,
would be a full one and throw them about."""
SAMPLE, MOST = 64, 1 << 19
"""Users for each centroid that k-means looks at, and in all: 130 MiB of 64 dimensions, which rank 0 gathers."""
EVERY = 50  # steps between revivals
DEAD = 0.05  # of the mean load
DISTANCES = 1 << 25  # held at once: 128 MiB
APART = 0.02  # of the centroids' deviation: how far the halves of a split centroid begin from where it was


@dataclass(frozen=True)
class ClusterTraining:
    """What happens to the centroids of a sharded model beside its loss. All ranks call each method together."""

    model: DistributedModelParallel
    optimizers: Optimizers
    packer: Packer
    first: int
    """Step before which k-means places the centroids: the end of the rates' warm-up, or of the first epoch."""

    @classmethod
    def of(
        cls, model: DistributedModelParallel, optimizers: Optimizers, packer: Packer, total: int, epoch: int
    ) -> "ClusterTraining | None":
        """For a run of `total` steps, `epoch` of them an epoch; None where the model has no lists to place."""
        if model.module.clustering is None or not isinstance(model.module, TwoTower):
            return None
        warm_up = round(optimizers.config.warmup_share * total)
        return cls(model, optimizers, packer, first=min(max(1, warm_up), epoch))

    @property
    def clustering(self) -> Clustering:
        clustering: Clustering = self.model.module.clustering
        return clustering

    @torch.no_grad()
    def place(self) -> None:
        """K-means on target vectors of a sample of the users; nothing where it has been done.

        It looks up users: not while a pipeline holds the tables.
        """
        clustering = self.clustering
        if clustering.ready:
            return
        lists, cells = len(clustering.load), clustering.cells
        vectors_CD, load_C = self._agreed(lambda sample: hierarchical_k_means(sample, lists, cells).vectors)
        clustering.centre.copy_(load_C @ vectors_CD[:, :-1])
        self._adopt(torch.arange(lists), vectors_CD, load_C)
        if clustering.gates is None:  # from here on targets are means of the table's rows, whose own mean is 0
            clustering.centre.zero_()
        clustering.ready.fill_(1)

    @torch.no_grad()
    def settle(self) -> None:
        """At the end of an epoch: k-means goes on from the centroids as they are, and full lists are split.

        Batches see users by what they do, and by the time they came; an index holds everybody, so everybody is counted.
        As a representation the centroids are the users' vectors, and to move them all would change the model.
        """
        self.place()
        if self.clustering.gates is not None:
            self._fit(refitted)
        self._fit(evened)  # users have moved a little, with the cells that the towers see

    def start_step(self, step: int, total: int) -> int:
        """Before the forward of 0-based `step`: set the temperature, revive now and then; returns how many."""
        clustering = self.clustering
        clustering.anneal(max(0, step - self.first) / max(1, total - self.first))
        if not clustering.ready or step <= self.first or (step - self.first) % EVERY:
            return 0
        return self._revive(step)

    @torch.no_grad()
    def _revive(self, step: int) -> int:
        """Split full centroids in place of dead ones; returns how many."""
        clustering = self.clustering
        pairs = revived(clustering.load.tolist(), clustering.cells)
        if not pairs:
            return 0
        rows = whole_table(self.model, TABLE)
        draws = np.random.default_rng(step).standard_normal((len(pairs), rows.shape[1]), np.float32)
        offsets = torch.from_numpy(draws).to(rows) * (APART * rows.std(dim=0).mean())
        for (dead, donor), offset in zip(pairs, offsets, strict=True):
            rows[dead] = rows[donor] + offset
            rows[donor] -= offset
            clustering.bias[dead] = clustering.bias[donor]
            clustering.load[donor] /= 2
            clustering.load[dead] = clustering.load[donor]
        changed = torch.tensor(sorted({centroid for pair in pairs for centroid in pair}))
        self._put(changed, rows[changed])
        return len(pairs)

    def _fit(self, fit: Fit) -> None:
        """Move the centroids as `fit` moves them for a sample of the users as they are now."""
        clustering = self.clustering
        before_CD = clustering.centroids(whole_table(self.model, TABLE))
        known, cells = before_CD.cpu().numpy(), clustering.cells
        vectors_CD, load_C = self._agreed(lambda sample: fit(sample, known, cells))
        self._adopt(torch.nonzero((vectors_CD != before_CD).any(1))[:, 0], vectors_CD, load_C)

    def _agreed(self, centroids_of: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
        """Centroids `[C, D + 1]` that rank 0 finds for a sample of the users, and its share in each list `[C]`."""
        sample = self._gathered_sample()
        told: list[NDArray[np.float32]] = [sample, sample]
        if dist.get_rank() == 0:
            vectors = centroids_of(sample)
            load = load_of(Centroids(vectors, self.clustering.cells), sample) / len(sample)
            told = [vectors, load.astype(np.float32)]
        dist.broadcast_object_list(told)
        vectors_CD, load_C = (torch.from_numpy(array).to(self.clustering.load) for array in told)
        return vectors_CD, load_C

    def _gathered_sample(self) -> NDArray[np.float32]:
        """Target vectors `[n, D + 1]` of users spread evenly over the train users; on rank 0, elsewhere none."""
        users, model = self.packer.data.num_train_users, self.model.module
        size = min(users, SAMPLE * len(self.clustering.load), MOST)
        shares = np.array_split(np.linspace(0, users - 1, size).astype(np.int64), dist.get_world_size())
        model.eval()
        own = encode_targets(model, self.packer, shares[dist.get_rank()], num_blocks(len(shares[0])))
        model.train()
        parts: list[NDArray[np.float32]] | None = [own] * len(shares) if dist.get_rank() == 0 else None
        dist.gather_object(own, parts)
        return np.concatenate(parts) if parts else own[:0]

    def _adopt(self, rows: Tensor, vectors_CD: Tensor, load_C: Tensor) -> None:
        """Take these rows of centroids among target vectors, and the load of all."""
        clustering = self.clustering
        self._put(rows, vectors_CD[rows, :-1] - clustering.centre)
        clustering.bias[rows] = vectors_CD[rows, -1]
        clustering.load.copy_(load_C)

    def _put(self, rows: Tensor, vectors: Tensor) -> None:
        """Write vectors `[n, D]` over those of the table's rows `[n]` that lie here, and let them be moved gently."""
        shards = local_shards(self.model, TABLE)
        for part, accumulators in zip(shards, self.optimizers.accumulators(TABLE), strict=True):
            place = rows - part.first_row
            here = (place >= 0) & (place < len(part.values))
            part.values[place[here]] = vectors[here][:, part.columns].to(part.values)
            accumulators[place[here]] = FIRST_ACCUMULATOR


def revived(load: Sequence[float], cells: int) -> list[tuple[int, int]]:
    """Dead centroids, and for each the one to split: (dead, donor), in the order in which to do it.

    Dead is who has less than a twentieth of the mean load. Its donor is the fullest of its own cell, or of all where
    the whole cell is dead; a split halves the donor's load. Nobody is split who would be dead himself after.

    >>> revived([0.0, 0.6, 0.4, 0.0], 1)
    [(0, 1), (3, 2)]
    """
    left, size, least = list(load), len(load) // cells, DEAD * sum(load) / len(load)
    dead = [centroid for centroid, share in enumerate(load) if share < least]
    pairs = []
    for centroid in dead:
        cell = range(centroid // size * size, (centroid // size + 1) * size)
        donor = max(cell, key=left.__getitem__)
        if left[donor] < 2 * least:
            donor = max(range(len(left)), key=left.__getitem__)
        if left[donor] < 2 * least:
            break
        left[donor] /= 2
        left[centroid] = left[donor]
        pairs.append((centroid, donor))
    return pairs


def load_of(centroids: Centroids, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Users in each list `[C]`, of those with these target vectors `[N, D + 1]`, some at a time."""
    load, among = np.zeros(len(centroids), np.int64), torch.from_numpy(centroids.vectors)
    for some in torch.from_numpy(vectors).split(max(1, DISTANCES // len(centroids))):
        load += np.bincount(nearest(some, among).numpy(), minlength=len(centroids))
    return load


def spread(load: NDArray[np.int64]) -> dict[str, float]:
    """How evenly users `[C]` lie in lists: the fullest against the mean, lists without any, entropy out of log C.

    >>> spread(np.array([2, 2, 2, 2]))
    {'fullest': 1.0, 'empty': 0, 'entropy': 1.0}
    """
    share = load[load > 0] / load.sum()
    entropy = -(share * np.log(share)).sum() / np.log(max(len(load), 2))
    return {"fullest": float(load.max() / load.mean()), "empty": int((load == 0).sum()), "entropy": float(entropy)}
