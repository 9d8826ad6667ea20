"""Interaction networks: from latent cross features to a query vector.

B queries, I inputs, O outputs, X experts.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import gelu

from friendrec.datasets.batch import Batch
from friendrec.models.config import EncoderConfig

CLOCK = 2  # time since the last event and number of events (`Context.clock`)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear–GELU–Linear–GELU–Linear."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, outputs)
    )


def latent_cross(actor_BD: Tensor, history_BD: Tensor, condition_BD: Tensor, clock: Tensor) -> Tensor:
    """[actor, history, action, actor∘history, actor∘action, clock] (Beutel et al. 2018), `[B, 5 · D + CLOCK]`."""
    crossed = [actor_BD * history_BD, actor_BD * condition_BD]
    return torch.cat([actor_BD, history_BD, condition_BD, *crossed, clock], dim=1)


class MixtureOfExperts(nn.Module):
    """Several MLPs of one shape, mixed by a gate: y = Σ_e g_e(x) · mlp_e(x) (Jacobs et al. 1991).

    The dense gate is a softmax over all experts; with `top_k`, over the k largest logits alone (Shazeer et al. 2017).
    Every expert sees every example, as one batched product a layer: at these widths routing costs more than it saves.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, num_experts: int, top_k: int = 0) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(inputs, num_experts)
        self.layers = nn.ModuleList(
            ExpertLinear(num_experts, *shape) for shape in ((inputs, hidden), (hidden, hidden), (hidden, outputs))
        )

    def forward(self, input_BI: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed outputs `[B, O]` and the gate's logits `[B, X]`."""
        logit_BX = self.gate(input_BI)
        hidden_XBI = input_BI.expand(self.gate.out_features, -1, -1)
        for layer in self.layers[:-1]:
            hidden_XBI = gelu(layer(hidden_XBI))
        output_XBO = self.layers[-1](hidden_XBI)
        return torch.einsum("bx,xbo->bo", gate_weights(logit_BX, self.top_k), output_XBO), logit_BX


class ExpertLinear(nn.Module):
    """One linear map an expert, with the initial values of `nn.Linear`: `[X, B, I]` to `[X, B, O]`."""

    def __init__(self, num_experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(num_experts, inputs, outputs).uniform_(-bound, bound))
        # Flat, because weight decay spares vectors only.
        self.bias = nn.Parameter(torch.empty(num_experts * outputs).uniform_(-bound, bound))

    def forward(self, input_XBI: Tensor) -> Tensor:
        bias_X1O = self.bias.view(len(self.weight), 1, -1)
        return torch.baddbmm(bias_X1O, input_XBI, self.weight)


def gate_weights(logit_BX: Tensor, top_k: int) -> Tensor:
    """Share of each expert in each example's output, rows summing to 1; with `top_k`, 0 for all but the k largest."""
    if not top_k:
        return logit_BX.softmax(1)
    largest = logit_BX.topk(top_k, dim=1)
    weight_BK = largest.values.softmax(1)  # of another dtype than the logits under autocast
    return torch.zeros_like(logit_BX, dtype=weight_BK.dtype).scatter(1, largest.indices, weight_BK)


def balance_loss(logit_BX: Tensor, top_k: int, weight: Tensor, scale: float) -> Tensor:
    """Load-balancing loss of a top-k gate (Fedus et al. 2022, eq. 4): X · Σ_e f_e · p_e, least (1) when balanced.

    f_e is the share of routes that lead to expert e, p_e the mean of its softmax before the cut, both weighted by the
    examples' `weight` `[B]`. f has no gradient and is summed over ranks, so that with the batch's `scale` the mean of
    the result over ranks is the loss of the global batch; in training all ranks call this together.
    """
    routes_X = (weight[:, None] * (gate_weights(logit_BX.detach(), top_k) > 0)).sum(0)
    if dist.is_initialized():
        dist.all_reduce(routes_X)
    share_X = routes_X / routes_X.sum().clamp(min=1e-9)
    probability_X = scale * (weight[:, None] * logit_BX.softmax(1)).sum(0)
    return logit_BX.shape[1] * (share_X * probability_X).sum()


def weighted_balance_loss(logit_BX: Tensor, config: EncoderConfig, batch: Batch) -> Tensor:
    """The load-balancing loss of a slice at its weight, scaled as the model's loss is; 0 for a dense gate."""
    if not config.gate_top_k:
        return logit_BX.new_zeros(())
    return config.balance_loss * balance_loss(logit_BX, config.gate_top_k, batch.weight, batch.scale)


def utilisation(logit_BX: Tensor, top_k: int) -> Tensor:
    """Each expert's share of the examples' gate weight `[X]`, without a gradient; zeros where there are no examples."""
    return gate_weights(logit_BX.detach(), top_k).sum(0) / max(len(logit_BX), 1)


def utilisation_scalars(share_X: Tensor) -> dict[str, float]:
    """The shares by name, and their entropy: 1 where all experts are used alike, 0 where one is used for all."""
    entropy = float(torch.special.entr(share_X).sum() / math.log(max(len(share_X), 2)))
    return {f"share_{expert}": share for expert, share in enumerate(share_X.tolist())} | {"entropy": entropy}
