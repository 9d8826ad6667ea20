"""Ranking metrics of one relevant candidate an event, from its rank alone.

A rank is 1 + higher + half of the tied, so it may end in .5; it counts as within the first k where rank ≤ k.
"""

import numpy as np
from numpy.typing import NDArray

CUTOFFS = (10, 50, 100)


def gains(ranks: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What each event `[E]` adds to each metric; the metric is their mean."""
    hits = {f"recall@{k}": (ranks <= k).astype(np.float64) for k in CUTOFFS}
    ndcg = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)
    return {**hits, "ndcg@10": ndcg, "mrr": 1 / ranks, "mean_rank": ranks}


def summary(ranks: NDArray[np.float64], until: int | None = None) -> dict[str, float]:
    """The mean of every metric; empty where there is no event.

    Ranks may be known `until` some place only and be infinite beyond it: what needs more than that is left out.
    """
    means = {name: float(gain.mean()) for name, gain in gains(ranks).items()} if len(ranks) else {}
    beyond = {f"recall@{k}" for k in CUTOFFS if k > until} | {"mrr", "mean_rank"} if until is not None else set()
    return {name: mean for name, mean in means.items() if name not in beyond}


def recall_curve(ranks: NDArray[np.float64], until: int = 100) -> NDArray[np.float64]:
    """Recall@k for k = 1..until, `[until]`."""
    within = np.searchsorted(np.sort(ranks), np.arange(1, until + 1), side="right")
    return within / max(len(ranks), 1)
