"""Clusters inside the model: soft ones that shape both towers, hard ones that are the lists of an index.

    weights = softmax(u @ Cᵀ / τ)        clustered = weights @ C

C centroids, far fewer than users, are learned with everything else. A user's hard assignment is the centroid nearest to
its target vector; a query's score of a list is its product with the centroid, about the mean score of the members.
Three losses make this a good inverted file:

- co-assignment: the query should expect its target's list, −Σ_c ĥ(c) log softmax_c(q · C). ĥ is the target's hard
  assignment; its gradient is that of the soft one at an annealed temperature (straight-through, Bengio et al. 2013);
- balance: Σ_c log(C · load(c)) p(c), p the soft assignment of users and load the running share of each list: in
  expectation log C less the entropy of the load, and with the same gradient; 0 where all lists are equally long;
- quantisation: half the squared distance of users to their centroid (online k-means).

They teach centroids and queries, not target vectors: what pushes users out of crowded lists pushes most of them alike,
no loss pushes back, and row-wise Adagrad makes full steps of it (tried: the mean of all vectors ran away).

Two levels: √C cells of √C centroids each; a cell's vector is the mean of its centroids. The towers then see the cells,
and the losses ask for the cell first, then for the centroid among those of the cell. Without target vectors, where
users are tokens, there are no losses and no cells.

B queries, S users, C centroids, R of them in a cell, D dimensions.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import one_hot

from friendrec.datasets.batch import Batch
from friendrec.models.config import EncoderConfig

QUERY, TARGET = range(2)  # the towers
COLDEST = 0.1  # temperature at the end of training; 1 at the start
MEMORY = 0.99  # of the running load, a step
BIAS_MEMORY = 0.8  # of a list's running bias, a step in which it has users
CENTRE_MEMORY = 0.5  # of the running mean of all users
SAMPLED = 2  # of an example's negatives, users drawn from all, are sorted into lists


def soft_clusters(user_SD: Tensor, centroid_CD: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Weights `[S, C]` of the centroids, rows summing to 1, and the weighted means `[S, D]`."""
    weights = torch.softmax(user_SD @ centroid_CD.T / temperature, dim=1)
    return weights, weights @ centroid_CD


class Clustering(nn.Module):
    """What the clusters need beside the table of centroids; `indexed` where there are target vectors to sort.

    All target vectors may move together, as no loss minds, and gradients could only limp after them: so the centroids
    are relative to a running mean. Their last component is a running mean too, of the members' biases.
    """

    load: Tensor  # [C] running share of the users in each list
    centre: Tensor  # [D] running mean of all target vectors, to which the table's centroids are relative
    bias: Tensor  # [C] running mean of the biases of the users in each list
    ready: Tensor  # 1 once k-means has placed the centroids; before that nothing here acts
    temperature: Tensor

    def __init__(self, config: EncoderConfig, num_clusters: int, indexed: bool) -> None:
        super().__init__()
        self.config = config
        self.cells = math.isqrt(num_clusters) if config.two_level and indexed else 1
        self.gates = nn.Parameter(torch.zeros(1 + indexed)) if config.clusters == "residual" else None
        self.register_buffer("load", torch.full((num_clusters,), 1 / num_clusters))
        self.register_buffer("centre", torch.zeros(config.dim))
        self.register_buffer("bias", torch.zeros(num_clusters))
        self.register_buffer("ready", torch.tensor(float(not indexed)))
        self.register_buffer("temperature", torch.tensor(1.0))

    def anneal(self, progress: float) -> None:
        """Set the temperature of the soft assignment that the losses see, for `progress` from 0 to 1."""
        self.temperature.fill_(COLDEST**progress)

    def forward(self, vector_SD: Tensor, centroid_CD: Tensor, tower: int) -> Tensor:
        """Vectors `[S, D + 1]` of a tower, QUERY or TARGET, as the clusters change them.

        `residual` adds a learned share of the clustered vector to all but the last component, `representation` puts it
        in their place.
        """
        own_SD, last_S1 = vector_SD[:, :-1], vector_SD[:, -1:]
        _, clustered_SD = soft_clusters(own_SD, self._by_cell(centroid_CD).mean(1) if self.cells > 1 else centroid_CD)
        share = self.gates[tower] if self.gates is not None else 1.0
        change_SD = clustered_SD if self.gates is not None else clustered_SD - own_SD
        return torch.cat([own_SD + self.ready * share * change_SD, last_S1], dim=1)

    def centroids(self, centroid_CD: Tensor) -> Tensor:
        """The centroids among target vectors, `[C, D + 1]`."""
        return torch.cat([centroid_CD + self.centre, self.bias[:, None]], dim=1)

    def loss(self, query_BD: Tensor, targets_SD: Tensor, centroid_CD: Tensor, batch: Batch) -> Tensor:
        """The three losses of a slice, scaled as the model's loss is; in training all ranks call this together."""
        centroids_CD = self.centroids(centroid_CD)
        sampled_BK = batch.negative[:, :SAMPLED] if batch.negative.shape[1] else batch.target[:, None]
        users_SD = targets_SD.detach().index_select(0, sampled_BK.flatten())
        list_S = nearest(users_SD, centroids_CD)
        self._count(list_S, users_SD, batch.weight.repeat_interleave(sampled_BK.shape[1]))
        distance_S = (users_SD - centroids_CD.index_select(0, list_S)).square().sum(1)
        of_users_S = 0.5 * distance_S + self.config.list_balance_loss * self._crowding(users_SD, list_S, centroids_CD)
        # The more centroids, the smaller is each one's part in a mean: its gradient is that of its own users.
        of_users_S = of_users_S.detach() + len(centroids_CD) * (of_users_S - of_users_S.detach())
        co_B = self._surprise(query_BD, targets_SD.detach().index_select(0, batch.target), centroids_CD)
        loss_B = self.config.co_assignment_loss * co_B + of_users_S.unflatten(0, sampled_BK.shape).mean(1)
        return self.ready * (loss_B * batch.weight).sum() * batch.scale

    def scalars(self) -> dict[str, float]:
        """Of the running load: the fullest list against the mean, lists as good as empty, the entropy's share."""
        lists = len(self.load)
        entropy = float(torch.special.entr(self.load).sum() / math.log(max(lists, 2)))
        empty = int((self.load < 0.05 / lists).sum())
        return {"fullest": lists * float(self.load.max()), "empty": empty, "entropy": entropy}

    def _surprise(self, query_BD: Tensor, target_BD: Tensor, centroids_CD: Tensor) -> Tensor:
        """Co-assignment: −log of the share that the query gives to its target's list, `[B]`."""
        loss_B = query_BD.new_zeros(len(query_BD))
        for codebook, choice_B in self._levels(centroids_CD, nearest(target_BD, centroids_CD)):
            soft_BK = self._soft(target_BD, codebook)
            through_BK = one_hot(choice_B, soft_BK.shape[1]) + soft_BK - soft_BK.detach()
            loss_B = loss_B - (through_BK * _products(query_BD, codebook).log_softmax(1)).sum(1)
        return loss_B

    def _crowding(self, users_SD: Tensor, list_S: Tensor, centroids_CD: Tensor) -> Tensor:
        """Balance: how crowded the lists are that users are assigned to, softly: log of load over mean load, `[S]`."""
        load_XK = self.load.unflatten(0, (self.cells, -1)) + 1e-3 / len(self.load)
        of_cell_X1 = load_XK.sum(1, keepdim=True)
        shares = [load_XK] if self.cells == 1 else [of_cell_X1.T, load_XK / of_cell_X1]
        crowd_S = users_SD.new_zeros(len(users_SD))
        for (codebook, _), share in zip(self._levels(centroids_CD, list_S), shares, strict=True):
            crowd = (share.shape[1] * share).log()
            crowd = crowd if len(crowd) == 1 else crowd.index_select(0, list_S // share.shape[1])
            crowd_S = crowd_S + (self._soft(users_SD, codebook) * crowd).sum(1)
        return crowd_S

    def _levels(self, centroids_CD: Tensor, list_S: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each level what a user chooses from, `[K, D + 1]` or `[S, K, D + 1]`, and its choice `[S]`."""
        if self.cells == 1:
            return [(centroids_CD, list_S)]
        by_cell = self._by_cell(centroids_CD)
        size = by_cell.shape[1]
        return [(by_cell.mean(1), list_S // size), (by_cell.index_select(0, list_S // size), list_S % size)]

    def _by_cell(self, centroids_CD: Tensor) -> Tensor:
        """`[cells, R, D]`."""
        return centroids_CD.unflatten(0, (self.cells, -1))

    def _soft(self, users_SD: Tensor, codebook: Tensor) -> Tensor:
        """Soft assignment by distance, `[S, K]`: `soft_clusters`' weights with −½|C|² as the component that meets 1."""
        return ((_products(users_SD, codebook) - 0.5 * codebook.square().sum(-1)) / self.temperature).softmax(1)

    @torch.no_grad()
    def _count(self, list_S: Tensor, users_SD: Tensor, weight_S: Tensor) -> None:
        """Let this step's users, those of all ranks, into the running means."""
        lists, sums = len(self.load), self.load.new_zeros(2 * len(self.load) + users_SD.shape[1] - 1)
        count_C, bias_C, sum_D = sums[:lists], sums[lists : 2 * lists], sums[2 * lists :]
        count_C.index_add_(0, list_S, weight_S)
        bias_C.index_add_(0, list_S, weight_S * users_SD[:, -1])
        sum_D.add_(weight_S @ users_SD[:, :-1])
        if dist.is_initialized():
            dist.all_reduce(sums)
        total = count_C.sum()
        if self.ready and total:
            self.load.lerp_(count_C / total, 1 - MEMORY)
            self.bias.lerp_(torch.where(count_C > 0, bias_C / count_C.clamp(min=1e-9), self.bias), 1 - BIAS_MEMORY)
            self.centre.lerp_(sum_D / total, 1 - CENTRE_MEMORY)


@torch.no_grad()
def nearest(users_SD: Tensor, centroids_CD: Tensor) -> Tensor:
    """Hard assignment: the centroid at the least Euclidean distance, `[S]`."""
    return (users_SD @ centroids_CD.T - 0.5 * centroids_CD.square().sum(1)).argmax(1)


def _products(vector_SD: Tensor, codebook: Tensor) -> Tensor:
    """Of each vector with the codebook `[K, D]`, or with its own `[S, K, D]`: `[S, K]`."""
    return vector_SD @ codebook.T if codebook.ndim == 2 else (codebook @ vector_SD[:, :, None]).squeeze(2)
