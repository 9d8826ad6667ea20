"""The model that writes codes of users: a batch to its loss, and the decoder that a search asks.

    log P(code) = Σ_l log P(token l | query, tokens before l)            (Rajput et al. 2023)
    score(v) = log P(code of v) + 1[v is a contact of u] · m(pair, log P(code of v))

B queries, L levels, K tokens of a level, D dimensions, M places of the memory, T named contacts, N rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from friendrec.datasets.batch import Batch, Context
from friendrec.datasets.state import PAIR_FEATURES
from friendrec.models.clustering import QUERY, Clustering
from friendrec.models.config import StuConfig
from friendrec.models.features import Lookup, Slots
from friendrec.models.interaction import utilisation, utilisation_scalars, weighted_balance_loss
from friendrec.models.memory import Memory
from friendrec.models.stu_decoder import CausalTransformer, Head, Recalled, Towers
from friendrec.models.towers import CopyTerm, QueryTower
from friendrec.models.two_tower import Encoded, history_encoder

COPY_EVERY = 16  # one example of so many trains the copy term: each of its contacts is a code to be scored
CHUNK = 1 << 14  # codes scored at a time

Codebooks = tuple[Tensor, ...]
"""Of each level the vectors of its tokens, `[at least K, D]`."""


class Stu(nn.Module):
    """The encoders of the two-tower model over tokens, and a decoder; `tables` is the EmbeddingBagCollection.

    The decoder reads the tokens' vectors and predicts with them: a logit is a product with the token's vector.
    """

    def __init__(
        self,
        config: StuConfig,
        tables: nn.Module,
        context_length: int,
        sizes: tuple[int, ...],
        num_clusters: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        self.lookup = Lookup(tables)
        self.history = history_encoder(config, context_length)
        self.query_tower = QueryTower(config)
        self.clustering = Clustering(config, num_clusters, indexed=False) if num_clusters else None
        self.memory = Memory(config.dim, config.memory)
        self.decoder = {"towers": Towers, "transformer": CausalTransformer}[config.decoder](config, len(sizes))
        self.heads = nn.ModuleList(Head(config.dim, sizes[: level + 1]) for level in range(len(sizes)))
        self.copy_term = CopyTerm(len(PAIR_FEATURES) + 1, config.hidden // 2) if config.copy_term else None
        self.seen: dict[str, dict[str, Tensor]] = {}
        """What `scalars` tells of the latest slice."""
        self.expert_share: Tensor | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Loss of the slice, scaled so that its mean over ranks is the weighted mean over the global batch."""
        slots = self.lookup(batch.context.ids)
        flat_BX, gate_BX = self._contexts(batch.context, slots)
        recalled = self.recall(flat_BX)
        code_BL = batch.context.codes[batch.target]
        row_B = torch.arange(len(code_BL), device=code_BL.device)
        logits = self.logits(recalled, row_B, code_BL[:, :-1], slots.codebooks)
        loss_BL = _losses(logits, code_BL)
        self.seen = _accuracies(loss_BL, logits, code_BL)
        loss_B = loss_BL.sum(1)
        if self.copy_term is not None:
            loss_B = loss_B + self._copy_loss(self.copy_term, batch, recalled, slots.codebooks)
        loss = (loss_B * batch.weight).sum() * batch.scale
        if gate_BX is None:
            return loss
        self.expert_share = utilisation(gate_BX, self.config.gate_top_k)
        return loss + weighted_balance_loss(gate_BX, self.config, batch)

    def scalars(self) -> dict[str, dict[str, float]]:
        """Teacher-forced loss and accuracy of each level and of whole codes in the latest slice; the use of experts."""
        seen = {name: {key: float(value) for key, value in values.items()} for name, values in self.seen.items()}
        experts = {} if self.expert_share is None else {"experts": utilisation_scalars(self.expert_share)}
        return seen | experts

    def encode_queries(self, context: Context, slots: Slots) -> Encoded:
        """The decoder's contexts `[B, (M + 1) · D + M]`, and the bonus of the contacts that each query names."""
        flat_BX, gate_BX = self._contexts(context, slots)
        if self.copy_term is None:
            return Encoded(flat_BX, context.contact_features.new_zeros(len(context.contact_user)), gate_BX)
        query_T, code_TL = _named(context)
        log_p_T = self.log_probability(self.recall(flat_BX), query_T, code_TL, slots.codebooks)
        return Encoded(flat_BX, self._bonus(self.copy_term, context, query_T, log_p_T), gate_BX)

    def recall(self, flat_BX: Tensor) -> Recalled:
        """What the decoder reads, from what `encode_queries` gives."""
        dim, places = self.config.dim, self.config.memory + 1
        context_BD, memory, stands_BM = flat_BX.split([dim, places * dim, places], dim=1)
        hidden_BM = torch.zeros_like(stands_BM).masked_fill(stands_BM < 0.5, -torch.inf)
        return Recalled(context_BD, memory.unflatten(1, (places, dim)), hidden_BM)

    def logits(
        self, recalled: Recalled, row_N: Tensor, before_NL: Tensor, codebooks: Codebooks, first: int = 0
    ) -> list[Tensor]:
        """`[N, K]` for each level from `first` to the one after the tokens before, given these.

        `row_N` says whose query each row is of. A token of -1 is none.
        """
        before = [
            codebook.index_select(0, token_N.clamp(min=0)) * (token_N >= 0)[:, None]
            for codebook, token_N in zip(codebooks[:-1], before_NL.unbind(1), strict=False)
        ]
        states = self.decoder(recalled, row_N, before, first)
        return [
            self.heads[level](state_ND, codebooks[level][: self.sizes[level]], before_NL[:, :level])
            for level, state_ND in enumerate(states, start=first)
        ]

    @torch.no_grad()
    def log_probability(self, recalled: Recalled, row_N: Tensor, code_NL: Tensor, codebooks: Codebooks) -> Tensor:
        """log P of whole codes, float32 `[N]`, a chunk at a time; `row_N` ascends. 0 for who has no code."""
        parts = []
        for row, code in zip(row_N.split(CHUNK), code_NL.split(CHUNK), strict=True):
            queries, own = torch.unique_consecutive(row, return_inverse=True)
            some, each = recalled.take(queries), torch.arange(len(queries), device=row.device)
            (first,) = self.logits(some, each, code[: len(each), :0], codebooks)  # of all codes of a query at once
            later = self.logits(some, own, code[:, :-1], codebooks, first=1) if code.shape[1] > 1 else []
            parts.append(-_losses([first[own], *later], code).sum(1))
        return torch.cat(parts)

    def _contexts(self, context: Context, slots: Slots) -> tuple[Tensor, Tensor | None]:
        """The decoder's contexts, flat, and the gate's logits of a mixture of experts."""
        actor_BD = slots.user.index_select(0, context.actor)
        condition_BD = slots.condition.index_select(0, context.condition)
        history_BD = self.history(context, slots)
        vector, gate_BX = self.query_tower(actor_BD, history_BD, condition_BD, context.clock)
        if self.clustering is not None and slots.clusters is not None:
            vector = self.clustering(vector, slots.clusters[: len(self.clustering.load)], QUERY)
        memory_BMD, stands_BM = self.memory(context, slots)
        return torch.cat([vector[:, :-1], memory_BMD.flatten(1), stands_BM.to(vector)], dim=1), gate_BX

    def _copy_loss(self, copy_term: CopyTerm, batch: Batch, recalled: Recalled, codebooks: Codebooks) -> Tensor:
        """What the bonuses add to −log P(target), `[B]`: log Z − m(target), the latter where it is a contact.

        P sums to 1 over all codes, so that Z = 1 + Σ_c P(c) · (exp m(c) − 1) over the contacts is the softmax over
        everybody. P has no gradient here, and one example in COPY_EVERY stands for all.
        """
        context = batch.context
        query_T, code_TL = _named(context)
        chosen_B = batch.example % COPY_EVERY == 0
        chosen_T = (chosen_B[query_T] & (code_TL[:, 0] >= 0)).nonzero()[:, 0]
        query_T = query_T[chosen_T]
        log_p_T = self.log_probability(recalled, query_T, code_TL[chosen_T], codebooks)
        bonus_T = self._bonus(copy_term, context, query_T, log_p_T, chosen_T).float()
        is_target_T = context.contact_user[chosen_T] == batch.target[query_T]
        nothing_B = bonus_T.new_zeros(len(chosen_B))
        others_B = (1 - nothing_B.index_add(0, query_T, log_p_T.exp())).clamp(min=1e-6)
        named_B = nothing_B.index_add(0, query_T, (log_p_T + bonus_T).exp())
        target_B = nothing_B.index_add(0, query_T, bonus_T * is_target_T)
        return COPY_EVERY * chosen_B * ((others_B + named_B).log() - target_B)

    def _bonus(
        self,
        copy_term: CopyTerm,
        context: Context,
        query_T: Tensor,
        log_p_T: Tensor,
        chosen: Tensor | slice = slice(None),
    ) -> Tensor:
        """Bonus of the chosen contacts. How likely their codes are is a feature, or it could not be outweighed."""
        features_TF = torch.cat([context.contact_features[chosen], 0.1 * log_p_T[:, None]], dim=1)
        bonus_T: Tensor = copy_term(features_TF, context.clock[query_T])
        return bonus_T


@dataclass(frozen=True)
class Writer:
    """The decoder of a model as a search asks it: see `models/decoding.py`, `Decoder`."""

    model: Stu
    codebooks: Codebooks

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each level."""
        return self.model.sizes

    def cache(self, context: Tensor) -> Recalled:
        """What the decoder reads of each query."""
        return self.model.recall(context.to(self.codebooks[0].device))

    def log_probabilities(self, cache: Recalled, row: Tensor, prefix: Tensor) -> Tensor:
        """log P of each token of the level after the prefix, float32 `[R, K]`."""
        row, prefix = (part.to(self.codebooks[0].device) for part in (row, prefix))
        (logits,) = self.model.logits(cache, row, prefix, self.codebooks, first=prefix.shape[1])
        return logits.float().log_softmax(1)


def _named(context: Context) -> tuple[Tensor, Tensor]:
    """Of each named contact the query, `[T]`, and the code, `[T, L]`."""
    counts_B = context.contact_offsets.diff()
    query_T = torch.arange(len(counts_B), device=counts_B.device).repeat_interleave(counts_B)
    return query_T, context.codes[context.contact_user]


def _losses(logits: list[Tensor], code_NL: Tensor) -> Tensor:
    """−log P of each token, float32 `[N, L]`; 0 where the code has ended."""
    pairs = zip(logits, code_NL.unbind(1), strict=True)
    return torch.stack(
        [cross_entropy(logit.float(), token, ignore_index=-1, reduction="none") for logit, token in pairs], dim=1
    )


def _accuracies(loss_BL: Tensor, logits: list[Tensor], code_BL: Tensor) -> dict[str, dict[str, Tensor]]:
    """Means over the examples whose code has the level, and over all examples of whole codes."""
    right_BL = torch.stack([logit.argmax(1) for logit in logits], dim=1) == code_BL
    has_BL = code_BL >= 0
    counts_L = has_BL.sum(0).clamp(min=1)
    means = zip(loss_BL.detach().sum(0) / counts_L, (right_BL & has_BL).sum(0) / counts_L, strict=True)
    levels = {f"level_{level}": {"loss": loss, "accuracy": right} for level, (loss, right) in enumerate(means)}
    whole = {"loss": loss_BL.detach().sum(), "accuracy": (right_BL | ~has_BL).all(1).sum()}
    return {**levels, "code": {name: total / max(len(code_BL), 1) for name, total in whole.items()}}
