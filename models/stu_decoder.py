"""What writes a code, token by token: towers, one MLP a level, or a small causal transformer.

Both read the query vector, the tokens so far, and, by attention, the latest events of the history one by one: a pooled
history no longer tells which second token came with which first.

Q queries, N rows (an example or a beam each, W of a query at most), M places of the memory, P positions, D dimensions,
H heads.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from friendrec.models.config import StuConfig
from friendrec.models.interaction import mlp


@dataclass
class Recalled:
    """What a decoder reads of Q queries."""

    context: Tensor  # [Q, D] query vector
    memory: Tensor  # [Q, M, D] events of the history
    hidden: Tensor  # [Q, M] 0, and -inf where no event stands

    def take(self, queries: Tensor) -> Self:
        """That of some of the queries."""
        return type(self)(*(part.index_select(0, queries) for part in (self.context, self.memory, self.hidden)))


class Places:
    """N rows, in any order, laid out by query, `[Q, W, …]`: one product then serves all rows of a query."""

    def __init__(self, row_N: Tensor, num_queries: int) -> None:
        counts_Q = torch.bincount(row_N, minlength=num_queries)
        first_Q = counts_Q.cumsum(0) - counts_Q
        order_N = row_N.argsort(stable=True)
        column_N = torch.empty_like(row_N)
        column_N[order_N] = torch.arange(len(row_N), device=row_N.device) - first_Q[row_N[order_N]]
        self.shape = num_queries, int(counts_Q.max()) if num_queries else 0
        self.at_N = row_N * self.shape[1] + column_N

    def spread(self, rows_NX: Tensor) -> Tensor:
        """`[Q, W, X]`, zeros where a query has fewer rows."""
        flat = rows_NX.new_zeros(self.shape[0] * self.shape[1], rows_NX.shape[1])
        return flat.index_copy(0, self.at_N, rows_NX).unflatten(0, self.shape)

    def gather(self, laid_out_QWX: Tensor) -> Tensor:
        """Back to `[N, X]`."""
        return laid_out_QWX.flatten(0, 1).index_select(0, self.at_N)


class Attention(nn.Module):
    """Rows attend to the memory of their query: Σ_h O_h Σ_m softmax_m(q_h · x_m / √D) x_m, q_h = W_h input.

    Keys and values are the memory itself: a key projection folds into W_h, a value projection into O_h, and so neither
    is computed for every place of every query.
    """

    def __init__(self, inputs: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.query, self.output = nn.Linear(inputs, num_heads * dim), nn.Linear(num_heads * dim, dim)

    def forward(self, input_NI: Tensor, place: Places, recalled: Recalled) -> Tensor:
        """What each row reads, `[N, D]`."""
        dim = recalled.memory.shape[2]
        query_QWX = place.spread(self.query(input_NI) / math.sqrt(dim))
        query_QYD = query_QWX.unflatten(2, (-1, dim)).flatten(1, 2)  # Y = W · H
        logit_QYM = query_QYD @ recalled.memory.transpose(1, 2) + recalled.hidden[:, None]
        read_QYD = logit_QYM.softmax(2) @ recalled.memory
        read: Tensor = self.output(place.gather(read_QYD.view_as(query_QWX)))
        return read


class Towers(nn.Module):
    """A tower a level: an MLP of [context, tokens so far, their product, what attention by both reads]."""

    def __init__(self, config: StuConfig, num_levels: int) -> None:
        super().__init__()
        dim, levels = config.dim, range(num_levels)
        self.attention = nn.ModuleList(Attention(2 * dim, dim, config.num_heads) for _ in levels)
        self.towers = nn.ModuleList(mlp(4 * dim, config.decoder_hidden, dim) for _ in levels)
        self.skip = nn.ModuleList(nn.Linear(3 * dim, dim, bias=False) for _ in levels)

    def forward(self, recalled: Recalled, row_N: Tensor, tokens: list[Tensor], first: int) -> list[Tensor]:
        """States `[N, D]` of the levels `first` … `len(tokens)`, from the vectors `[N, D]` of the tokens before.

        `row_N` says whose query each row is of.
        """
        context_ND = recalled.context.index_select(0, row_N)
        place = Places(row_N, len(recalled.context))
        states = []
        for level in range(first, len(tokens) + 1):
            so_far_ND = sum(tokens[1:level], tokens[0]) if level else torch.zeros_like(context_ND)
            both = torch.cat([context_ND, so_far_ND], dim=1)
            linear = torch.cat([both, self.attention[level](both, place, recalled)], dim=1)
            crossed = torch.cat([linear, context_ND * so_far_ND], dim=1)
            states.append(self.towers[level](crossed) + self.skip[level](linear))
        return states


class CausalTransformer(nn.Module):
    """Pre-norm layers over [context, token 0, …] with learned positions; same contract as `Towers`."""

    def __init__(self, config: StuConfig, num_levels: int) -> None:
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(num_levels, config.dim))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(self, recalled: Recalled, row_N: Tensor, tokens: list[Tensor], first: int) -> list[Tensor]:
        states_NPD = torch.stack([recalled.context.index_select(0, row_N), *tokens], dim=1)
        states_NPD = states_NPD + self.position[: states_NPD.shape[1]]
        *earlier, last = self.layers
        for layer in earlier:
            states_NPD = layer(states_NPD, row_N, recalled)
        return list(last(states_NPD, row_N, recalled, first).unbind(1))


class DecoderLayer(nn.Module):
    """Causal attention among the positions, attention to the memory, an MLP; all residual, all after a norm."""

    def __init__(self, config: StuConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.decoder_hidden
        self.num_heads = config.num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.query, self.key_value, self.output = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.across = Attention(dim, dim, config.num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, states_NPD: Tensor, row_N: Tensor, recalled: Recalled, first: int = 0) -> Tensor:
        """States of the positions from `first` on."""
        among, across, mixed = self.norms
        normed_NPD = among(states_NPD)
        parts = self.query(normed_NPD[:, first:]), *self.key_value(normed_NPD).chunk(2, dim=2)
        query, key, value = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        sees = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril(first)
        attended_NHPV = scaled_dot_product_attention(query, key, value, attn_mask=sees)
        states_NPD = states_NPD[:, first:] + self.output(attended_NHPV.transpose(1, 2).flatten(2))
        # Every position of a row is a row of its query to the attention across.
        place = Places(row_N.repeat_interleave(states_NPD.shape[1]), len(recalled.context))
        read = self.across(across(states_NPD).flatten(0, 1), place, recalled)
        states_NPD = states_NPD + read.unflatten(0, states_NPD.shape[:2])
        result: Tensor = states_NPD + self.mlp(mixed(states_NPD))
        return result


class Head(nn.Module):
    """Logits of a level's tokens: a product with their vectors, a bias, and what each token before makes likely.

    The last are tables `[tokens of the earlier level, K]`: which tokens exist after which is no matter of the query,
    and of too high a rank for a product of vectors.
    """

    def __init__(self, dim: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        *before, own = sizes
        self.norm = nn.LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(own))
        self.after = nn.ParameterList(nn.Parameter(torch.zeros(size, own)) for size in before)

    def forward(self, state_ND: Tensor, codebook_KD: Tensor, before_NL: Tensor) -> Tensor:
        """`[N, K]`."""
        logit_NK: Tensor = self.norm(state_ND) @ codebook_KD.T + self.bias
        for table, token_N in zip(self.after, before_NL.unbind(1), strict=True):
            logit_NK = logit_NK + table.index_select(0, token_N.clamp(min=0))
        return logit_NK
