"""As many lists as the share holds, and no more."""

from pathlib import Path

import numpy as np
import pytest

from friendrec.pipeline.evaluation import reduced
from friendrec.pipeline.evaluation.contenders import Clusters, FaissLists, k_means
from friendrec.pipeline.evaluation.reduced import DEPTH, Lists, Searches, choose
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.protocol import Queries

NUM, DIM, LISTS = 300, 5, 9


@pytest.mark.parametrize("kind", ["k-means", "clusters"])
def test_as_many_lists_as_the_share_holds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced, "SHARES", {"100 %": 1.0, "half": 0.5, "a third": 0.33, "nothing": 0.001})
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((NUM, DIM), np.float32)
    queries = Queries.dense(rng.standard_normal((40, DIM), np.float32))
    if kind == "k-means":
        lists: Lists = FaissLists.flat(vectors, *k_means("plain", vectors, LISTS))
    else:
        lists = Clusters.of(vectors, np.arange(NUM), Centroids(vectors[:LISTS].copy(), 3))
    work = [lists.compared(queries, DEPTH, n) / NUM for n in range(1, LISTS + 1)]
    nprobe, least = choose(lists, queries, NUM)
    assert least == work[0]
    assert nprobe.tolist() == [0, *(sum(share <= most for share in work) for most in (0.5, 0.33)), 0]
    assert nprobe[1] > nprobe[2] > 0


def test_searches_are_stored_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    saved = Searches(rng.random((3, 4)), np.array([1, 0.1, np.nan]), np.array([0, 3, 0]), np.array(0.02), np.arange(4))
    saved.save(tmp_path)
    loaded = Searches.load(tmp_path)
    for name, values in vars(saved).items():
        np.testing.assert_array_equal(getattr(loaded, name), values)
