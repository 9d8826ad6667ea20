"""Clusters inside the model: the formula, the losses against hand-made and brute-force twins, and both models."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from friendrec.datasets.packing import Codes, Packer, Tables
from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError
from friendrec.models.clustering import COLDEST, QUERY, TARGET, Clustering, nearest, soft_clusters
from friendrec.models.config import TwoTowerConfig
from friendrec.models.stu import Stu
from friendrec.models.two_tower import TwoTower
from tests.datasets.decode import pack, queries
from tests.datasets.twin import HOUR
from tests.models import test_stu
from tests.models.test_two_tower import CONTEXT, SHAPE, collection, data, model_of, reader  # noqa: F401  # a fixture

LISTS, DIM = 9, 8


def config(**changes: Any) -> TwoTowerConfig:
    return dataclasses.replace(SHAPE, **{"clusters": "residual", "num_clusters": LISTS} | changes)


def clustering(ready: bool = True, **changes: Any) -> Clustering:
    made = Clustering(config(**changes), LISTS, indexed=True)
    made.ready.fill_(float(ready))
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def batch_of(target: list[int], negative: list[list[int]], weight: list[float] | None = None) -> Any:
    """What the losses read of a batch."""
    weights = torch.tensor(weight or [1.0] * len(target))
    slots = torch.tensor(negative, dtype=torch.int64).reshape(len(target), -1)
    return SimpleNamespace(target=torch.tensor(target), negative=slots, weight=weights, scale=1 / float(weights.sum()))


# The formula.


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.sampled_from([1.0, 0.3]))
@settings(max_examples=30, deadline=None)
def test_soft_clusters_are_the_three_lines(seed: int, users: int, lists: int, dim: int, temperature: float) -> None:
    u, c = normal(users, dim, seed=seed), normal(lists, dim, seed=seed + 1)
    weights, clustered = soft_clusters(u, c, temperature)
    logits = u.numpy().astype(np.float64) @ c.numpy().T / temperature
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(clustered, expected @ c.numpy(), atol=1e-5)


def test_both_towers_as_residual_and_as_representation() -> None:
    """The formula at τ = 1 on all but the last component; over the cells' means where there are two levels."""
    vector, table = normal(4, DIM + 1), normal(LISTS, DIM, seed=1)
    for two_level in (False, True):
        c = table.unflatten(0, (3, 3)).mean(1) if two_level else table
        clustered = torch.softmax(vector[:, :-1] @ c.T, dim=1) @ c
        whole = clustering(clusters="representation", two_level=two_level)
        part = clustering(two_level=two_level)
        assert part.gates is not None
        part.gates.data = torch.tensor([0.5, -2.0])
        for tower, share in ((QUERY, 0.5), (TARGET, -2.0)):
            torch.testing.assert_close(whole(vector, table, tower)[:, :-1], clustered)
            torch.testing.assert_close(part(vector, table, tower)[:, :-1], vector[:, :-1] + share * clustered)
            assert torch.equal(part(vector, table, tower)[:, -1], vector[:, -1])


def test_nothing_acts_before_the_centroids_are_placed() -> None:
    vector, table = normal(4, DIM + 1), normal(LISTS, DIM, seed=1)
    for kind in ("residual", "representation"):
        waiting = clustering(ready=False, clusters=kind)
        assert torch.equal(waiting(vector, table, TARGET), vector)
        assert waiting.loss(vector, vector, table, batch_of([0, 1, 2, 3], [[1], [2], [3], [0]])) == 0
        assert torch.equal(waiting.load, torch.full((LISTS,), 1 / LISTS))


def test_hard_assignment_is_brute_force() -> None:
    users, centroids = normal(50, 5), normal(7, 5, seed=1)
    distances = [[float(((u - c) ** 2).sum()) for c in centroids.numpy()] for u in users.numpy()]
    assert nearest(users, centroids).tolist() == np.argmin(distances, axis=1).tolist()


# The losses.


def test_the_loss_of_one_level_by_hand() -> None:
    """Every part from its definition, one example and one user at a time."""
    made = clustering(two_level=False, co_assignment_loss=0.7, list_balance_loss=0.3)
    made.load.copy_(torch.arange(1.0, LISTS + 1) / 45)
    made.centre.copy_(normal(DIM, seed=5))
    made.bias.copy_(normal(LISTS, seed=6))
    made.anneal(0.5)
    table, targets, asked = normal(LISTS, DIM, seed=1), normal(6, DIM + 1, seed=2), normal(3, DIM + 1, seed=3)
    centroids = np.column_stack([table.numpy() + made.centre.numpy(), made.bias.numpy()]).astype(np.float64)
    target, negative, weight = [0, 4, 5], [[1, 2, 0], [3, 3, 1], [4, 0, 2]], [1.0, 2.0, 0.5]
    found = made.loss(asked, targets, table, batch_of(target, negative, weight))
    load = made.load.numpy().astype(np.float64)  # with these users in it
    expected = 0.0
    for b in range(3):
        logits = centroids @ asked[b].numpy()
        own = int(np.square(targets[target[b]].numpy() - centroids).sum(1).argmin())
        part = 0.7 * (np.log(np.exp(logits).sum()) - logits[own])
        for user in negative[b][:2]:  # the first two stand for all
            apart = np.square(targets[user].numpy() - centroids).sum(1)
            soft = np.exp(-apart / 2 / COLDEST**0.5) / np.exp(-apart / 2 / COLDEST**0.5).sum()
            crowd = np.log(LISTS * load + 1e-3)
            part += (0.5 * apart.min() + 0.3 * (soft @ crowd)) / 2
        expected += weight[b] * part / sum(weight)
    np.testing.assert_allclose(float(found), expected, rtol=1e-5)


def test_two_levels_ask_for_the_cell_and_then_inside_it() -> None:
    """log P(list) = log P(cell) + log P(list | cell), and crowding is the cell's and the list's in it."""
    made = clustering(co_assignment_loss=1.0, list_balance_loss=1.0)
    made.load.copy_(torch.arange(1.0, LISTS + 1) / 45)
    made.anneal(1.0)
    table, targets, asked = normal(LISTS, DIM, seed=1), normal(2, DIM + 1, seed=2), normal(1, DIM + 1, seed=3)
    found = float(made.loss(asked, targets, table, batch_of([0], [[1]])))
    centroids, query = np.column_stack([table.numpy(), np.zeros(LISTS)]), asked[0].numpy()
    means = centroids.reshape(3, 3, -1).mean(1)
    log_softmax = lambda x: x - np.log(np.exp(x).sum())  # noqa: E731
    user, own = targets[1].numpy(), int(np.square(targets[0].numpy() - centroids).sum(1).argmin())
    inside = centroids[own // 3 * 3 : own // 3 * 3 + 3]
    expected = -log_softmax(means @ query)[own // 3] - log_softmax(inside @ query)[own % 3]
    apart = np.square(user - centroids).sum(1)
    cell = int(apart.argmin()) // 3
    load = made.load.numpy().reshape(3, 3) + 1e-3 / LISTS  # with this user in it
    soft = lambda c: np.exp(log_softmax(-np.square(user - c).sum(1) / 2 / COLDEST))  # noqa: E731
    expected += soft(means) @ np.log(3 * load.sum(1))
    expected += soft(centroids.reshape(3, 3, -1)[cell]) @ np.log(3 * load[cell] / load[cell].sum())
    expected += apart.min() / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_balance_is_the_log_of_their_number_less_the_entropy_of_the_load() -> None:
    """Users at the centroids, each list as often as its running load says."""
    table = 30 * torch.eye(LISTS, DIM + 1)[:, :-1]
    targets = torch.nn.functional.pad(table, (0, 1))
    for two_level in (False, True):
        for times in (np.arange(1, LISTS + 1), np.ones(LISTS, np.int64)):
            made = clustering(two_level=two_level, co_assignment_loss=0.0, list_balance_loss=1.0)
            share = times / times.sum()
            made.load.copy_(torch.from_numpy(share))
            made.anneal(1.0)
            users = np.repeat(np.arange(LISTS), times).tolist()
            found = float(made.loss(targets[users], targets, table, batch_of(users, [[user] for user in users])))
            assert found == pytest.approx(math.log(LISTS) + (share * np.log(share)).sum(), abs=0.01)


def test_the_gradient_of_the_hard_assignment_is_that_of_the_soft_one() -> None:
    made = clustering(two_level=False, co_assignment_loss=1.0, list_balance_loss=0.0)
    table, targets, asked = normal(LISTS, DIM, seed=1), normal(6, DIM + 1, seed=2), normal(3, DIM + 1, seed=3)
    grown = table.clone().requires_grad_()
    batch = batch_of([0, 4, 5], [[], [], []])
    made._surprise(asked, targets[batch.target], made.centroids(grown)).mean().backward()
    soft = table.clone().requires_grad_()
    centroids = made.centroids(soft)
    apart = (targets[batch.target][:, None] - centroids).square().sum(2)
    own = torch.nn.functional.one_hot(apart.argmin(1), LISTS) - (-apart / 2).softmax(1).detach()
    log_p = (asked @ centroids.T).log_softmax(1)
    (-(((-apart / 2).softmax(1) + own) * log_p).sum(1).mean()).backward()
    torch.testing.assert_close(grown.grad, soft.grad)


def test_quantisation_moves_a_centroid_towards_the_mean_of_its_users() -> None:
    """By as much as if it were alone: the gradient is not less for there being many."""
    made = clustering(two_level=False, co_assignment_loss=0.0, list_balance_loss=0.0)
    table = normal(LISTS, DIM, seed=1).requires_grad_()
    targets, users = normal(60, DIM + 1, seed=2), list(range(60))
    centroids = made.centroids(table).detach()
    made.loss(targets, targets, table, batch_of(users, [[user] for user in users])).backward()
    lists = nearest(targets, centroids)
    for own in range(LISTS):
        mine = targets[lists == own, :-1]
        pull = (table[own] - mine).sum(0) * LISTS / 60
        torch.testing.assert_close(table.grad[own], pull.detach(), atol=1e-5, rtol=1e-4)


def test_targets_are_not_moved_and_queries_and_centroids_are() -> None:
    made = clustering()
    table, targets, asked = (
        normal(*shape, seed=seed).requires_grad_()
        for seed, shape in enumerate(((LISTS, DIM), (6, DIM + 1), (3, DIM + 1)))
    )
    made.loss(asked, targets, table, batch_of([0, 4, 5], [[1], [2], [3]])).backward()
    assert targets.grad is None
    assert table.grad is not None and table.grad.abs().sum(1).gt(0).all()
    assert asked.grad is not None and asked.grad[:, :-1].abs().sum(1).gt(0).all()


def test_running_means_follow_the_users() -> None:
    """Shares, biases and the mean of all vectors go towards those of the users at hand, however often."""
    made = clustering(two_level=False)
    made.load.copy_(torch.eye(LISTS)[0])
    table, targets = normal(LISTS, DIM, seed=1), normal(40, DIM + 1, seed=2)
    batch = batch_of(list(range(20)), np.arange(40).reshape(20, 2).tolist())
    for _ in range(1500):
        made.loss(targets[:20], targets, table - made.centre, batch)  # the centroids themselves stay where they are
    lists = nearest(targets, made.centroids(table - made.centre))
    share = torch.bincount(lists, minlength=LISTS) / 40
    torch.testing.assert_close(made.load, share, atol=1e-3, rtol=0)
    torch.testing.assert_close(made.centre, targets[:, :-1].mean(0))
    for own in range(LISTS):
        if share[own]:
            torch.testing.assert_close(made.bias[own], targets[lists == own, -1].mean(), atol=1e-4, rtol=1e-3)
    told = made.scalars()
    assert told["fullest"] == pytest.approx(LISTS * float(share.max()), rel=1e-2)
    assert told["empty"] == int((share == 0).sum())


# The models.


def with_clusters(data: PreparedData, **changes: Any) -> TwoTower:  # noqa: F811
    """As `model_of`, with clusters that have been placed."""
    torch.manual_seed(0)
    shape = config(**changes)
    model = TwoTower(shape, collection(Tables.of(data, (), LISTS).rows), CONTEXT.context_length, LISTS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert model.clustering is not None
    model.clustering.ready.fill_(1)
    return model


def test_before_they_are_placed_the_model_is_the_one_without(data: PreparedData) -> None:  # noqa: F811
    plain, model = model_of(data), with_clusters(data)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert model.clustering is not None
    model.clustering.ready.fill_(0)
    drawn = reader(data)
    drawn.packer = Packer(data, CONTEXT, clusters=LISTS)
    torch.testing.assert_close(model(drawn[0, 0]), plain(reader(data)[0, 0]))


def test_every_parameter_learns_from_a_step(data: PreparedData) -> None:  # noqa: F811
    for kind in ("residual", "representation"):
        drawn = reader(data)
        drawn.packer = Packer(data, CONTEXT, clusters=LISTS)
        model = with_clusters(data, clusters=kind)
        model(drawn[0, 0]).backward()
        still = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
        assert not still
        assert model.lookup.tables.embedding_bags["cluster"].weight.grad.abs().sum(1).gt(0).all()
        assert model.scalars()["clusters"]["fullest"] >= 1


def test_tokens_have_clusters_in_the_query_tower_alone(data: PreparedData) -> None:  # noqa: F811
    tokens = np.stack(np.unravel_index(np.arange(data.num_train_users), (4, 4)), axis=1).astype(np.int32)
    packer = Packer(data, CONTEXT, Codes(tokens, (4, 4)), LISTS)
    without = test_stu.model_of(packer)
    shape = dataclasses.replace(without.config, clusters="residual", num_clusters=LISTS)
    model = Stu(shape, test_stu.collection(packer), CONTEXT.context_length, (4, 4), LISTS)
    model.load_state_dict(without.state_dict(), strict=False)
    assert model.clustering is not None and model.clustering.gates is not None
    context = pack(packer, queries(np.arange(5), np.full(5, 40 * HOUR)))

    def vectors(asked: Stu) -> Tensor:
        return asked.encode_queries(context, asked.lookup(context.ids)).vector

    torch.testing.assert_close(vectors(model), vectors(without))
    model.clustering.gates.data.fill_(1.0)
    assert model.clustering.gates.shape == (1,) and not torch.allclose(vectors(model), vectors(without))


# The config.


@pytest.mark.parametrize(
    ("users", "expected"), [(1, 1), (100, 9), (1_676, 36), (19_218, 144), (65_536, 256), (1_000_000, 62**2)]
)
def test_their_number_by_the_users(users: int, expected: int) -> None:
    assert config(num_clusters=0).clusters_of(users) == expected
    assert config(clusters="off").clusters_of(users) == 0


def test_a_number_that_cannot_be_is_refused_with_one_that_can() -> None:
    with pytest.raises(FriendrecError, match="num_clusters 10 is no square of cells: pass 9"):
        config(num_clusters=10)
    with pytest.raises(FriendrecError, match="num_clusters 9 are more than the 8 users"):
        config().clusters_of(8)
    assert config(num_clusters=10, two_level=False).clusters_of(11) == 10
    with pytest.raises(FriendrecError, match="co_assignment_loss -1"):
        config(co_assignment_loss=-1)
