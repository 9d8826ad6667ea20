"""The mixture of experts against a loop over examples and experts."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from friendrec.models.interaction import (
    MixtureOfExperts,
    balance_loss,
    gate_weights,
    utilisation,
    utilisation_scalars,
)  # fmt: skip

B, INPUTS, HIDDEN, OUTPUTS, EXPERTS = 7, 5, 6, 3, 4
TOP_K = pytest.mark.parametrize("top_k", [0, 1, 2, EXPERTS])


def mixture(top_k: int = 0) -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(INPUTS, HIDDEN, OUTPUTS, EXPERTS, top_k).double()


def inputs() -> Tensor:
    return torch.randn(B, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def chosen(logits: list[float], top_k: int) -> list[float]:
    """Gate weights of one example: the k largest logits' softmax, by sorting."""
    kept = sorted(range(len(logits)), key=lambda e: -logits[e])[: top_k or len(logits)]
    total = sum(math.exp(logits[e]) for e in kept)
    return [math.exp(logits[e]) / total if e in kept else 0.0 for e in range(len(logits))]


def expert(model: MixtureOfExperts, e: int, x: Tensor) -> Tensor:
    """One example through one expert."""
    for depth, layer in enumerate(model.layers):
        bias = layer.bias[e * layer.weight.shape[2] : (e + 1) * layer.weight.shape[2]]
        x = x @ layer.weight[e] + bias
        x = gelu(x) if depth < 2 else x
    return x


@TOP_K
def test_the_batched_product_is_the_loop_over_examples_and_experts(top_k: int) -> None:
    model, given = mixture(top_k), inputs()
    output, logits = model(given)
    assert logits.shape == (B, EXPERTS)
    for b in range(B):
        weights = chosen(logits[b].tolist(), top_k)
        expected = sum(weights[e] * expert(model, e, given[b]) for e in range(EXPERTS))
        torch.testing.assert_close(output[b], expected)


@TOP_K
def test_the_gate_is_the_softmax_of_the_largest_logits(top_k: int) -> None:
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.tensor([chosen(row.tolist(), top_k) for row in logits], dtype=torch.float64)
    torch.testing.assert_close(gate_weights(logits, top_k), expected)


def test_of_equal_logits_only_k_are_kept() -> None:
    assert (gate_weights(torch.zeros(3, EXPERTS), 2) > 0).sum(1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_that_no_example_is_routed_to_learns_nothing_and_its_gate_only_by_the_balance(top_k: int) -> None:
    model = mixture(top_k)
    with torch.no_grad():
        model.gate.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]) if top_k == 2 else torch.tensor([9.0, 0.0, 0.0, 0.0]))
    output, logits = model(inputs())
    output.square().sum().backward(retain_graph=True)
    weight = model.layers[0].weight
    assert weight.grad is not None and model.gate.weight.grad is not None
    assert (weight.grad.abs().sum((1, 2)) > 0).tolist() == [True, top_k == 2, False, False]
    assert not model.gate.weight.grad[2:].any()
    balance_loss(logits, top_k, torch.ones(B, dtype=logits.dtype), 1 / B).backward()
    assert model.gate.weight.grad[2:].any()


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_is_its_definition(top_k: int) -> None:
    logits = torch.randn(B, EXPERTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight = torch.arange(1.0, B + 1, dtype=torch.float64)
    total = weight.sum().item()
    expected = 0.0
    for e in range(EXPERTS):
        routed = sum(weight[b].item() * (chosen(logits[b].tolist(), top_k)[e] > 0) for b in range(B))
        probability = sum(weight[b].item() * chosen(logits[b].tolist(), 0)[e] for b in range(B)) / total
        expected += EXPERTS * routed / (top_k * total) * probability
    assert balance_loss(logits, top_k, weight, 1 / total).item() == pytest.approx(expected)


def test_the_balance_loss_is_least_where_all_experts_are_used_alike() -> None:
    one = torch.ones(EXPERTS)
    alike = 20 * torch.eye(EXPERTS)
    collapsed = alike[[0, 0, 0, 0]]
    assert balance_loss(alike, 1, one, 1 / EXPERTS).item() == pytest.approx(1.0)
    assert balance_loss(collapsed, 1, one, 1 / EXPERTS).item() == pytest.approx(EXPERTS, rel=1e-4)


def test_training_on_the_balance_loss_alone_spreads_the_examples() -> None:
    torch.manual_seed(0)
    given, gate = torch.randn(200, INPUTS), torch.nn.Linear(INPUTS, EXPERTS)
    with torch.no_grad():
        gate.bias.copy_(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    before = utilisation_scalars(utilisation(gate(given), 1))["entropy"]
    optimizer = torch.optim.Adam(gate.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        balance_loss(gate(given), 1, torch.ones(200), 1 / 200).backward()
        optimizer.step()
    assert before < 0.5 < 0.95 < utilisation_scalars(utilisation(gate(given), 1))["entropy"]


@TOP_K
def test_utilisation_is_the_mean_gate_weight(top_k: int) -> None:
    logits = torch.randn(B, EXPERTS, generator=torch.Generator().manual_seed(5))
    rows = [chosen(row.tolist(), top_k) for row in logits]
    shares = [sum(row[e] for row in rows) / B for e in range(EXPERTS)]
    scalars = utilisation_scalars(utilisation(logits, top_k))
    assert [scalars[f"share_{e}"] for e in range(EXPERTS)] == pytest.approx(shares)
    assert scalars["entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares if s) / math.log(EXPERTS))


def test_utilisation_at_its_bounds() -> None:
    assert utilisation_scalars(utilisation(torch.zeros(B, EXPERTS), 0))["entropy"] == pytest.approx(1.0)
    assert utilisation_scalars(utilisation(99 * torch.eye(EXPERTS)[[0, 0]], 0))["entropy"] == pytest.approx(0.0)
    assert utilisation_scalars(utilisation(torch.zeros(0, EXPERTS), 0))["share_0"] == 0
    assert utilisation_scalars(utilisation(torch.zeros(B, 1), 0)) == {"share_0": 1.0, "entropy": 0.0}
