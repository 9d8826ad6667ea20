"""Sampled softmax against three naive lines, and against the full softmax that it stands for."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from friendrec.models.losses import Candidates, sampled_softmax

B, S, D, K, M, C = 7, 12, 5, 4, 3, 3
INF = math.inf


def draw(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Candidates]:
    """Random candidates: example 0's target is among its contacts, example 1 has no contact, some are masked."""
    torch.manual_seed(seed)
    query, targets = torch.randn(B, D, dtype=dtype), torch.randn(S, D, dtype=dtype)
    contact = torch.stack([torch.randperm(S)[:C] for _ in range(B)])
    target = torch.tensor([next(v for v in torch.randperm(S).tolist() if v not in row) for row in contact.tolist()])
    bonus = torch.randn(B, C, dtype=dtype)
    target[0] = contact[0, 1]
    bonus[1] = -INF
    bonus[2, 2] = -INF
    target_bonus = torch.zeros(B, dtype=dtype)
    target_bonus[0] = bonus[0, 1]
    negative_log, shared_log = torch.randn(B, K, dtype=dtype), torch.randn(B, M, dtype=dtype)
    negative_log[3:5, 0] = INF
    shared_log[5] = INF
    negative, shared = torch.randint(S, (B, K)), torch.randint(S, (M,))
    return query, targets, Candidates(target, negative, negative_log, shared, shared_log, contact, bonus, target_bonus)


def naive(query: Tensor, targets: Tensor, c: Candidates, dense_weight: float = 0.0) -> Tensor:
    losses = []
    for b in range(len(query)):
        score = targets @ query[b]
        positive = score[c.target[b]] + c.target_bonus[b]
        contacts = [score[v] + w for v, w in zip(c.contact[b], c.contact_bonus[b], strict=True) if v != c.target[b]]
        drawn = [score[v] - w for v, w in zip(c.negative[b], c.negative_log_count[b], strict=True)]
        drawn += [score[v] - w for v, w in zip(c.shared, c.shared_log_count[b], strict=True)]
        loss = -torch.log(torch.exp(positive) / sum(torch.exp(s) for s in [positive, *contacts, *drawn]))
        dense = score[c.target[b]]
        losses.append(loss - dense_weight * torch.log(torch.exp(dense) / sum(torch.exp(s) for s in [dense, *drawn])))
    return torch.stack(losses)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_it_is_the_naive_softmax(weight: float) -> None:
    given = draw()
    torch.testing.assert_close(sampled_softmax(*given, weight), naive(*given, weight))


@pytest.mark.parametrize("chunk", [1, 3, 7, 256])
def test_chunks_change_neither_values_nor_gradients(chunk: int) -> None:
    results = []
    for loss in (partial(naive, dense_weight=0.3), partial(sampled_softmax, dense_weight=0.3, chunk=chunk)):
        query, targets, candidates = draw()
        leaves = [query, targets, candidates.contact_bonus, candidates.target_bonus]
        losses = loss(query.requires_grad_(), targets.requires_grad_(), leaves_of(candidates, leaves[2:]))
        (losses * torch.arange(1, B + 1)).sum().backward()
        results.append([losses.detach(), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(ours, expected)


def leaves_of(candidates: Candidates, bonuses: list[Tensor]) -> Candidates:
    contact_bonus, target_bonus = (bonus.requires_grad_() for bonus in bonuses)
    return dataclasses.replace(candidates, contact_bonus=contact_bonus, target_bonus=target_bonus)


def test_masked_candidates_have_no_influence() -> None:
    query, targets, candidates = draw()
    loss = sampled_softmax(query, targets, candidates, 0.3)
    negative, contact = candidates.negative.clone(), candidates.contact.clone()
    negative[3:5, 0] = candidates.target[3:5]
    contact[1], contact[2, 2] = (contact[1] + 1) % S, 0
    other = dataclasses.replace(candidates, negative=negative, contact=contact)
    torch.testing.assert_close(sampled_softmax(query, targets, other, 0.3), loss)
    only = torch.full((1,), S)  # a slot that one masked candidate alone reads
    negative = candidates.negative.clone()
    negative[3, 0] = only
    more = torch.cat([targets, torch.full((1, D), 1e3, dtype=targets.dtype)]).requires_grad_()
    sampled_softmax(query, more, dataclasses.replace(candidates, negative=negative), 0.3).sum().backward()
    assert more.grad is not None
    assert not more.grad[S].any()


def everyone(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, targets, contacts `[B, C]`, bonus, label: a toy small enough for the full softmax."""
    query, targets, candidates = draw(seed)
    bonus = torch.randn(B, C, dtype=query.dtype)
    return query, targets, candidates.contact, bonus, candidates.target


def full_logits(query: Tensor, targets: Tensor, contact: Tensor, bonus: Tensor) -> Tensor:
    return (query @ targets.T).scatter_add(1, contact, bonus)


def candidates_of(
    label: Tensor, contact: Tensor, bonus: Tensor, negative: Tensor, count: Tensor, shared: Tensor, shared_count: Tensor
) -> Candidates:
    """Masks what stands in the denominator already, as the reader does."""
    named = torch.cat([label[:, None], contact], dim=1)
    hit = (negative[:, :, None] == named[:, None]).any(2)
    shared_hit = (shared[None, :, None] == named[:, None]).any(2)
    target_bonus = torch.where(contact == label[:, None], bonus, 0.0).sum(1)
    logs = count.log().masked_fill(hit, INF), shared_count.log().expand(B, -1).masked_fill(shared_hit, INF)
    return Candidates(label, negative, logs[0], shared, logs[1], contact, bonus, target_bonus)


@pytest.mark.parametrize("source", ["own", "shared"])
def test_everyone_sampled_once_is_the_full_softmax(source: str) -> None:
    """Contacts stand once and uncorrected; the target among them isn't counted twice and has its bonus."""
    query, targets, contact, bonus, label = everyone()
    all_of_them, nobody = torch.arange(S), torch.arange(0)
    own = all_of_them if source == "own" else nobody
    shared = nobody if source == "own" else all_of_them
    one = [torch.ones(B, len(own), dtype=query.dtype), torch.ones(len(shared), dtype=query.dtype)]
    candidates = candidates_of(label, contact, bonus, own.expand(B, -1), one[0], shared, one[1])
    assert (contact[0] == label[0]).any()
    expected = cross_entropy(full_logits(query, targets, contact, bonus), label, reduction="none")
    torch.testing.assert_close(sampled_softmax(query, targets, candidates), expected)


def test_the_estimate_of_the_normaliser_is_unbiased() -> None:
    """E[Ẑ] = Z with negatives of two sources, drawn by unequal chances and corrected by their summed expectation."""
    query, targets, contact, bonus, label = everyone()
    logits = full_logits(query, targets, contact, bonus)
    rng, draws = np.random.default_rng(0), 1500
    chances = rng.dirichlet(np.full(S, 2.0))
    expected = torch.from_numpy(K / S + M * chances)
    estimates = []
    for _ in range(draws):
        negative = torch.from_numpy(rng.integers(S, size=(B, K)))
        shared = torch.from_numpy(rng.choice(S, M, p=chances))
        candidates = candidates_of(label, contact, bonus, negative, expected[negative], shared, expected[shared])
        loss = sampled_softmax(query, targets, candidates)
        estimates.append(torch.exp(loss + logits.gather(1, label[:, None]).squeeze(1)))  # Ẑ = exp(loss + positive)
    sample = torch.stack(estimates)
    error = (sample.mean(0) - logits.exp().sum(1)) / (sample.std(0) / math.sqrt(draws))
    assert error.abs().max() < 4.5  # standard errors, 7 of them


def test_without_examples_there_is_no_loss_but_a_path_back_to_every_input() -> None:
    query, targets, candidates = draw()
    empty = {name: getattr(candidates, name)[:0] for name in candidates.__dataclass_fields__ if name != "shared"}
    bonus = empty.pop("contact_bonus").requires_grad_()
    given = query[:0].requires_grad_(), targets.requires_grad_()
    losses = sampled_softmax(*given, Candidates(shared=candidates.shared, contact_bonus=bonus, **empty))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in (*given, bonus))
