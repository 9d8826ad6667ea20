"""The model of codes: what its loss and its scores are made of, and that batching and decoding change neither."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

from friendrec.datasets.batch import Batch
from friendrec.datasets.config import ContextConfig, ReaderConfig
from friendrec.datasets.packing import Codes, Packer
from friendrec.datasets.prepared import PreparedData
from friendrec.datasets.reader import Reader
from friendrec.errors import FriendrecError
from friendrec.models import stu
from friendrec.models.config import StuConfig
from friendrec.models.stu import Stu, Writer
from friendrec.models.stu_decoder import Places
from tests.datasets.decode import pack, queries
from tests.datasets.twin import HOUR, prepared, random_log

CONTEXT = ContextConfig(context_length=4, contacts=3)
SIZES = (3, 4, 2)
TOWERS = StuConfig(dim=8, num_heads=2, hidden=16, decoder="towers", decoder_hidden=12, memory=3)
TRANSFORMER = dataclasses.replace(TOWERS, decoder="transformer", decoder_layers=2, history_encoder="transformer")
ROUTED = dataclasses.replace(TOWERS, interaction="moe", gate_top_k=1, num_experts=3, balance_loss=0.5)
SHAPES = pytest.mark.parametrize("shape", [TOWERS, TRANSFORMER, ROUTED], ids=["towers", "transformer", "top-1"])


def collection(packer: Packer, dim: int = TOWERS.dim) -> EmbeddingBagCollection:
    """Every table, unsharded and on this machine's CPU."""
    configs = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=count,
            embedding_dim=dim,
            feature_names=list(packer.tables.features(name)),
            pooling=PoolingType.SUM,
        )
        for name, count in packer.tables.rows.items()
    ]
    return EmbeddingBagCollection(tables=configs)


def model_of(packer: Packer, shape: StuConfig = TOWERS) -> Stu:
    """Parameters that start at zero are moved away, so that nothing is right by being nothing."""
    torch.manual_seed(0)
    model = Stu(shape, collection(packer), CONTEXT.context_length, packer.tables.sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def data() -> Iterator[PreparedData]:
    late = [(20, 0, "a", 58), (1, 20, "b", 59), (20, 21, "a", 61), (0, 20, "a", 62)]  # after the train period
    with prepared([*random_log(0, 9, 120, 60), *late], chunk_length=8) as (opened, _):
        assert opened.num_train_users < opened.num_users
        yield opened


@pytest.fixture(scope="module")
def codes(data: PreparedData) -> Codes:
    """Distinct; every other user's ends at the second level."""
    every = np.stack(np.unravel_index(np.random.default_rng(0).permutation(12)[: data.num_train_users], SIZES[:2]), 1)
    last = np.where(np.arange(data.num_train_users) % 2, 1, -1)
    return Codes(np.column_stack([every, last]).astype(np.int32), SIZES)


@pytest.fixture(autouse=True)
def every_example_trains_the_copy_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stu, "COPY_EVERY", 1)


def reader(data: PreparedData, codes: Codes, rank: int = 0, world_size: int = 1, **changes: Any) -> Reader:
    small: dict[str, Any] = {"batch_size": 16, "negatives": "none", "workers": 0}
    return Reader(data, CONTEXT, ReaderConfig(**small | changes), 0, rank, world_size, codes)


# The lookup.


def test_a_user_is_the_sum_of_its_tokens_and_who_has_none_has_a_row_of_its_own(
    data: PreparedData, codes: Codes
) -> None:
    packer = Packer(data, CONTEXT, codes)
    model = model_of(packer)
    assert not any(name.endswith("user.weight") for name, _ in model.named_parameters())
    bags = [model.lookup.tables.embedding_bags[f"stu_{level}"].weight for level in range(3)]
    assert [len(bag) for bag in bags] == [4, 4, 2]
    users = np.array([5, data.num_train_users, packer.unknown, 0])
    slots = model.lookup(packer.ids(users))
    for user, vector in zip(users, slots.user, strict=False):
        code = codes.tokens[user].tolist() if user < data.num_train_users else [3, -1, -1]
        expected = sum(bag[token] for bag, token in zip(bags, code, strict=True) if token >= 0)
        torch.testing.assert_close(vector, expected)
    for bag, codebook, size in zip(bags, slots.codebooks, SIZES, strict=True):
        torch.testing.assert_close(codebook[:size], bag[:size])


def test_a_table_is_untouched_by_tokens_of_another_level(data: PreparedData, codes: Codes) -> None:
    """Token 1 of level 0 and token 1 of level 1 share nothing: what one is trained on leaves the other where it was."""
    packer = Packer(data, CONTEXT, codes)
    model = model_of(packer)
    ids = packer.ids(np.arange(data.num_train_users))
    for level in range(3):
        model.zero_grad()
        model.lookup.tables(ids)[f"stu_{level}"].square().sum().backward()
        for other in range(3):
            gradient = model.lookup.tables.embedding_bags[f"stu_{other}"].weight.grad
            rows = set() if gradient is None else set(gradient.abs().sum(1).nonzero()[:, 0].tolist())
            used = set(codes.tokens[:, level].tolist()) - {-1}
            assert rows == (used if other == level else set())


# Scores.


def brute_force(model: Stu, batch: Batch) -> Tensor:
    """log P of every code of every user at every example, `[B, users]`: token by token, as a search would ask."""
    slots = model.lookup(batch.context.ids)
    writer = Writer(model, slots.codebooks)
    cache = writer.cache(model.encode_queries(batch.context, slots).vector)
    return torch.stack([log_p(writer, cache, len(batch.target), code) for code in CODES], dim=1)


def log_p(writer: Writer, cache: Any, num: int, code: list[int]) -> Tensor:
    total = torch.zeros(num)
    for level, token in enumerate(code):
        if token >= 0:
            prefix = torch.tensor(code[:level], dtype=torch.int64).expand(num, -1)
            total = total + writer.log_probabilities(cache, torch.arange(num), prefix)[:, token]
    return total


CODES = [[a, b, c] for a in range(3) for b in range(4) for c in range(2)]


@SHAPES
def test_probabilities_of_all_codes_sum_to_one(data: PreparedData, codes: Codes, shape: StuConfig) -> None:
    model, batch = model_of(Packer(data, CONTEXT, codes), shape), reader(data, codes)[0, 0]
    everything = brute_force(model, batch)
    torch.testing.assert_close(everything.logsumexp(1), torch.zeros(len(batch.target)), rtol=0, atol=1e-5)
    assert everything.std() > 0.1


@SHAPES
def test_the_loss_is_that_of_the_softmax_over_all_codes_bonuses_included(
    data: PreparedData, codes: Codes, shape: StuConfig
) -> None:
    """Copy term and decoder are trained side by side: −log P(target), and −log of the share with bonuses, beside P."""
    shape = dataclasses.replace(shape, balance_loss=0.0)
    model, batch = model_of(Packer(data, CONTEXT, codes), shape), reader(data, codes, action_weights={"a": 3.0})[0, 0]
    context = batch.context
    slots = model.lookup(context.ids)
    bonus = model.encode_queries(context, slots).bonus
    writer = Writer(model, slots.codebooks)
    cache = writer.cache(model.encode_queries(context, slots).vector)
    losses, named = [], 0
    for b in range(len(batch.target)):
        own = slice(int(context.contact_offsets[b]), int(context.contact_offsets[b + 1]))
        scores = {}  # of contacts, by slot; everybody else has the rest of the probability
        for slot, extra in zip(context.contact_user[own].tolist(), bonus[own], strict=True):
            scores[slot] = log_p(writer, cache, len(batch.target), context.codes[slot].tolist())[b], extra
        rest = 1 - sum(p.detach().exp() for p, _ in scores.values())
        total = rest + sum((p + extra).exp() for p, extra in scores.values())
        target = int(batch.target[b])
        named += target in scores
        of_target = log_p(writer, cache, len(batch.target), context.codes[target].tolist())[b]
        losses.append(-of_target + torch.as_tensor(total).log() - (scores[target][1] if target in scores else 0.0))
    assert 0 < named < len(batch.target)
    expected = (torch.stack(losses) * batch.weight).sum() * batch.scale
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-4)


def test_what_the_log_tells_is_the_teacher_forced_loss_and_accuracy(data: PreparedData, codes: Codes) -> None:
    shape = dataclasses.replace(TOWERS, copy_term=False)
    model, batch = model_of(Packer(data, CONTEXT, codes), shape), reader(data, codes)[0, 0]
    loss = model(batch)
    scalars = model.scalars()
    assert set(scalars) == {"level_0", "level_1", "level_2", "code"}
    slots = model.lookup(batch.context.ids)
    writer = Writer(model, slots.codebooks)
    cache = writer.cache(model.encode_queries(batch.context, slots).vector)
    code_BL = batch.context.codes[batch.target]
    rows = torch.arange(len(code_BL))
    whole = torch.ones(len(code_BL), dtype=torch.bool)
    for level in range(3):
        has = code_BL[:, level] >= 0
        log_ps = writer.log_probabilities(cache, rows, code_BL[:, :level])[has]
        right = log_ps.argmax(1) == code_BL[has, level]
        whole[has] &= right
        assert scalars[f"level_{level}"]["accuracy"] == pytest.approx(right.float().mean().item())
        own = -log_ps[torch.arange(len(log_ps)), code_BL[has, level]].mean().item()
        assert scalars[f"level_{level}"]["loss"] == pytest.approx(own, abs=1e-4)
    assert scalars["code"]["accuracy"] == pytest.approx(whole.float().mean().item())
    assert scalars["code"]["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_without_the_copy_term_every_bonus_is_zero(data: PreparedData, codes: Codes) -> None:
    shape = dataclasses.replace(TOWERS, copy_term=False)
    model, batch = model_of(Packer(data, CONTEXT, codes), shape), reader(data, codes)[0, 0]
    bonus = model.encode_queries(batch.context, model.lookup(batch.context.ids)).bonus
    assert len(bonus) == len(batch.context.contact_user) > 0
    assert not bonus.any()


# Batches.


@SHAPES
def test_a_batch_of_queries_is_each_query_alone(data: PreparedData, codes: Codes, shape: StuConfig) -> None:
    """And what lies before the window, or beyond the memory, is not seen."""
    packer = Packer(data, CONTEXT, codes)
    model = model_of(packer, shape)
    users = np.repeat(np.arange(data.num_users), 3)
    times = np.tile(np.array([0, 9, 70]) * HOUR, data.num_users)

    def encoded(users: np.ndarray, times: np.ndarray, **groups: Any) -> tuple[Tensor, list[Tensor], Any]:
        context = pack(packer, queries(users, times, **groups))
        slots = model.lookup(context.ids)
        result = model.encode_queries(context, slots)
        writer = Writer(model, slots.codebooks)
        return (
            writer.log_probabilities(
                writer.cache(result.vector), torch.arange(len(users)), torch.ones(len(users), 1, dtype=torch.int64)
            ),
            list(result.bonus.split(context.contact_offsets.diff().tolist())),
            context,
        )

    together, bonuses, context = encoded(users, times, groups=users)
    lengths = context.window_end - context.window_begin
    assert lengths.min() == 0
    assert lengths.max() > shape.memory
    for q in range(len(users)):
        alone, bonus, _ = encoded(users[[q]], times[[q]])
        torch.testing.assert_close(together[q], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bonuses[q], bonus[0], rtol=1e-4, atol=1e-5)


@SHAPES
def test_beams_in_any_order_are_answered_as_each_alone(data: PreparedData, codes: Codes, shape: StuConfig) -> None:
    packer = Packer(data, CONTEXT, codes)
    model, batch = model_of(packer, shape), reader(data, codes)[0, 0]
    slots = model.lookup(batch.context.ids)
    writer = Writer(model, slots.codebooks)
    cache = writer.cache(model.encode_queries(batch.context, slots).vector)
    row, prefix = torch.tensor([7, 2, 7, 0, 7, 2]), torch.tensor([[0, 1], [2, 3], [1, 0], [0, 0], [0, 1], [1, 2]])
    together = writer.log_probabilities(cache, row, prefix)
    for r in range(len(row)):
        alone = writer.log_probabilities(cache, row[[r]], prefix[[r]])
        torch.testing.assert_close(together[[r]], alone, rtol=1e-4, atol=1e-5)
    nothing = writer.log_probabilities(cache, row[:0], prefix[:0])
    assert nothing.shape == (0, 2)


def test_rows_find_back_from_their_layout() -> None:
    row = torch.tensor([3, 0, 3, 1, 3, 0])
    place = Places(row, 5)
    values = torch.arange(1.0, 7.0)[:, None]
    laid_out = place.spread(values)
    assert laid_out.squeeze(2).tolist() == [[2, 6, 0], [4, 0, 0], [0, 0, 0], [1, 3, 5], [0, 0, 0]]
    torch.testing.assert_close(place.gather(laid_out), values)


@pytest.mark.parametrize("shape", [TOWERS, TRANSFORMER], ids=["towers", "transformer"])
@pytest.mark.parametrize("order", ["user", "time"])
def test_the_mean_over_ranks_is_the_loss_of_the_global_batch(
    data: PreparedData, codes: Codes, order: str, shape: StuConfig
) -> None:
    model = model_of(Packer(data, CONTEXT, codes), shape)
    changes = {"order": order, "action_weights": {"a": 3.0}}
    for world_size in (2, 3):
        slices = [reader(data, codes, rank, world_size, **changes)[0, 1] for rank in range(world_size)]
        loss = torch.stack([model(part) for part in slices]).mean()
        torch.testing.assert_close(loss, model(reader(data, codes, **changes)[0, 1]), rtol=1e-4, atol=1e-5)


@SHAPES
def test_a_slice_without_examples_reaches_every_parameter(data: PreparedData, codes: Codes, shape: StuConfig) -> None:
    """Or the other ranks would wait for its gradients."""
    model = model_of(Packer(data, CONTEXT, codes), shape)
    batch = reader(data, codes, 0, 10_000, batch_size=len(reader(data, codes).event))[0, 0]
    assert len(batch.example) == 0
    loss = model(batch)
    loss.backward()
    assert loss.item() == 0
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == set()


@SHAPES
def test_every_parameter_learns(data: PreparedData, codes: Codes, shape: StuConfig) -> None:
    model = model_of(Packer(data, CONTEXT, codes), shape)
    model(reader(data, codes, actor_dropout=0.3)[0, 0]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@SHAPES
def test_a_step_in_bfloat16_is_close_to_one_in_single_precision(
    data: PreparedData, codes: Codes, shape: StuConfig
) -> None:
    model, batch = model_of(Packer(data, CONTEXT, codes), shape), reader(data, codes)[0, 0]
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0.05)


def test_one_level_and_a_first_code_suffice(data: PreparedData) -> None:
    """No level after the first: nothing is teacher-forced, and the loss is a softmax over all users."""
    num = data.num_train_users
    codes = Codes(np.arange(num, dtype=np.int32)[:, None], (num,))
    shape = dataclasses.replace(TOWERS, copy_term=False)
    batch = reader(data, codes)[0, 0]
    model = model_of(Packer(data, CONTEXT, codes), shape)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.zero_()
    expected = math.log(num) * float(batch.weight.sum()) * batch.scale
    assert model(batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"decoder_hidden": 0}, {"decoder_layers": 0}, {"memory": 0}, {"dim": 6}])
def test_shapes_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FriendrecError):
        StuConfig(**wrong)
