"""Negatives: a function of the example alone, never what they must not be, and an unbiased stand-in for everyone."""

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from friendrec.datasets.batch import Batch
from friendrec.datasets.config import ContextConfig, ReaderConfig
from friendrec.datasets.negatives import draws
from friendrec.datasets.prepared import PreparedData
from friendrec.datasets.reader import Reader
from friendrec.errors import FriendrecError
from tests.datasets.decode import rows_of
from tests.datasets.twin import Twin, prepared, random_log

CONTEXT = ContextConfig(context_length=4, contacts=2)
ORDERS = ("user", "time")


MODES: dict[str, dict[str, Any]] = {
    "mixed": {"uniform_negatives": 3, "recent_negatives": 4, "popularity_negatives": 2, "shared_negatives": 5},
    "in_batch": {"shared_negatives": 12},
    "uniform": {"uniform_negatives": 6},
    "popularity": {"popularity_negatives": 6},
}


def config(negatives: str = "mixed", **changes: Any) -> ReaderConfig:
    default: dict[str, Any] = {"batch_size": 8, "workers": 0, "negatives": negatives}
    return ReaderConfig(**default | MODES[negatives] | changes)


def epoch_batches(
    data: PreparedData, epoch: int = 0, world_size: int = 1, seed: int = 0, **changes: Any
) -> list[Batch]:
    readers = [Reader(data, CONTEXT, config(**changes), seed, rank, world_size) for rank in range(world_size)]
    return [batch for reader in readers for batch in reader.batches(epoch)]


def own_negatives(batches: list[Batch]) -> dict[int, list[int]]:
    """Rows of each example's own negatives."""
    return {
        example: rows_of(batch.context, batch.negative[place]).tolist()
        for batch in batches
        for place, example in enumerate(batch.example.tolist())
    }


def test_negatives_are_a_function_of_seed_epoch_and_example() -> None:
    with prepared(random_log(1, 9, 90, 70), chunk_length=4) as (data, _):
        reference = own_negatives(epoch_batches(data))
        for order in ORDERS:
            for world_size, batch_size in ((1, 20), (2, 8), (3, 5)):
                batches = epoch_batches(data, world_size=world_size, order=order, batch_size=batch_size)
                assert own_negatives(batches) == reference
        assert own_negatives(epoch_batches(data, epoch=1)) != reference
        assert own_negatives(epoch_batches(data, seed=1)) != reference


@given(
    seed=st.integers(0, 10_000),
    order=st.sampled_from(ORDERS),
    mode=st.sampled_from(sorted(MODES)),
    window=st.sampled_from([0.0, 0.2, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_log_counts_are_those_of_a_brute_force_count(seed: int, order: str, mode: str, window: float) -> None:
    """And +inf for the actor, the target, the contacts that the query names and whoever is not seen yet."""
    with prepared(random_log(seed, 7, 50, 30), chunk_length=4) as (data, twin):
        for batch in epoch_batches(data, order=order, negatives=mode, recent_window=window):
            everywhere = Counter(twin.events[e][1] for e in batch.example.tolist())
            shared = rows_of(batch.context, batch.shared)
            assert set(shared.tolist()) <= everywhere.keys()
            for place, example in enumerate(batch.example.tolist()):
                expected = expected_counts(
                    twin, example, round(window * data.num_train_events), everywhere, config(mode)
                )
                own = rows_of(batch.context, batch.negative[place])
                for rows, logs in ((own, batch.negative_log_count), (shared, batch.shared_log_count)):
                    counts = [math.log(expected[row]) if expected.get(row) else math.inf for row in rows]
                    np.testing.assert_allclose(logs[place], counts, rtol=1e-5, atol=1e-6)


def expected_counts(twin: Twin, example: int, window: int, targets: Counter, uses: ReaderConfig) -> dict[int, float]:
    """How often each user who may be a negative of an example is drawn from all sources together."""
    actor, target, _, now = twin.events[example]
    past = [event for event in twin.events if event[3] < now]
    seen = {user for event in past for user in event[:2]}
    oldest = past[-max(window, 1) :][0][3] if past else now
    recent = [event[1] for event in past if event[3] >= oldest]  # a window cuts no timestamp
    received = [event[1] for event in past]
    counts = uses.negative_counts
    return {
        user: counts.uniform / len(seen)
        + counts.recent * recent.count(user) / len(recent)
        + counts.popularity * received.count(user) / len(received)
        + counts.shared * targets[user] / targets.total()
        for user in seen - {actor, target, *twin.contacts(actor, now, CONTEXT.contacts)}
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ORDERS)
def test_inverse_counts_make_an_unbiased_estimate_of_the_sum_over_everyone(order: str, mode: str) -> None:
    """E[Σ exp(s) / count] = Σ exp(s) over all that can be drawn and may be negatives, for every example.

    Over 150 epochs. Only popularity and in-batch negatives alone leave anybody out: who has received nothing yet, and
    who is no target of the batch.
    """
    epochs = 150
    scores = np.random.default_rng(5).normal(0, 1.5, 8)
    uses = config(mode, order=order, recent_window=0.2)
    with prepared(random_log(2, 8, 60, 40), chunk_length=8, splits=(70, 90)) as (data, twin):
        reader = Reader(data, CONTEXT, uses, seed=3)
        errors = np.full((epochs, data.num_train_events), np.nan)
        for key in ((epoch, step) for epoch in range(epochs) for step in range(reader.steps)):
            batch = reader[key]
            shared = np.broadcast_to(rows_of(batch.context, batch.shared), batch.shared_log_count.shape)
            drawn = np.concatenate([rows_of(batch.context, batch.negative), shared], axis=1)
            logs = np.concatenate([batch.negative_log_count, batch.shared_log_count], axis=1)
            targets = Counter(twin.events[e][1] for e in batch.example.tolist())
            for place, example in enumerate(batch.example.tolist()):
                counts = expected_counts(twin, example, 1, targets, uses)
                drawable = [user for user, count in counts.items() if count]
                estimate = np.exp(scores[drawn[place]] - logs[place]).sum()
                errors[key[0], example] = estimate - np.exp(scores[drawable]).sum()
        assert (np.abs(errors).max(0) > 1e-3).sum() > 20  # the others know nobody: exactly 0
        # In standard errors: of each example, and of their mean an epoch, as examples of a batch share draws.
        assert np.abs(deviation(errors)).max() < 5
        assert abs(deviation(errors.mean(1, keepdims=True))[0]) < 4


@pytest.mark.parametrize("mode", MODES)
def test_without_logq_only_the_masks_remain(mode: str) -> None:
    with prepared(random_log(1, 9, 90, 70), chunk_length=4) as (data, _):
        corrected, plain = (epoch_batches(data, negatives=mode, logq=logq) for logq in (True, False))
        masked = 0
        for with_logq, without in zip(corrected, plain, strict=True):
            for name in ("negative_log_count", "shared_log_count"):
                logs = getattr(with_logq, name)
                expected = torch.where(logs.isinf(), logs, torch.zeros(()))
                assert torch.equal(getattr(without, name), expected)
                masked += int(logs.isinf().sum())
        assert masked > 0


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_draws_as_many_as_told_from_its_sources_alone(mode: str) -> None:
    told = MODES[mode]
    own = sum(count for name, count in told.items() if name != "shared_negatives")
    with prepared(random_log(1, 9, 90, 70), chunk_length=4) as (data, _):
        for batch in epoch_batches(data, negatives=mode):
            assert batch.negative.shape == (len(batch.example), own)
            assert len(batch.shared) == told.get("shared_negatives", 0)


def test_counts_left_open_are_those_of_the_mode() -> None:
    totals = {
        mode: {name: count for name, count in asdict(ReaderConfig(negatives=mode).negative_counts).items() if count}
        for mode in ("mixed", "in_batch", "uniform", "popularity")
    }
    assert totals == {
        "mixed": {"uniform": 32, "recent": 32, "shared": 64},
        "in_batch": {"shared": 128},
        "uniform": {"uniform": 128},
        "popularity": {"popularity": 128},
    }


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"negatives": "in_batch", "uniform_negatives": 4}, "in_batch draws no uniform_negatives: leave that count"),
        ({"negatives": "uniform", "shared_negatives": 4}, "uniform draws no shared_negatives"),
        ({"negatives": "popularity", "recent_negatives": 1}, "popularity draws no recent_negatives"),
        ({"negatives": "popularity", "popularity_negatives": 0}, "needs popularity_negatives of at least 1"),
        ({"negatives": "in_batch", "shared_negatives": 0}, "needs shared_negatives of at least 1"),
        ({"uniform_negatives": 0}, "mixed negatives need uniform_negatives of at least 1"),
        ({"recent_negatives": -1}, "at least 0"),
    ],
)
def test_counts_that_contradict_the_mode_are_refused(told: dict[str, Any], said: str) -> None:
    with pytest.raises(FriendrecError, match=said):
        ReaderConfig(**told)


def deviation(samples: np.ndarray) -> np.ndarray:
    """Mean over epochs in units of its standard error, `[epochs, n]` to `[n]`."""
    return samples.mean(0) / (samples.std(0) / math.sqrt(len(samples)) + 1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_draws_depend_on_seed_epoch_stream_and_counter_and_are_uniform(seed: int) -> None:
    counters = np.arange(500)
    drawn = draws(seed, 0, 0, counters, 8)
    assert (drawn >= 0).all()
    assert (draws(seed, 0, 0, counters[::-1].copy(), 8) == drawn[::-1]).all()
    assert (draws(seed, 0, 0, counters, 3) == drawn[:, :3]).all()
    for others in (draws(seed + 1, 0, 0, counters, 8), draws(seed, 1, 0, counters, 8), draws(seed, 0, 1, counters, 8)):
        assert not (others == drawn).any()
    assert len(np.unique(drawn)) == drawn.size
    counts = np.bincount(drawn.ravel() % 10, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
