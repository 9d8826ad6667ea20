"""Interaction networks: from latent cross features to a query vector."""

import torch
from torch import Tensor, nn

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
