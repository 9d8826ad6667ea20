"""The transformer history encoder: every event of a packed sequence attends to the events before it, in one pass.

E packed events, B queries, D dimensions, H heads, V = D / H. The packed events stand end to end, without padding, in
N blocks of R = `reach` positions; with the block before it, a block holds the M = 2 · R keys that its events can meet.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from friendrec.datasets.batch import Context
from friendrec.models.features import Slots
from friendrec.models.history import EventEncoder


class TransformerHistory(nn.Module):
    """Pre-norm causal transformer, biased by relative time and position (Zhai et al. 2024), read by learned queries.

    In each of `num_layers` an event attends to R = ⌊L / (num_layers + 1)⌋, itself included, and the read-out to as many
    states, so that the whole sees at most the last L: what stands before a query's window cannot reach it, and
    training on a whole packed sequence equals serving each window alone. That R events fit into a block and the one
    before it makes the pass O(L · R).
    """

    def __init__(self, dim: int, num_heads: int, context_length: int, num_layers: int) -> None:
        super().__init__()
        if dim % num_heads or not 1 <= num_layers < context_length:
            raise ValueError(f"dim {dim}, num_heads {num_heads}, {num_layers} layers over {context_length} events")
        self.reach = context_length // (num_layers + 1)
        self.events = EventEncoder(dim)
        self.layers = nn.ModuleList(Layer(dim, num_heads, self.reach) for _ in range(num_layers))
        self.read_out = ReadOut(dim, num_heads, self.reach)
        self.empty = nn.Parameter(torch.zeros(dim))

    def forward(self, context: Context, slots: Slots) -> Tensor:
        """History of each query, float32 `[B, D]`; a learned vector where there is none."""
        states_NRD = in_blocks(self.events(context, slots), self.reach)
        lag_NRM, hidden_NRM = self._relations(context)
        for layer in self.layers:
            states_NRD = layer(states_NRD, lag_NRM, hidden_NRM)
        read_BD = self.read_out(states_NRD.flatten(0, 1), context)
        seen_B1 = (context.window_end > context.window_begin)[:, None]
        history_BD: Tensor = torch.where(seen_B1, read_BD, self.empty)
        return history_BD

    def _relations(self, context: Context) -> tuple[Tensor, Tensor]:
        """0.1 · log1p(seconds) from each key to each event, and 0 where the event sees it, -inf elsewhere: `[N, R, M]`.

        It sees what is of its sequence and at most R − 1 events older. Padding makes a sequence of its own, so that no
        position sees nothing.
        """
        sequence_NR = in_blocks(context.event_sequence + 1, self.reach)
        distance_RM = distances(self.reach, sequence_NR.device)
        visible_NRM = sequence_NR[:, :, None] == with_previous(sequence_NR)[:, None]
        visible_NRM &= (distance_RM >= 0) & (distance_RM < self.reach)
        time_NR = in_blocks(context.event_time, self.reach)
        lag_NRM = lag(time_NR[:, :, None] - with_previous(time_NR)[:, None], context.event_gap.dtype)
        return lag_NRM, torch.zeros_like(lag_NRM).masked_fill(~visible_NRM, -torch.inf)


class Layer(nn.Module):
    """Attention over the R latest events, then an MLP; both residual, both after a norm.

    Head h weighs the key that is d events and s seconds older by exp(q · k / √V + p_hd − r_h · 0.1 · log1p(s)).
    """

    def __init__(self, dim: int, num_heads: int, reach: int) -> None:
        super().__init__()
        self.num_heads, self.reach = num_heads, reach
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.position_bias = nn.Parameter(torch.zeros(reach, num_heads))
        self.time_rate = nn.Parameter(torch.linspace(0.0, 4.0, num_heads))

    def forward(self, states_NRD: Tensor, lag_NRM: Tensor, hidden_NRM: Tensor) -> Tensor:
        """States after the layer `[N, R, D]`; `TransformerHistory._relations` gives the other two, `[N, R, M]`."""
        parts = self.query_key_value(self.attention_norm(states_NRD)).chunk(3, dim=-1)
        query_NHRV, key_NHRV, value_NHRV = (p.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for p in parts)
        distance_RM = distances(self.reach, states_NRD.device).clamp(0, self.reach - 1)
        place_HRM = embedding(distance_RM, self.position_bias).permute(2, 0, 1)
        # By hand: the fused attention of torch takes no bias that learns, and its plain one is slower than this.
        key_NHVM = with_previous(key_NHRV, dim=2).transpose(2, 3)
        logit_NHRM = query_NHRV @ key_NHVM / math.sqrt(query_NHRV.shape[3]) + place_HRM
        logit_NHRM = logit_NHRM - self.time_rate[:, None, None] * lag_NRM[:, None] + hidden_NRM[:, None]
        attended_NHRV = logit_NHRM.softmax(3) @ with_previous(value_NHRV, dim=2)
        states_NRD = states_NRD + self.output(attended_NHRV.transpose(1, 2).flatten(2))
        result: Tensor = states_NRD + self.mlp(self.mlp_norm(states_NRD))
        return result


class ReadOut(nn.Module):
    """Attention by learned queries, one a head, over the states of each query's R latest events.

    Head h weighs the state x that is d events and s seconds older than the latest by
    exp(w_h · x + p_hd − r_h · 0.1 · log1p(s)). Without a residual: what the latest event was is no better known than
    what the others were, and whom somebody meets next depends on all of them.
    """

    def __init__(self, dim: int, num_heads: int, reach: int) -> None:
        super().__init__()
        self.num_heads, self.reach = num_heads, reach
        self.norm = nn.LayerNorm(dim)
        self.logit, self.value, self.output = nn.Linear(dim, num_heads), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.position_bias = nn.Parameter(torch.zeros(reach, num_heads))
        self.time_rate = nn.Parameter(torch.linspace(0.0, 4.0, num_heads))

    def forward(self, states_XD: Tensor, context: Context) -> Tensor:
        """From the states of all places, packed events first, to `[B, D]`; meaningless where a query has no history."""
        states_XD = self.norm(states_XD)
        last_B = torch.searchsorted(context.event_position, context.window_end - 1)  # among the packed events
        older_R = torch.arange(self.reach, device=last_B.device)
        place_BR = (last_B[:, None] - older_R).clamp(0, len(states_XD) - 1)
        time_X = pad(context.event_time, (0, len(states_XD) - len(context.event_time)))
        lag_BR = lag(time_X[place_BR[:, :1]] - time_X[place_BR], context.event_gap.dtype)
        logit_BRH = take(self.logit(states_XD), place_BR) + self.position_bias - lag_BR[..., None] * self.time_rate
        # The first place is never hidden, so that a query without history has finite weights too.
        length_B1 = (context.window_end - context.window_begin)[:, None].clamp(min=1)
        weight_BRH = logit_BRH.masked_fill((older_R >= length_B1)[..., None], -torch.inf).softmax(1)
        value_BRHV = take(self.value(states_XD), place_BR).unflatten(2, (self.num_heads, -1))
        pooled_BHV = torch.einsum("brh,brhv->bhv", weight_BRH, value_BRHV)
        read_BD: Tensor = self.output(pooled_BHV.flatten(1))
        return read_BD


def lag(microseconds: Tensor, dtype: torch.dtype) -> Tensor:
    """0.1 · log1p(seconds), as everywhere in a batch; 0 for what is not the past."""
    return 0.1 * torch.log1p(1e-6 * microseconds.clamp(min=0).to(dtype))


def take(rows: Tensor, place_BR: Tensor) -> Tensor:
    """Rows of `[X, …]` by place, `[B, R, …]`."""
    return rows.index_select(0, place_BR.flatten()).unflatten(0, place_BR.shape)


def in_blocks(packed: Tensor, size: int) -> Tensor:
    """Packed `[E, …]` as `[N, size, …]`, zeros behind the last event; at least one block."""
    padding = max(-(-len(packed) // size), 1) * size - len(packed)
    return pad(packed, (0, 0) * (packed.ndim - 1) + (0, padding)).unflatten(0, (-1, size))


def with_previous(blocks: Tensor, dim: int = 1) -> Tensor:
    """Each block's positions behind those of the block before it (zeros before the first), along `dim`."""
    before = torch.cat([torch.zeros_like(blocks[:1]), blocks[:-1]])
    return torch.cat([before, blocks], dim=dim)


def distances(size: int, device: torch.device) -> Tensor:
    """How many positions each of a block's M keys stands before each of its positions, `[size, 2 · size]`."""
    return torch.arange(size, 2 * size, device=device)[:, None] - torch.arange(2 * size, device=device)
