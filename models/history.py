"""History encoders: one vector for each query from the events before it, all queries of a sequence in one pass.

E packed events, B queries, D dimensions, H heads, V = D / H, N blocks of L positions (`datasets/batch.py`).
"""

import torch
from torch import Tensor, nn

from friendrec.datasets.batch import Context
from friendrec.models.features import Slots

CONTENT = 8.0  # bound of a logit's content part; with FORGETTING it keeps exp() well inside float32
FORGETTING = 40.0  # bound of what a block of L events can forget in all


class NoHistory(nn.Module):
    """What happened before is not read: zeros."""

    def forward(self, context: Context, slots: Slots) -> Tensor:
        """Zeros `[B, D]`."""
        return slots.user.new_zeros(len(context.actor), slots.user.shape[1])


class EventEncoder(nn.Module):
    """An event as a vector: its partner, its kind (action and direction), the time since the event before."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gap = nn.Linear(1, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, context: Context, slots: Slots) -> Tensor:
        partner_ED = slots.user.index_select(0, context.event_user)
        kind_ED = slots.event.index_select(0, context.event_kind)
        events_ED: Tensor = self.norm(partner_ED + kind_ED + self.gap(context.event_gap[:, None]))
        return events_ED


class PooledAttention(nn.Module):
    """Attention by learned queries over each query's window, O(L) for all positions of a sequence.

    Head h weighs event j at a query that sees events up to e by exp(c_hj − Σ_{j<i≤e} f_hi), normalised, where the
    content c is bounded and f ≥ 0 forgets with the logarithm of each gap (a forget gate, as in Lin et al. 2025). A
    window of at most L events is a suffix of one block and a prefix of the next: two running sums give both parts.
    A learned query against a key projection is one linear map from an event to its logit.
    """

    def __init__(self, dim: int, num_heads: int, context_length: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is no multiple of num_heads {num_heads}")
        self.num_heads, self.length = num_heads, context_length
        self.events = EventEncoder(dim)
        self.value = nn.Linear(dim, dim)
        self.logit = nn.Linear(dim, num_heads)
        self.forget = nn.Parameter(torch.linspace(-4.0, 2.0, num_heads))
        self.empty = nn.Parameter(torch.zeros(dim))
        self.output = nn.Linear(dim, dim)

    def forward(self, context: Context, slots: Slots) -> Tensor:
        """History of each query, float32 `[B, D]`; a learned vector where there is none."""
        events_ED = self.events(context, slots)
        content_EH = CONTENT * torch.tanh(self.logit(events_ED) / CONTENT)
        rate_H = torch.sigmoid(self.forget) * (FORGETTING / self.length)
        forgotten_EH = torch.clamp(context.event_gap[:, None], max=1.0) * rate_H
        value_EHV = self.value(events_ED).unflatten(1, (self.num_heads, -1))
        logit_NLH, forgotten_NLH, value_NLHV = (
            self._blocks(part, context) for part in (content_EH, forgotten_EH, value_EHV)
        )
        clock_NLH = forgotten_NLH.cumsum(1)
        valid_NL1 = self._blocks(torch.ones_like(content_EH[:, :1]), context)

        # Weights relative to the start of the block (for its prefixes) and to its end (for its suffixes).
        prefix = self._running(torch.exp(logit_NLH + clock_NLH) * valid_NL1, value_NLHV)
        suffix_weight_NLH = torch.exp(logit_NLH + clock_NLH - clock_NLH[:, -1:]) * valid_NL1
        suffix = self._running(suffix_weight_NLH.flip(1), value_NLHV.flip(1)).flip(1)

        begin_B, end_B = context.window_begin, context.window_end
        last_B = torch.clamp(end_B - 1, min=0)
        crosses_B = begin_B // self.length < last_B // self.length
        total_BHV = _rows(prefix, last_B) + _rows(suffix, begin_B) * (crosses_B & (end_B > begin_B))[:, None, None]
        pooled_BD = (total_BHV[..., :-1] / total_BHV[..., -1:].clamp(min=1e-30)).flatten(1)
        seen_B1 = (end_B > begin_B)[:, None]
        history_BD: Tensor = torch.where(seen_B1, self.output(pooled_BD), self.empty)
        return history_BD

    def _blocks(self, packed: Tensor, context: Context) -> Tensor:
        """Packed `[E, …]` laid out as `[N, L, …]`, zero where no event stands; at least one block."""
        blocks = max(context.num_blocks, 1)
        laid_out = packed.new_zeros(blocks * self.length, *packed.shape[1:])
        laid_out = laid_out.index_copy(0, context.event_position, packed)
        return laid_out.unflatten(0, (blocks, self.length))

    @staticmethod
    def _running(weight_NLH: Tensor, value_NLHV: Tensor) -> Tensor:
        """Running sums of weighted values and, as the last column, of the weights: `[N, L, H, V + 1]`."""
        weighted = torch.cat([weight_NLH[..., None] * value_NLHV, weight_NLH[..., None]], dim=-1)
        return weighted.cumsum(1)


def _rows(blocks: Tensor, position: Tensor) -> Tensor:
    flat = blocks.flatten(0, 1)
    return flat.index_select(0, position.clamp(max=len(flat) - 1))
