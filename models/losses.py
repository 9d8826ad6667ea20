"""Sampled softmax with logQ correction (Bengio & Senécal 2008; Yi et al. 2019), its memory bounded by chunks."""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Candidates:
    """What competes with the targets of B examples; S slots of target vectors `[S, D]`.

    A sampled candidate's score is lowered by the log of how often it is expected to be drawn, so that the sum of
    exponentials estimates the full softmax's. Contacts are not sampled: each stands there once, uncorrected.
    """

    target: Tensor  # [B] slot
    negative: Tensor  # [B, K] slots
    negative_log_count: Tensor  # [B, K]; +inf where masked
    shared: Tensor  # [M] slots
    shared_log_count: Tensor  # [B, M]; +inf where masked
    contact: Tensor  # [B, C] slots, padded
    contact_bonus: Tensor  # [B, C]; -inf where padded
    target_bonus: Tensor  # [B] bonus of the target where it is a contact, else 0

    def take(self, rows: slice) -> Self:
        """The candidates of some of the examples; the shared ones are everybody's."""
        own = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "shared"}
        return replace(self, **own)


def sampled_softmax(
    query_BD: Tensor, targets_SD: Tensor, candidates: Candidates, dense_weight: float = 0.0, chunk: int = 256
) -> Tensor:
    """Cross-entropy of each example's target against its candidates, float32 `[B]`.

    With `dense_weight`, plus so much of the cross-entropy of the dot product alone against the sampled candidates:
    the copy term explains contacts away, and vectors trained behind it alone learn little about whom to meet next.
    Scores of `chunk` examples exist at a time; backward computes them again.
    """
    losses = [
        checkpoint(_losses, query_BD[rows], targets_SD, candidates.take(rows), dense_weight, use_reentrant=False)
        # A slice without examples is a chunk too: every rank's backward must reach every parameter.
        for rows in (slice(start, start + chunk) for start in range(0, max(len(query_BD), 1), chunk))
    ]
    return torch.cat(losses)


def _losses(query_BD: Tensor, targets_SD: Tensor, candidates: Candidates, dense_weight: float) -> Tensor:
    named = [candidates.target[:, None], candidates.contact, candidates.negative]
    scores = _scores(query_BD, targets_SD, torch.cat(named, dim=1))
    target_B1, contact_BC, negative_BK = scores.split([part.shape[1] for part in named], dim=1)
    shared_BM = query_BD @ targets_SD[candidates.shared].T
    sampled = [negative_BK - candidates.negative_log_count, shared_BM - candidates.shared_log_count]
    is_target_BC = candidates.contact == candidates.target[:, None]
    rivals_BC = (contact_BC + candidates.contact_bonus).masked_fill(is_target_BC, -torch.inf)
    loss_B = _cross_entropy(target_B1 + candidates.target_bonus[:, None], rivals_BC, *sampled)
    return loss_B + dense_weight * _cross_entropy(target_B1, *sampled) if dense_weight else loss_B


def _cross_entropy(target_B1: Tensor, *others: Tensor) -> Tensor:
    return torch.logsumexp(torch.cat([target_B1, *others], dim=1), dim=1) - target_B1.squeeze(1)


def _scores(query_BD: Tensor, targets_SD: Tensor, slots_BK: Tensor) -> Tensor:
    """Dot products of each query with its own candidates `[B, K]`."""
    gathered_BKD = targets_SD.index_select(0, slots_BK.flatten()).unflatten(0, slots_BK.shape)
    return torch.bmm(gathered_BKD, query_BD[:, :, None]).squeeze(2)
