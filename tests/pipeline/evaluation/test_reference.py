"""The concept repository's protocol, by hand, by loops, and by what its figures must be at chance."""

import numpy as np
import pytest
import torch
from torch.utils.data import random_split as torch_split

from friendrec.pipeline.evaluation.reference import (
    batch_metrics,
    candidates,
    prefixes,
    random_split,
    reference_metrics,
)
from tests.synthetic import prepared_from_events


def test_a_batch_by_hand() -> None:
    targets, drawn = np.array([7, 4, 7]), np.array([[5, 1, 7], [4, 2, 3], [1, 2, 3]])
    scores = np.array([
        [0.5, 0.9, 0.5, 0.4, 0.3, 0.5],  # right: the drawn 7 and the batch's 4 do not count; rank 4 of the six
        [0.8, 0.6, 0.8, 0.6, 0.7, 0.1],  # wrong: the drawn 2 is higher; rank 5
        [0.2, 0.1, 0.2, 0.1, 0.0, 0.1],  # right; rank 2, with its duplicate
    ])  # fmt: skip
    accuracy, mrr, rank = batch_metrics(scores, targets, drawn)
    assert accuracy == pytest.approx(2 / 3)
    assert rank == pytest.approx((4 + 5 + 2) / 3)
    assert mrr == pytest.approx((1 / 4 + 1 / 5 + 1 / 2) / 3)


def test_a_batch_against_loops() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        targets, drawn = rng.integers(0, 12, 8), rng.integers(0, 12, (8, 3))
        users = candidates(targets, drawn)
        scores = rng.integers(0, 6, (8, 12))[np.arange(8)[:, None], users].astype(np.float32)
        right, ranks = [], []
        for row, target in enumerate(targets):
            pool = [scores[row, j] for j in range(11) if (users[row, j] == target) == (j < 8)]
            right.append(scores[row, row] == max(pool))
            ranks.append(sum(score >= scores[row, row] for score in scores[row]))
        expected = np.mean(right), np.mean(1 / np.array(ranks)), np.mean(ranks)
        assert batch_metrics(scores, targets, drawn) == pytest.approx(expected)


def test_chance_is_a_quarter_and_half_of_the_list() -> None:
    """Among itself and three drawn, and among 35."""
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 10**6, 3200)
    score = lambda rows, users: rng.random(users.shape)  # noqa: E731
    figures = reference_metrics(score, np.arange(3200), targets, 10**6, seed=0)
    assert figures["accuracy"] == pytest.approx(0.25, abs=0.03)
    assert figures["mean_rank"] == pytest.approx(18, abs=0.6)
    assert figures["mrr"] == pytest.approx((1 / np.arange(1, 36)).mean(), abs=0.015)


def test_figures_average_over_batches() -> None:
    """A last batch of one counts as much as a full one."""
    targets = np.arange(33)
    score = lambda rows, users: np.where(rows[:, None] == 32, users == users[:, :1], users != 0).astype(float)  # noqa: E731
    figures = reference_metrics(score, np.arange(33), targets, 10**9, seed=0)
    assert figures["mean_rank"] == pytest.approx(((34 * 31 + 35) / 32 + 1) / 2)


def test_examples_are_all_prefixes_split_at_random() -> None:
    data = prepared_from_events([0, 1, 0, 0, 2, 1], [1, 0, 2, 1, 0, 2], None, np.arange(6))
    entries = prefixes(data)
    assert data.partner[entries].tolist() == [2, 1, 2]
    assert data.timestamp[entries].tolist() == [2, 3, 5]
    split = random_split(105, seed=3)
    drawn = torch_split(range(105), [84, 10, 11], torch.Generator().manual_seed(3))  # type: ignore[arg-type, var-annotated]
    assert [part.tolist() for part in split] == [list(part.indices) for part in drawn]
