"""The transformer in one pass over packed sequences against each query's window alone, event by event."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from friendrec.datasets.batch import Context
from friendrec.datasets.config import ContextConfig
from friendrec.datasets.packing import Packer
from friendrec.models.features import Slots
from friendrec.models.transformer import Layer, ReadOut, TransformerHistory
from tests.datasets.decode import pack, queries
from tests.datasets.twin import prepared
from tests.models.test_history import DIM, context_of, gradients_of, in_double, slots_of

SHAPES = [(2, 1), (4, 1), (3, 2), (7, 2), (7, 6), (50, 1)]
"""Context length and number of layers."""


def module(length: int, layers: int, heads: int = 2) -> TransformerHistory:
    """Nothing starts at zero, so that every bias matters."""
    torch.manual_seed(2)
    made = TransformerHistory(DIM, heads, length, layers).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def naive(transformer: TransformerHistory, context: Context, slots: Slots) -> Tensor:
    """Window by window: nothing before it or after it exists."""
    event_at = {position: event for event, position in enumerate(context.event_position.tolist())}
    histories = []
    for begin, end in zip(context.window_begin.tolist(), context.window_end.tolist(), strict=True):
        if begin == end:
            histories.append(transformer.empty)
            continue
        events = [event_at[position] for position in range(begin, end)]
        times = context.event_time[events].tolist()
        x_LD = slots.user[context.event_user[events]] + slots.event[context.event_kind[events]]
        x_LD = transformer.events.norm(x_LD + transformer.events.gap(context.event_gap[events, None]))
        for layer in transformer.layers:
            assert isinstance(layer, Layer)
            x_LD = naive_layer(layer, x_LD, times)
        histories.append(naive_read_out(transformer.read_out, x_LD, times))
    return torch.stack(histories)


def naive_read_out(read_out: ReadOut, x_LD: Tensor, times: list[int]) -> Tensor:
    """Each head's softmax over the R latest states, their logits w · x plus what place and time say."""
    width = DIM // read_out.num_heads
    seen = range(max(0, len(times) - read_out.reach), len(times))
    heads = []
    for h in range(read_out.num_heads):
        logits, values = [], []
        for j in seen:
            state = read_out.norm(x_LD[j])
            lag = 0.1 * math.log1p((times[-1] - times[j]) * 1e-6)
            bias = read_out.position_bias[len(times) - 1 - j, h] - read_out.time_rate[h] * lag
            logits.append(read_out.logit(state)[h] + bias)
            values.append(read_out.value(state)[h * width : (h + 1) * width])
        weights = torch.softmax(torch.stack(logits), 0)
        heads.append(sum(w * value for w, value in zip(weights, values, strict=True)))
    read: Tensor = read_out.output(torch.cat(heads))
    return read


def naive_layer(layer: Layer, x_LD: Tensor, times: list[int]) -> Tensor:
    """Event i attends to j in (i − R, i], its logits q · k / √V plus what place and time say."""
    query, key, value = layer.query_key_value(layer.attention_norm(x_LD)).split(DIM, dim=1)
    width = DIM // layer.num_heads
    rows = []
    for i in range(len(x_LD)):
        seen = range(max(0, i - layer.reach + 1), i + 1)
        heads = []
        for h in range(layer.num_heads):
            part = slice(h * width, (h + 1) * width)
            logits = []
            for j in seen:
                lag = 0.1 * math.log1p((times[i] - times[j]) * 1e-6)
                bias = layer.position_bias[i - j, h] - layer.time_rate[h] * lag
                logits.append(query[i, part] @ key[j, part] / math.sqrt(width) + bias)
            weights = torch.softmax(torch.stack(logits), 0)
            heads.append(sum(w * value[j, part] for w, j in zip(weights, seen, strict=True)))
        rows.append(torch.cat(heads))
    x_LD = x_LD + layer.output(torch.stack(rows))
    result: Tensor = x_LD + layer.mlp(layer.mlp_norm(x_LD))
    return result


@pytest.mark.parametrize(("length", "layers"), SHAPES)
@pytest.mark.parametrize("heads", [1, 4])
def test_one_pass_is_the_loop_over_windows(length: int, layers: int, heads: int) -> None:
    context = in_double(context_of(length))
    transformer, slots = module(length, layers, heads), slots_of(context)
    assert (context.window_end == context.window_begin).any()
    assert len(set(context.event_sequence.tolist())) > 7
    torch.testing.assert_close(transformer(context, slots), naive(transformer, context, slots), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("length", "layers"), [(2, 1), (6, 2)])
def test_gradients_are_those_of_the_loop(length: int, layers: int) -> None:
    context = in_double(context_of(length, events=30))
    ways = TransformerHistory.__call__, naive
    gradients = [gradients_of(forward, module(length, layers), context) for forward in ways]
    for name, gradient in gradients[0].items():
        expected = gradients[1][name]
        assert gradient is not None and expected is not None
        torch.testing.assert_close(gradient, expected, msg=name)


@pytest.mark.parametrize(("length", "layers"), [(2, 1), (4, 1), (6, 2)])
def test_an_event_outside_of_the_window_has_no_gradient(length: int, layers: int) -> None:
    """Exactly zero for what stands before the window or is not before t; not for what the stack of layers reaches."""
    context = in_double(context_of(length, events=60))
    context.event_user = torch.arange(len(context.event_user))  # a vector for each event, to tell them apart
    draw = torch.Generator().manual_seed(0)
    user = torch.randn(len(context.event_user), DIM, generator=draw, dtype=torch.float64)
    transformer, others = module(length, layers), slots_of(context)
    reached = (layers + 1) * (length // (layers + 1) - 1) + 1
    assert reached <= length
    for q in range(0, len(context.actor), 3):
        vectors = user.clone().requires_grad_()
        transformer(context, Slots(vectors, others.event, others.condition))[q].sum().backward()
        begin = max(int(context.window_begin[q]), int(context.window_end[q]) - reached)
        inside = (context.event_position >= begin) & (context.event_position < context.window_end[q])
        assert vectors.grad is not None
        assert torch.equal(vectors.grad.abs().sum(1) > 0, inside)


def test_no_events_or_no_queries_give_finite_gradients() -> None:
    for users in (np.array([0, 1]), np.empty(0, np.int64)):
        with prepared([(0, 1, "a", 5)]) as (data, _):
            asked = queries(users, np.zeros(len(users), np.int64))
            context = in_double(pack(Packer(data, ContextConfig(context_length=3)), asked))
        transformer = module(3, 1)
        history = transformer(context, slots_of(context))
        assert torch.equal(history, transformer.empty.expand(len(users), DIM))
        history.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())


@pytest.mark.parametrize("wrong", [(8, 3, 4, 1), (8, 2, 4, 4), (8, 2, 4, 0)])
def test_shapes_that_cannot_be_are_refused(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="heads"):
        TransformerHistory(*wrong)
