"""The two-tower model: what its loss and its scores are made of, and that batching changes neither."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from friendrec.datasets.batch import Batch, Context
from friendrec.datasets.config import ContextConfig, ReaderConfig
from friendrec.datasets.packing import Packer, Tables
from friendrec.datasets.prepared import PreparedData
from friendrec.datasets.reader import Reader
from friendrec.errors import FriendrecError
from friendrec.models.config import TwoTowerConfig
from friendrec.models.features import Lookup
from friendrec.models.interaction import gate_weights
from friendrec.models.towers import CopyTerm, QueryTower, TargetTower
from friendrec.models.two_tower import TwoTower
from tests.datasets.decode import decode, pack, queries, rows_of
from tests.datasets.twin import HOUR, prepared, random_log

CONTEXT = ContextConfig(context_length=4, contacts=3)
SHAPE = TwoTowerConfig(dim=8, num_heads=2, hidden=16)
MIXTURE = dataclasses.replace(SHAPE, history_encoder="transformer", interaction="moe", num_experts=3)
ROUTED = dataclasses.replace(MIXTURE, gate_top_k=2, balance_loss=0.5)
PLAIN = TwoTowerConfig(dim=8, num_heads=2, hidden=16, history_encoder="none", interaction="none", copy_term=False)
SHAPES = pytest.mark.parametrize("shape", [SHAPE, MIXTURE, ROUTED], ids=["mlp", "moe", "top-2"])


def collection(rows: dict[str, int], dim: int = SHAPE.dim) -> EmbeddingBagCollection:
    """Every table, unsharded and on this machine's CPU."""
    configs = [
        EmbeddingBagConfig(
            name=name, num_embeddings=count, embedding_dim=dim, feature_names=[name], pooling=PoolingType.SUM
        )
        for name, count in rows.items()
    ]
    return EmbeddingBagCollection(tables=configs)


def model_of(data: PreparedData, shape: TwoTowerConfig = SHAPE) -> TwoTower:
    """Parameters that start at zero are moved away, so that nothing is right by being nothing."""
    torch.manual_seed(0)
    model = TwoTower(shape, collection(Tables.of(data).rows), CONTEXT.context_length)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def data() -> Iterator[PreparedData]:
    with prepared(random_log(0, 9, 120, 60), chunk_length=8) as (opened, _):
        yield opened


def reader(data: PreparedData, **changes: Any) -> Reader:
    small: dict[str, Any] = {
        "batch_size": 16,
        "uniform_negatives": 3,
        "recent_negatives": 2,
        "shared_negatives": 4,
        "workers": 0,
    }
    return Reader(data, CONTEXT, ReaderConfig(**small | changes))


# Scores.


def test_a_score_is_the_dot_product_with_the_target_and_the_bonus_of_a_contact(data: PreparedData) -> None:
    """The loss, rebuilt from the scores that an index would give and from what the batch says in dense rows."""
    model, batch = model_of(data), reader(data)[0, 0]
    slots = model.lookup(batch.context.ids)
    encoded = model.encode_queries(batch.context, slots)
    everyone = model.lookup(Packer(data, CONTEXT).ids(np.arange(data.num_train_users)))
    scores = encoded.vector @ model.encode_targets(everyone)[: data.num_train_users].T
    losses = []
    for b, seen in enumerate(decode(batch.context)):
        bonus = encoded.bonus[batch.context.contact_offsets[b] : batch.context.contact_offsets[b + 1]]
        score = scores[b].index_add(0, torch.tensor(seen.contacts, dtype=torch.int64), bonus)
        target = rows_of(batch.context, batch.target)[b]
        drawn = [(batch.negative[b], batch.negative_log_count[b]), (batch.shared, batch.shared_log_count[b])]
        sampled = [score[rows_of(batch.context, slots)] - logs for slots, logs in drawn]
        named = score[[contact for contact in seen.contacts if contact != target]]
        losses.append(torch.cat([score[[target]], named, *sampled]).logsumexp(0) - score[target])
        dense = scores[b, target]  # sampled candidates are no contacts: they have no bonus
        losses[-1] += SHAPE.dense_loss * (torch.cat([dense[None], *sampled]).logsumexp(0) - dense)
    expected = (torch.stack(losses) * batch.weight).sum() * batch.scale
    assert any(
        t in seen.contacts for t, seen in zip(rows_of(batch.context, batch.target), decode(batch.context), strict=True)
    )
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)


def test_the_last_component_is_the_candidates_bias(data: PreparedData) -> None:
    torch.manual_seed(0)
    query, target = QueryTower(SHAPE), TargetTower(SHAPE)
    user, history, condition = torch.randn(3, 5, 8).unbind()
    vector, _ = query(user, history, condition, torch.rand(5, 2))
    assert vector.shape == (5, 9)
    assert (vector[:, -1] == 1).all()
    candidates = target(user)
    before = vector @ candidates.T
    with torch.no_grad():
        target.residual[-1].bias[-1] += 2.0
    torch.testing.assert_close(vector @ target(user).T, before + 2.0)
    torch.testing.assert_close(
        candidates, torch.nn.functional.pad(user, (0, 1)) + target.residual(user) - torch.eye(9)[8] * 2
    )


def test_without_history_and_interaction_a_score_is_a_bilinear_form_of_two_ids(data: PreparedData) -> None:
    """Whatever was done before and whenever it is asked: u · W (I + V) v + b(v) + c, of the rows of the user table."""
    model, batch = model_of(data, PLAIN), reader(data)[0, 0]
    slots = model.lookup(batch.context.ids)
    query = model.encode_queries(batch.context, slots).vector
    scores = query @ model.encode_targets(slots).T
    actors, (weight, bias) = slots.user[batch.context.actor], model.target_tower.residual.parameters()
    linear = actors @ model.query_tower.skip.weight[:, :8].T
    targets = slots.user @ (torch.eye(8) + weight[:8]).T + bias[:8]
    torch.testing.assert_close(scores, linear @ targets.T + slots.user @ weight[8] + bias[8])
    names = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert names == {"lookup", "query_tower", "target_tower"}
    model(batch).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("lookup"))


def test_without_the_copy_term_every_bonus_is_zero(data: PreparedData) -> None:
    model, batch = model_of(data, dataclasses.replace(SHAPE, copy_term=False)), reader(data)[0, 0]
    bonus = model.encode_queries(batch.context, model.lookup(batch.context.ids)).bonus
    assert len(bonus) == len(batch.context.contact_user) > 0
    assert not bonus.any()
    model(batch).backward()


def test_the_copy_term_is_zero_before_training_and_reads_standardised_features() -> None:
    torch.manual_seed(0)
    copy = CopyTerm(6, 8)
    features, clock = 5 + 3 * torch.randn(40, 6), torch.rand(40, 2)
    assert not copy(features, clock).any()
    copy.standardise(features)
    torch.testing.assert_close(copy.mean, features.mean(0))
    torch.testing.assert_close(copy.deviation, features.std(0))
    torch.nn.init.normal_(copy.bonus[-1].weight)
    standard = (features - features.mean(0)) / features.std(0)
    torch.testing.assert_close(copy(features, clock), copy.bonus(torch.cat([standard, clock], 1)).squeeze(1))
    copy.standardise(torch.ones(3, 6))  # a feature that never varies
    assert torch.isfinite(copy(features, clock)).all()
    before = copy.mean.clone()
    copy.standardise(torch.zeros(1, 6))  # no sample to speak of
    assert torch.equal(copy.mean, before)


# Batches.


def encoded(model: TwoTower, context: Context) -> tuple[Tensor, list[Tensor]]:
    result = model.encode_queries(context, model.lookup(context.ids))
    return result.vector, list(result.bonus.split(context.contact_offsets.diff().tolist()))


@SHAPES
def test_a_batch_of_queries_is_each_query_alone(data: PreparedData, shape: TwoTowerConfig) -> None:
    model, packer = model_of(data, shape), Packer(data, CONTEXT)
    users = np.repeat(np.arange(data.num_users), 4)
    times = np.tile(np.array([0, 9, 30, 70]) * HOUR, data.num_users)
    vectors, bonuses = encoded(model, pack(packer, queries(users, times, groups=users)))
    for q in range(len(users)):
        vector, bonus = encoded(model, pack(packer, queries(users[[q]], times[[q]])))
        torch.testing.assert_close(vectors[q], vector[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bonuses[q], bonus[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [SHAPE, MIXTURE], ids=["mlp", "moe"])
@pytest.mark.parametrize("order", ["user", "time"])
def test_the_mean_over_ranks_is_the_loss_of_the_global_batch(
    data: PreparedData, order: str, shape: TwoTowerConfig
) -> None:
    config = reader(data, order=order, action_weights={"a": 3.0}).config
    model = model_of(data, shape)
    for world_size in (2, 3):
        slices = [Reader(data, CONTEXT, config, 0, rank, world_size)[0, 1] for rank in range(world_size)]
        loss = torch.stack([model(part) for part in slices]).mean()
        torch.testing.assert_close(loss, model(Reader(data, CONTEXT, config)[0, 1]), rtol=1e-4, atol=1e-5)


@SHAPES
def test_a_slice_without_examples_reaches_every_parameter(data: PreparedData, shape: TwoTowerConfig) -> None:
    """Or the other ranks would wait for its gradients."""
    config = reader(data, batch_size=len(reader(data).event)).config
    whole, model = Reader(data, CONTEXT, config, 0, 0, 10_000), model_of(data, shape)
    batch: Batch = whole[0, 0]
    assert len(batch.example) == 0
    loss = model(batch)
    loss.backward()
    assert loss.item() == 0
    missing = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not missing


def test_a_top_k_gate_adds_its_balance_to_the_loss(data: PreparedData) -> None:
    """The share of the global weight comes from `scale`, so that ranks add up."""
    batch = reader(data, action_weights={"a": 3.0})[0, 0]
    model, without = (model_of(data, dataclasses.replace(ROUTED, balance_loss=weight)) for weight in (0.5, 0.0))
    gate = model.encode_queries(batch.context, model.lookup(batch.context.ids)).gate
    assert gate is not None
    share = batch.weight / batch.weight.sum()
    routed = share @ (gate_weights(gate, 2) > 0).float() / 2
    expected = 0.5 * 3 * (routed * (share @ gate.softmax(1))).sum()
    torch.testing.assert_close(model(batch) - without(batch), expected, rtol=1e-4, atol=1e-5)
    assert set(model.scalars()["experts"]) == {"share_0", "share_1", "share_2", "entropy"}
    assert model_of(data).scalars() == {}


@SHAPES
def test_every_parameter_learns(data: PreparedData, shape: TwoTowerConfig) -> None:
    model = model_of(data, shape)
    model(reader(data, actor_dropout=0.3)[0, 0]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@SHAPES
def test_a_step_in_bfloat16_is_close_to_one_in_single_precision(data: PreparedData, shape: TwoTowerConfig) -> None:
    model, batch = model_of(data, shape), reader(data)[0, 0]
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0.05)


# The lookup.


def test_a_user_is_its_vector_plus_the_pooled_vectors_of_its_profile() -> None:
    torch.manual_seed(0)
    tables = collection({"user": 5, "event": 2, "condition": 2, "profile_city": 3, "profile_tags": 4})
    ids = KeyedJaggedTensor.from_lengths_sync(
        keys=["user", "event", "condition", "profile_city", "profile_tags"],
        values=torch.tensor([4, 1, 0, 1, 0, 1, 2, 0, 3, 1]),
        lengths=torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0, 2, 1, 0]),
    )
    slots = Lookup(tables)(ids)
    user, city, tags = (tables.embedding_bags[n].weight for n in ("user", "profile_city", "profile_tags"))
    expected = torch.stack([user[4] + city[2] + tags[0] + tags[3], user[1] + tags[1], torch.zeros(8)])
    torch.testing.assert_close(slots.user, expected)
    torch.testing.assert_close(slots.event[:2], tables.embedding_bags["event"].weight)
    torch.testing.assert_close(slots.condition[:2], tables.embedding_bags["condition"].weight)


@pytest.mark.parametrize("wrong", [
    {"dim": 6}, {"num_heads": 3}, {"hidden": 0}, {"dim": 0}, {"dense_loss": -0.1}, {"num_layers": 0},
    {"num_experts": 0, "interaction": "moe"}, {"gate_top_k": 5, "interaction": "moe"}, {"gate_top_k": 1},
    {"balance_loss": -1.0},
])  # fmt: skip
def test_shapes_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FriendrecError, match="must"):
        TwoTowerConfig(**wrong)
