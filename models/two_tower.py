"""The two-tower model: a batch to its loss, and the vectors that an index serves."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from friendrec.datasets.batch import Batch, Context
from friendrec.datasets.state import PAIR_FEATURES
from friendrec.models.clustering import QUERY, TARGET, Clustering
from friendrec.models.config import EncoderConfig, TwoTowerConfig
from friendrec.models.features import Lookup, Slots
from friendrec.models.history import NoHistory, PooledAttention
from friendrec.models.interaction import utilisation, utilisation_scalars, weighted_balance_loss
from friendrec.models.losses import Candidates, sampled_softmax
from friendrec.models.towers import CopyTerm, QueryTower, TargetTower
from friendrec.models.transformer import TransformerHistory


@dataclass
class Encoded:
    """B encoded queries, the T contacts they name, and X experts, if any."""

    vector: Tensor  # [B, D + 1]
    bonus: Tensor  # [T]
    gate: Tensor | None  # [B, X] logits


class TwoTower(nn.Module):
    """Towers over one lookup; `tables` is the EmbeddingBagCollection, sharded in place by the caller."""

    def __init__(self, config: TwoTowerConfig, tables: nn.Module, context_length: int, num_clusters: int = 0) -> None:
        super().__init__()
        self.lookup = Lookup(tables)
        self.history = history_encoder(config, context_length)
        self.query_tower = QueryTower(config)
        self.target_tower = TargetTower(config)
        self.copy_term = CopyTerm(len(PAIR_FEATURES), config.hidden // 2) if config.copy_term else None
        self.clustering = Clustering(config, num_clusters, indexed=True) if num_clusters else None
        if self.clustering is not None:
            # The last bias moves all targets alike, which changes no softmax: its gradient is rounding noise, of which
            # AdamW makes full steps, and unlike scores the distances to centroids would feel them.
            self.target_tower.shift.requires_grad_(False)
        self.config = config
        self.expert_share: Tensor | None = None
        """Of each expert, in the latest slice: `models/interaction.py`, `utilisation`."""

    def forward(self, batch: Batch) -> Tensor:
        """Loss of the slice, scaled so that its mean over ranks is the weighted mean over the global batch."""
        slots = self.lookup(batch.context.ids)
        queries = self.encode_queries(batch.context, slots)
        candidates = _candidates(batch, queries.bonus.float())
        targets = self.encode_targets(slots, batch.context.num_candidates)
        with torch.autocast(targets.device.type, enabled=False):  # scores in float32 whatever the towers computed in
            loss_B = sampled_softmax(queries.vector.float(), targets.float(), candidates, self.config.dense_loss)
            if self.clustering is not None:
                lists = self._centroids(slots).float()
                own_loss = self.clustering.loss(queries.vector.float(), targets.float(), lists, batch)
        loss = (loss_B * batch.weight).sum() * batch.scale
        if self.clustering is not None:
            loss = loss + own_loss
        if queries.gate is None:
            return loss
        self.expert_share = utilisation(queries.gate, self.config.gate_top_k)
        return loss + weighted_balance_loss(queries.gate, self.config, batch)

    def scalars(self) -> dict[str, dict[str, float]]:
        """What the log tells of the latest slice beside its loss: the use of experts and lists, where there are any."""
        experts = {} if self.expert_share is None else {"experts": utilisation_scalars(self.expert_share)}
        return experts if self.clustering is None else experts | {"clusters": self.clustering.scalars()}

    def encode_queries(self, context: Context, slots: Slots) -> Encoded:
        """Query vectors and, of the contacts that each query names, the bonus."""
        actor_BD = slots.user.index_select(0, context.actor)
        condition_BD = slots.condition.index_select(0, context.condition)
        history_BD = self.history(context, slots)
        vector, gate = self.query_tower(actor_BD, history_BD, condition_BD, context.clock)
        if self.clustering is not None:
            vector = self.clustering(vector, self._centroids(slots), QUERY)
        return Encoded(vector, self._bonus(context), gate)

    def encode_targets(self, slots: Slots, num: int | None = None) -> Tensor:
        """Target vectors of the first `num` slots, or of all, `[S, D + 1]`."""
        targets: Tensor = self.target_tower(slots.user[:num])
        return targets if self.clustering is None else self.clustering(targets, self._centroids(slots), TARGET)

    def _centroids(self, slots: Slots) -> Tensor:
        """The table of centroids `[C, D]`."""
        assert self.clustering is not None and slots.clusters is not None
        return slots.clusters[: len(self.clustering.load)]

    def _bonus(self, context: Context) -> Tensor:
        if self.copy_term is None:
            return context.contact_features.new_zeros(len(context.contact_user))
        clock_T = context.clock.repeat_interleave(context.contact_offsets.diff(), dim=0)
        bonus: Tensor = self.copy_term(context.contact_features, clock_T)
        return bonus


def history_encoder(config: EncoderConfig, context_length: int) -> nn.Module:
    """What makes a vector of each query's history."""
    if config.history_encoder == "none":
        return NoHistory()
    if config.history_encoder == "transformer":
        return TransformerHistory(config.dim, config.num_heads, context_length, config.num_layers)
    return PooledAttention(config.dim, config.num_heads, context_length)


def _candidates(batch: Batch, bonus_T: Tensor) -> Candidates:
    counts_B = batch.context.contact_offsets.diff()
    width = int(counts_B.max()) if len(counts_B) else 0
    stands_BC = torch.arange(width, device=counts_B.device) < counts_B[:, None]
    contact_BC = torch.zeros_like(stands_BC, dtype=torch.int64).masked_scatter(stands_BC, batch.context.contact_user)
    bonus_BC = bonus_T.new_full(stands_BC.shape, -torch.inf).masked_scatter(stands_BC, bonus_T)
    is_target_BC = stands_BC & (contact_BC == batch.target[:, None])
    return Candidates(
        target=batch.target,
        negative=batch.negative,
        negative_log_count=batch.negative_log_count,
        shared=batch.shared,
        shared_log_count=batch.shared_log_count,
        contact=contact_BC,
        contact_bonus=bonus_BC,
        target_bonus=bonus_BC.masked_fill(~is_target_BC, 0.0).sum(1),
    )
