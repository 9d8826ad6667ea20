"""Metrics against their definitions and against a ranking library; intervals against a slow bootstrap."""

import numpy as np
import pytest
import torch

from friendrec.pipeline.evaluation.intervals import bootstrap_means, interval
from friendrec.pipeline.evaluation.metrics import recall_curve, summary


@pytest.fixture
def ranks() -> np.ndarray:
    return np.random.default_rng(0).geometric(0.03, 400).astype(np.float64)


def test_metrics_equal_three_line_definitions(ranks: np.ndarray) -> None:
    fractional = ranks + np.random.default_rng(1).integers(0, 2, len(ranks)) / 2
    found = summary(fractional)
    for k in (10, 50, 100):
        assert found[f"recall@{k}"] == pytest.approx(sum(r <= k for r in fractional) / len(fractional))
    assert found["ndcg@10"] == pytest.approx(np.mean([1 / np.log2(1 + r) if r <= 10 else 0 for r in fractional]))
    assert found["mrr"] == pytest.approx(np.mean([1 / r for r in fractional]))
    assert found["mean_rank"] == pytest.approx(sum(fractional) / len(fractional))
    assert recall_curve(fractional).tolist() == pytest.approx([np.mean(fractional <= k) for k in range(1, 101)])
    assert summary(ranks[:0]) == {}


def test_metrics_equal_torchmetrics(ranks: np.ndarray) -> None:
    from torchmetrics.functional import retrieval

    theirs = []
    for rank in ranks.astype(int):
        scores, relevant = -torch.arange(rank + 29.0), torch.arange(rank + 29) == rank - 1
        recalls = {f"recall@{k}": retrieval.retrieval_recall(scores, relevant, k) for k in (10, 50, 100)}
        ndcg = retrieval.retrieval_normalized_dcg(scores, relevant, 10)
        theirs.append({**recalls, "ndcg@10": ndcg, "mrr": retrieval.retrieval_reciprocal_rank(scores, relevant)})
    ours = summary(ranks)
    for name in theirs[0]:
        assert ours[name] == pytest.approx(np.mean([float(query[name]) for query in theirs]))


@pytest.mark.long  # ranx compiles for half a minute
def test_metrics_equal_ranx(ranks: np.ndarray) -> None:
    from ranx import Qrels, Run, evaluate

    qrels = Qrels({str(q): {"target": 1} for q in range(len(ranks))})
    run = {
        str(q): {("target" if place == rank else f"other{place}"): 1.0 / place for place in range(1, int(rank) + 30)}
        for q, rank in enumerate(ranks)
    }
    theirs = evaluate(qrels, Run(run), ["recall@10", "recall@50", "recall@100", "ndcg@10", "mrr"])
    ours = summary(ranks)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs)


def test_bootstrap_equals_drawing_actors_one_by_one() -> None:
    rng = np.random.default_rng(2)
    actors, values = rng.integers(0, 30, 300), rng.random((300, 2))
    means = bootstrap_means(values, actors, replicates=4000)
    slow = []
    for _ in range(1500):
        drawn = np.concatenate([np.flatnonzero(actors == a) for a in rng.choice(np.unique(actors), 30)])
        slow.append(values[drawn].mean(axis=0))
    for column in range(2):
        fast_ends, slow_ends = interval(means[:, column]), interval(np.array(slow)[:, column])
        assert fast_ends == pytest.approx(slow_ends, abs=0.01)
    assert np.array_equal(means, bootstrap_means(values, actors, replicates=4000))


def test_columns_are_paired_and_actors_hang_together() -> None:
    rng = np.random.default_rng(3)
    value = rng.random(500)
    means = bootstrap_means(np.stack([value, value + 0.25], axis=1), rng.integers(0, 50, 500))
    assert np.ptp(means[:, 1] - means[:, 0]) == pytest.approx(0, abs=1e-12)
    alone, together = np.arange(500), np.repeat(np.arange(10), 50)
    by_user = np.repeat(rng.random(10), 50)[:, None]
    widths = [np.ptp(interval(bootstrap_means(by_user, who)[:, 0])) for who in (alone, together)]
    assert widths[1] > 3 * widths[0]
