"""The two towers and the copy term: the three parts of a score.

    s(u, v) = q(u) · k(v) + b(v) + 1[v is a contact of u] · m(pair)

One dot product serves q · k + b: the query ends with a 1 and the target with b.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from friendrec.models.config import EncoderConfig
from friendrec.models.interaction import CLOCK, MixtureOfExperts, latent_cross, mlp


class QueryTower(nn.Module):
    """Actor, history and condition to a query vector `[B, D + 1]`, its last component 1."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.interaction = _interaction(config)
        self.skip = nn.Linear(2 * config.dim, config.dim, bias=False)

    def forward(
        self, actor_BD: Tensor, history_BD: Tensor, condition_BD: Tensor, clock: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The query vectors and, of a mixture of experts, the gate's logits `[B, experts]`."""
        query_BD = self.skip(torch.cat([actor_BD, history_BD], dim=1))
        gate_BX = None
        if self.interaction is not None:
            crossed = self.interaction(latent_cross(actor_BD, history_BD, condition_BD, clock))
            mixed_BD, gate_BX = crossed if isinstance(crossed, tuple) else (crossed, None)
            query_BD = mixed_BD + query_BD
        return pad(query_BD, (0, 1), value=1.0), gate_BX


def _interaction(config: EncoderConfig) -> nn.Module | None:
    shape = 5 * config.dim + CLOCK, config.hidden, config.dim
    if config.interaction == "moe":
        return MixtureOfExperts(*shape, config.num_experts, config.gate_top_k)
    return mlp(*shape) if config.interaction == "mlp" else None


class TargetTower(nn.Module):
    """User vectors `[S, D]` to target vectors `[S, D + 1]`, their last component the candidate's bias."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        shape = config.dim, config.dim + 1
        self.residual = nn.Linear(*shape) if config.interaction == "none" else mlp(shape[0], config.hidden, shape[1])

    @property
    def shift(self) -> nn.Parameter:
        """The bias that moves all targets alike `[D + 1]`."""
        last = self.residual[-1] if isinstance(self.residual, nn.Sequential) else self.residual
        assert isinstance(last, nn.Linear) and last.bias is not None
        return last.bias

    def forward(self, user_SD: Tensor) -> Tensor:
        target: Tensor = pad(user_SD, (0, 1)) + self.residual(user_SD)
        return target


class CopyTerm(nn.Module):
    """A learned bonus for each contact that the query names, from what is known of the pair; 0 before training.

    Without it an id model cannot say *again, this one*: repeats and replies are the pair's, not the user's.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, num_features: int, hidden: int) -> None:
        super().__init__()
        self.bonus = mlp(num_features + CLOCK, hidden, 1)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("deviation", torch.ones(num_features))
        for parameter in self.bonus[-1].parameters():
            nn.init.zeros_(parameter)

    def standardise(self, features_TF: Tensor) -> None:
        """Take mean and deviation of the first features from a sample; once, before training."""
        if len(features_TF) > 1:
            num = features_TF.shape[1]
            self.mean[:num] = features_TF.mean(0)
            self.deviation[:num] = features_TF.std(0).clamp(min=1e-3)

    def forward(self, features_TF: Tensor, clock_T: Tensor) -> Tensor:
        """Bonus of T named contacts `[T]`; `clock_T` is the clock of the query that names each."""
        standard = ((features_TF - self.mean) / self.deviation).clamp(-6, 6)
        bonus: Tensor = self.bonus(torch.cat([standard, clock_T], dim=1))
        return bonus.squeeze(1)
