"""The reader: every example once an epoch, the same global batches at any world size, resumable, prefetched."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from friendrec.datasets.batch import Batch
from friendrec.datasets.config import ContextConfig, ReaderConfig
from friendrec.datasets.prepared import PreparedData
from friendrec.datasets.reader import Reader
from friendrec.errors import FriendrecError
from tests.datasets.decode import decode, rows_of
from tests.datasets.test_packing import check, check_layout
from tests.datasets.twin import Twin, prepared, random_log

CONTEXT = ContextConfig(context_length=5, contacts=3)
SMALL: dict[str, Any] = {"uniform_negatives": 2, "recent_negatives": 2, "shared_negatives": 3}
WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3])
ORDERS = pytest.mark.parametrize("order", ["user", "time"])


def reader(data: PreparedData, rank: int = 0, world_size: int = 1, seed: int = 0, **changes: Any) -> Reader:
    config = ReaderConfig(**{"batch_size": 16, "workers": 0, **SMALL} | changes)
    return Reader(data, CONTEXT, config, seed, rank, world_size)


def ranks(data: PreparedData, world_size: int, **changes: Any) -> list[Reader]:
    return [reader(data, rank, world_size, **changes) for rank in range(world_size)]


@pytest.fixture(scope="module")
def log() -> Iterator[tuple[PreparedData, Twin]]:
    """A log with ties: 9 users, about 200 events in 100 hours, chunks of 8 entries."""
    with prepared(random_log(0, 9, 230, 100), chunk_length=8) as opened:
        yield opened


@pytest.fixture(scope="module")
def data(log: tuple[PreparedData, Twin]) -> PreparedData:
    return log[0]


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch by name."""
    found: dict[str, torch.Tensor] = {}
    for part in (batch, batch.context):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, KeyedJaggedTensor):
                found |= {"ids": value.values(), "lengths": value.lengths()}
            elif not isinstance(value, type(batch.context)):
                found[field.name] = torch.as_tensor(value)
    return found


def assert_same(left: Iterable[Batch], right: Iterable[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        expected = tensors(b)
        for name, value in tensors(a).items():
            assert torch.equal(value, expected[name]), name


# Which examples.


@ORDERS
@WORLDS
def test_every_example_comes_exactly_once_an_epoch(log: tuple[PreparedData, Twin], order: str, world_size: int) -> None:
    data, twin = log
    readers = ranks(data, world_size, order=order)
    assert len({r.steps for r in readers}) == 1
    for epoch in range(2):
        read = [batch.example for r in readers for batch in r.batches(epoch)]
        assert len(read) == world_size * readers[0].steps
        assert sorted(torch.cat(read).tolist()) == list(range(data.num_train_events))
    for batch in readers[0].batches(0):
        for example, target in zip(batch.example.tolist(), rows_of(batch.context, batch.target), strict=True):
            assert twin.events[example][1] == target


def test_examples_are_the_train_events_whose_action_is_a_target(log: tuple[PreparedData, Twin]) -> None:
    data, twin = log
    roles = {"a": "history", "b": "target"}
    data = dataclasses.replace(data, actions=tuple(dataclasses.replace(a, role=roles[a.name]) for a in data.actions))
    read = [example for batch in reader(data).batches(0) for example in batch.example.tolist()]
    assert sorted(read) == [e for e in range(data.num_train_events) if twin.events[e][2] == "b"]
    assert any(kind < 2 for batch in reader(data).batches(0) for kind in batch.context.event_kind.tolist())


@ORDERS
def test_without_temporal_only_the_last_out_event_of_each_user_is_an_example(
    log: tuple[PreparedData, Twin], order: str
) -> None:
    data, twin = log
    roles = {"a": "history", "b": "target"}
    for marked in (data, dataclasses.replace(
        data, actions=tuple(dataclasses.replace(a, role=roles[a.name]) for a in data.actions)
    )):  # fmt: skip
        wanted = {action.name for action in marked.actions if action.role == "target"}
        last = {twin.events[e][0]: e for e in range(data.num_train_events) if twin.events[e][2] in wanted}
        alone = reader(marked, order=order, temporal=False)
        read = [example for batch in alone.batches(0) for example in batch.example.tolist()]
        assert sorted(read) == sorted(last.values())
        for batch in alone.batches(0):
            for seen, example in zip(decode(batch.context), batch.example.tolist(), strict=True):
                assert len(seen.partners) == min(
                    len(twin.entries(twin.events[example][0], twin.events[example][3])), CONTEXT.context_length
                )


@ORDERS
@WORLDS
def test_slices_concatenate_to_the_same_global_batch(data: PreparedData, order: str, world_size: int) -> None:
    whole = reader(data, order=order)
    parts = ranks(data, world_size, order=order)
    for step in range(whole.steps):
        batch, slices = whole[0, step], [part[0, step] for part in parts]
        joined = [part.event[part.global_batch(0, step)].tolist() for part in parts]
        assert joined == [whole.event[whole.global_batch(0, step)].tolist()] * world_size
        read = torch.cat([piece.example for piece in slices])
        place = {example: at for at, example in enumerate(read.tolist())}
        chosen = [place[example] for example in batch.example.tolist()]
        assert len(place) == len(chosen) == len(read)
        for name in ("weight", "negative_log_count", "shared_log_count"):
            assert torch.equal(torch.cat([getattr(piece, name) for piece in slices])[chosen], getattr(batch, name))
        seen = [query for piece in slices for query in decode(piece.context)]
        assert [seen[at] for at in chosen] == decode(batch.context)
        for piece in slices:
            assert rows_of(piece.context, piece.shared).tolist() == rows_of(batch.context, batch.shared).tolist()


@ORDERS
def test_an_example_sees_what_comes_strictly_before_it(log: tuple[PreparedData, Twin], order: str) -> None:
    data, twin = log
    for batch in reader(data, order=order, actor_dropout=0.0).batches(0):
        check_layout(batch.context, CONTEXT.context_length)
        for seen, example in zip(decode(batch.context), batch.example.tolist(), strict=True):
            actor, _, _, now = twin.events[example]
            check(seen, twin, data, actor, now, CONTEXT)


def test_the_order_user_keeps_chunks_together_and_time_takes_runs_of_the_log(data: PreparedData) -> None:
    by_user, by_time = reader(data, order="user"), reader(data, order="time")
    batches = [list(r.batches(0)) for r in (by_user, by_time)]
    chunk = dict(zip(by_user.event.tolist(), by_user.chunk.tolist(), strict=True))
    homes: dict[int, set[int]] = {}
    for step, batch in enumerate(batches[0]):
        for example in batch.example.tolist():
            homes.setdefault(chunk[example], set()).add(step)
    assert all(len(steps) == 1 for steps in homes.values())
    for batch in batches[1]:
        run = sorted(batch.example.tolist())
        assert run == list(range(run[0], run[0] + len(run)))
        assert 16 <= len(run) < 32


@ORDERS
def test_epochs_and_seeds_differ(data: PreparedData, order: str) -> None:
    orders = [
        tuple(
            example
            for batch in reader(data, order=order, seed=seed).batches(epoch)
            for example in batch.example.tolist()
        )
        for seed, epoch in itertools.product(range(2), range(2))
    ]
    assert len(set(orders)) == 4


# Ranks in step.


@ORDERS
def test_more_bags_are_empty_and_change_no_other(order: str) -> None:
    with prepared(random_log(1, 20, 120, 40), chunk_length=8) as (data, _):
        batch = ranks(data, 1, order=order)[0][0, 0]
        ids = batch.context.ids
        padded = batch.with_bags(ids.stride() + 5).context.ids
        assert padded.stride() == ids.stride() + 5
        for key in ids.keys():  # noqa: SIM118 - not a mapping
            before, after = (jagged[key].to_dense() for jagged in (ids, padded))
            assert [bag.tolist() for bag in after] == [bag.tolist() for bag in before] + [[]] * 5


def test_a_rank_without_examples_still_has_a_batch() -> None:
    with prepared([(0, 1, "a", 0), (1, 0, "a", 1), (0, 2, "a", 2)], splits=(70, 90)) as (data, _):
        readers = ranks(data, 3, batch_size=256)
        batches = [r[0, 0] for r in readers]
        assert sorted(len(batch.example) for batch in batches) == [0, 1, 1]
        assert all(len(batch.shared) == 3 for batch in batches)


# Weights.


@ORDERS
@WORLDS
def test_scale_makes_the_mean_over_ranks_the_global_weighted_mean(
    data: PreparedData, order: str, world_size: int
) -> None:
    weights = {"a": 2.0, "b": 0.5}
    readers = ranks(data, world_size, order=order, action_weights=weights)
    codes = np.array([weights[action.name] for action in data.actions])
    value = np.random.default_rng(0).normal(size=data.num_events)
    for step in range(readers[0].steps):
        batches = [r[0, step] for r in readers]
        losses = [(value[batch.example] * batch.weight.numpy()).sum() * batch.scale for batch in batches]
        examples = np.concatenate([batch.example for batch in batches])
        weight = codes[data.action[data.event_entry[examples]]]
        assert np.mean(losses) == pytest.approx((value[examples] * weight).sum() / weight.sum())


def test_actions_weigh_one_unless_told(data: PreparedData) -> None:
    code = {action.name: place for place, action in enumerate(data.actions)}
    for batch in reader(data, action_weights={"b": 0.0}).batches(0):
        action = data.action[data.event_entry[batch.example.numpy()]]
        assert batch.weight.tolist() == np.where(action == code["b"], 0.0, 1.0).tolist()


def test_the_action_asked_for_and_the_actor_are_hidden_as_often_as_told(data: PreparedData) -> None:
    for chance in (0.0, 0.4, 1.0):
        drawn = reader(data, action_dropout=chance, actor_dropout=chance)
        batches = [drawn[epoch, step] for epoch in range(3) for step in range(drawn.steps)]
        hidden = torch.cat([batch.context.condition == 0 for batch in batches]).double()
        unknown = torch.cat(
            [torch.from_numpy(rows_of(b.context, b.context.actor)) == data.num_train_users for b in batches]
        ).double()
        for share in (hidden, unknown):
            assert share.mean().item() == pytest.approx(chance, abs=4 * (chance * (1 - chance) / len(share)) ** 0.5)
        for batch in batches:
            told = batch.context.condition > 0
            codes = data.action[data.event_entry[batch.example[told].numpy()]]
            assert (batch.context.condition[told].numpy() == 1 + codes).all()


# State and prefetching.


@ORDERS
def test_reading_goes_on_from_epoch_and_step(data: PreparedData, order: str) -> None:
    whole = list(reader(data, order=order).batches(3))
    for step in (0, 1, len(whole) - 1):
        assert_same(reader(data, order=order).batches(3, step), whole[step:])
    assert list(reader(data, order=order).batches(3, len(whole))) == []


def test_workers_change_nothing(data: PreparedData) -> None:
    here = list(reader(data).batches(1))
    for workers in (1, 2):
        assert_same(reader(data, workers=workers).batches(1), here)


def test_reading_leaves_the_random_numbers_of_training_alone(data: PreparedData) -> None:
    before = torch.get_rng_state()
    for _ in reader(data).batches(0):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_travels_as_torchrec_wants(data: PreparedData) -> None:
    batch = reader(data)[0, 0]
    assert isinstance(batch, Pipelineable)
    moved = batch.to(torch.device("meta"), non_blocking=True)
    plain = {"scale", "num_blocks", "num_candidates"}
    assert all(value.is_meta for name, value in tensors(moved).items() if name not in plain)
    with pytest.raises(NotImplementedError):  # reaches the tensors, which on a CPU know no streams
        batch.record_stream(torch.Stream(device="cpu"))


# What is refused.


def test_a_batch_smaller_than_a_chunk_is_refused(data: PreparedData) -> None:
    with pytest.raises(FriendrecError, match=r"batch_size 7 is below the chunk length 8.*--batch-size 8"):
        reader(data, batch_size=7)


def test_data_without_an_example_are_refused(data: PreparedData) -> None:
    history = tuple(dataclasses.replace(action, role="history") for action in data.actions)
    with pytest.raises(FriendrecError, match="no event of the train period has the role target"):
        reader(dataclasses.replace(data, actions=history))
