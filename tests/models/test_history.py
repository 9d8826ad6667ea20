"""Pooled attention in one pass against a loop over windows that evaluates the formula of its docstring naively."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from friendrec.datasets.batch import Context
from friendrec.datasets.config import ContextConfig
from friendrec.datasets.packing import Packer
from friendrec.models.features import Slots
from friendrec.models.history import CONTENT, FORGETTING, PooledAttention
from tests.datasets.decode import pack, queries
from tests.datasets.twin import prepared, random_log

DIM = 8
UNITS = {"microseconds": 1, "minutes": 60_000_000, "months": 30 * 86_400_000_000}


def context_of(length: int, unit: int = 60_000_000, seed: int = 0, events: int = 60) -> Context:
    """Sixty queries of 7 users, some without history, in packed sequences; gaps are multiples of `unit` (µs)."""
    with prepared(random_log(seed, 7, events, 40), unit=unit) as (data, _):
        users = np.repeat(np.arange(data.num_users), 9)
        times = np.tile(np.linspace(0, 41, 9).astype(int), data.num_users) * unit
        asked = queries(users, times, groups=users * 2 + (times > 20 * unit))
        return pack(Packer(data, ContextConfig(context_length=length)), asked)


def slots_of(context: Context, dtype: torch.dtype = torch.float64) -> Slots:
    draw = torch.Generator().manual_seed(1)
    count = context.ids.stride()
    user, event, condition = (torch.randn(count, DIM, generator=draw, dtype=dtype) for _ in range(3))
    return Slots(user.requires_grad_(), event.requires_grad_(), condition)


def module(length: int, heads: int = 2, dtype: torch.dtype = torch.float64) -> PooledAttention:
    """Logits that reach their bound, both signs of everything."""
    torch.manual_seed(2)
    made = PooledAttention(DIM, heads, length).to(dtype)
    with torch.no_grad():
        made.logit.weight.mul_(6)
        made.empty.normal_()
    return made


def in_double(context: Context) -> Context:
    return dataclasses.replace(context, event_gap=context.event_gap.double())


def naive(attention: PooledAttention, context: Context, slots: Slots) -> Tensor:
    """Event by event, window by window."""
    event_at = {position: event for event, position in enumerate(context.event_position.tolist())}
    rate_H = torch.sigmoid(attention.forget) * FORGETTING / attention.length
    histories = []
    for begin, end in zip(context.window_begin.tolist(), context.window_end.tolist(), strict=True):
        heads: list[list[Tensor]] = [[] for _ in range(attention.num_heads)]
        values, contents, forgets = [], [], []
        for event in (event_at[position] for position in range(begin, end)):
            gap = context.event_gap[event]
            x_D = slots.user[context.event_user[event]] + slots.event[context.event_kind[event]]
            x_D = attention.events.norm(x_D + attention.events.gap(gap[None]))
            contents.append(CONTENT * torch.tanh(attention.logit(x_D) / CONTENT))
            forgets.append(rate_H * min(gap.item(), 1.0))
            values.append(attention.value(x_D).view(attention.num_heads, -1))
        for h, weights in enumerate(heads):
            for j, content in enumerate(contents):
                weights.append(torch.exp(content[h] - sum(forget[h] for forget in forgets[j + 1 :])))
            heads[h] = [w / sum(weights) * v[h] for w, v in zip(weights, values, strict=True)]
        pooled = [torch.stack(parts).sum(0) for parts in heads if parts]
        histories.append(attention.output(torch.cat(pooled)) if pooled else attention.empty)
    return torch.stack(histories)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("heads", [1, 4])
def test_one_pass_is_the_loop_over_windows(length: int, heads: int) -> None:
    context = in_double(context_of(length))
    attention, slots = module(length, heads), slots_of(context)
    crossing = context.window_begin // length < (context.window_end - 1) // length
    assert crossing.any() or length in (1, 50)
    assert (context.window_end == context.window_begin).any()
    torch.testing.assert_close(attention(context, slots), naive(attention, context, slots), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("forget", [-30.0, 0.0, 30.0])
def test_single_precision_holds_for_small_and_large_gaps(unit: int, forget: float) -> None:
    """From forgetting nothing to forgetting everything at once."""
    context = context_of(5, unit=unit)
    attention = module(5)
    with torch.no_grad():
        attention.forget.fill_(forget)
    slots = slots_of(context)
    expected = naive(attention, in_double(context), slots)
    single = Slots(*(vectors.float() for vectors in (slots.user, slots.event, slots.condition)))
    torch.testing.assert_close(attention.float()(context, single).double(), expected, rtol=1e-4, atol=2e-5)


def gradients_of(forward: Callable[..., Tensor], module: nn.Module, context: Context) -> dict[str, Tensor | None]:
    """Of all parameters and slots, for one direction of the histories that `forward` makes with the module."""
    slots = slots_of(context)
    history = forward(module, context, slots)
    direction = torch.randn(history.shape, generator=torch.Generator().manual_seed(3), dtype=history.dtype)
    (history * direction).sum().backward()
    parameters = {name: parameter.grad for name, parameter in module.named_parameters()}
    return parameters | {"user": slots.user.grad, "event": slots.event.grad}


@pytest.mark.parametrize("length", [1, 4, 50])
def test_gradients_are_those_of_the_loop(length: int) -> None:
    context = in_double(context_of(length, events=30))
    gradients = [gradients_of(forward, module(length), context) for forward in (PooledAttention.__call__, naive)]
    for name, gradient in gradients[0].items():
        expected = gradients[1][name]
        assert gradient is not None
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if expected is None else expected, msg=name)
        assert gradient.abs().sum() > 0 or (name == "forget" and length == 1)


@pytest.mark.parametrize("length", [2, 4])
def test_an_event_outside_of_the_window_has_no_gradient(length: int) -> None:
    """Exactly zero, whatever else shares its block; every event inside has one."""
    context = in_double(context_of(length, events=30))
    context.event_user = torch.arange(len(context.event_user))  # a vector for each event, to tell them apart
    draw = torch.Generator().manual_seed(0)
    user = torch.randn(len(context.event_user), DIM, generator=draw, dtype=torch.float64)
    attention, others = module(length), slots_of(context)
    for q in range(0, len(context.actor), 4):
        vectors = user.clone().requires_grad_()
        attention(context, Slots(vectors, others.event, others.condition))[q].sum().backward()
        inside = (context.event_position >= context.window_begin[q]) & (context.event_position < context.window_end[q])
        assert vectors.grad is not None
        assert torch.equal(vectors.grad.abs().sum(1) > 0, inside)


def test_no_events_at_all_give_the_learned_vector() -> None:
    with prepared([(0, 1, "a", 5)]) as (data, _):
        context = pack(Packer(data, ContextConfig(context_length=3)), queries(np.array([0, 1]), np.zeros(2, np.int64)))
    attention = module(3)
    history = attention(in_double(context), slots_of(context))
    assert torch.equal(history, attention.empty.expand(2, DIM))
    history.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in attention.parameters() if p.grad is not None)


def test_no_queries_give_no_history() -> None:
    nobody = np.empty(0, np.int64)
    with prepared([(0, 1, "a", 5)]) as (data, _):
        context = pack(Packer(data, ContextConfig(context_length=3)), queries(nobody, nobody))
    assert module(3)(in_double(context), slots_of(context)).shape == (0, DIM)


def test_heads_must_divide_the_dimension() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        PooledAttention(8, 3, 4)
