"""Negatives: a function of the example alone, never what they must not be, and an unbiased stand-in for everyone."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from friendrec.datasets.batch import Batch
from friendrec.datasets.config import ContextConfig, ReaderConfig
from friendrec.datasets.negatives import draws
from friendrec.datasets.prepared import PreparedData
from friendrec.datasets.reader import Reader
from tests.datasets.decode import rows_of
from tests.datasets.twin import Twin, prepared, random_log

CONTEXT = ContextConfig(context_length=4, contacts=2)
ORDERS = ("user", "time")


def config(**changes: Any) -> ReaderConfig:
    default: dict[str, Any] = {
        "batch_size": 8,
        "uniform_negatives": 3,
        "recent_negatives": 4,
        "shared_negatives": 5,
        "workers": 0,
    }
    return ReaderConfig(**default | changes)


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


@given(seed=st.integers(0, 10_000), order=st.sampled_from(ORDERS), window=st.sampled_from([0.0, 0.2, 1.0]))
@settings(max_examples=25, deadline=None)
def test_log_counts_are_those_of_a_brute_force_count(seed: int, order: str, window: float) -> None:
    """And +inf for the actor, the target, the contacts that the query names and whoever is not seen yet."""
    with prepared(random_log(seed, 7, 50, 30), chunk_length=4) as (data, twin):
        for batch in epoch_batches(data, order=order, recent_window=window):
            everywhere = Counter(twin.events[e][1] for e in batch.example.tolist())
            shared = rows_of(batch.context, batch.shared)
            assert set(shared.tolist()) <= everywhere.keys()
            for place, example in enumerate(batch.example.tolist()):
                expected = expected_counts(twin, example, round(window * data.num_train_events), everywhere)
                own = rows_of(batch.context, batch.negative[place])
                for rows, logs in ((own, batch.negative_log_count), (shared, batch.shared_log_count)):
                    counts = [math.log(expected[row]) if row in expected else math.inf for row in rows]
                    np.testing.assert_allclose(logs[place], counts, rtol=1e-5, atol=1e-6)


def expected_counts(twin: Twin, example: int, window: int, targets: Counter) -> dict[int, float]:
    """How often each user who may be a negative of an example is drawn from all sources together."""
    actor, target, _, now = twin.events[example]
    past = [event for event in twin.events if event[3] < now]
    seen = {user for event in past for user in event[:2]}
    oldest = past[-max(window, 1) :][0][3] if past else now
    recent = [event[1] for event in past if event[3] >= oldest]  # a window cuts no timestamp
    uses = config()
    return {
        user: uses.uniform_negatives / len(seen)
        + uses.recent_negatives * recent.count(user) / len(recent)
        + uses.shared_negatives * targets[user] / targets.total()
        for user in seen - {actor, target, *twin.contacts(actor, now, CONTEXT.contacts)}
    }


@pytest.mark.parametrize("order", ORDERS)
def test_inverse_counts_make_an_unbiased_estimate_of_the_sum_over_everyone(order: str) -> None:
    """E[Σ exp(s) / count] = Σ exp(s) over all users that may be negatives, for every example, over 150 epochs."""
    epochs = 150
    scores = np.random.default_rng(5).normal(0, 1.5, 8)
    with prepared(random_log(2, 8, 60, 40), chunk_length=8, splits=(70, 90)) as (data, twin):
        reader = Reader(data, CONTEXT, config(order=order, recent_window=0.2), seed=3)
        errors = np.full((epochs, data.num_train_events), np.nan)
        for key in ((epoch, step) for epoch in range(epochs) for step in range(reader.steps)):
            batch = reader[key]
            shared = np.broadcast_to(rows_of(batch.context, batch.shared), batch.shared_log_count.shape)
            drawn = np.concatenate([rows_of(batch.context, batch.negative), shared], axis=1)
            logs = np.concatenate([batch.negative_log_count, batch.shared_log_count], axis=1)
            sums = np.exp(scores[drawn] - logs).sum(1)
            errors[key[0], batch.example] = sums
        for example in range(data.num_train_events):
            allowed = list(expected_counts(twin, example, 1, Counter({-1: 1})))
            errors[:, example] -= np.exp(scores[allowed]).sum()
        assert (np.abs(errors).max(0) > 1e-3).sum() > 30  # the others know nobody: exactly 0
        # In standard errors: of each example, and of their mean an epoch, as examples of a batch share draws.
        assert np.abs(deviation(errors)).max() < 5
        assert abs(deviation(errors.mean(1, keepdims=True))[0]) < 4


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
