"""Sampled softmax with logQ correction (Bengio & Senécal 2008; Yi et al. 2019), its memory bounded by chunks."""

from dataclasses import dataclass

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


def sampled_softmax(query_BD: Tensor, targets_SD: Tensor, candidates: Candidates, chunk: int = 256) -> Tensor:
    """Cross-entropy of each example's target against its candidates, float32 `[B]`.

    Scores of `chunk` examples exist at a time; backward computes them again.
    """
    fields = [getattr(candidates, name) for name in candidates.__dataclass_fields__]
    losses = [
        checkpoint(_losses, query_BD[rows], targets_SD, candidates.shared, *_slice(fields, rows), use_reentrant=False)
        for rows in (slice(start, start + chunk) for start in range(0, len(query_BD), chunk))
    ]
    return torch.cat(losses) if losses else query_BD.sum(1)


def _slice(fields: list[Tensor], rows: slice) -> list[Tensor]:
    target, negative, negative_log, _, shared_log, contact, contact_bonus, target_bonus = fields
    return [f[rows] for f in (target, negative, negative_log, shared_log, contact, contact_bonus, target_bonus)]


def _losses(  # noqa: PLR0913
    query: Tensor,
    targets: Tensor,
    shared: Tensor,
    target: Tensor,
    negative: Tensor,
    negative_log_count: Tensor,
    shared_log_count: Tensor,
    contact: Tensor,
    contact_bonus: Tensor,
    target_bonus: Tensor,
) -> Tensor:
    own = _scores(query, targets, torch.cat([target[:, None], contact, negative], dim=1))
    positive, contacts, negatives = own.split([1, contact.shape[1], negative.shape[1]], dim=1)
    positive = positive + target_bonus[:, None]
    contacts = (contacts + contact_bonus).masked_fill(contact == target[:, None], -torch.inf)
    in_batch = query @ targets[shared].T - shared_log_count
    logits = torch.cat([positive, contacts, negatives - negative_log_count, in_batch], dim=1)
    return torch.logsumexp(logits, dim=1) - positive.squeeze(1)


def _scores(query_BD: Tensor, targets_SD: Tensor, slots_BK: Tensor) -> Tensor:
    """Dot products of each query with its own candidates `[B, K]`."""
    gathered_BKD = targets_SD.index_select(0, slots_BK.flatten()).unflatten(0, slots_BK.shape)
    return torch.bmm(gathered_BKD, query_BD[:, :, None]).squeeze(2)
