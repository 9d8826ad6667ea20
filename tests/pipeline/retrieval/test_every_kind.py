"""A trained run with an index of every kind: evaluate and recommend as with none, as far as the kind knows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from friendrec.pipeline import evaluate, export, index, recommend
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.export import ExportOptions
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.recommend import RecommendOptions
from tests.training import publish_data, train_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its embeddings, and what it is worth without an index."""
    root = tmp_path_factory.mktemp("every-kind")
    publish_data(root / "data")
    train_run(root / "data", root / "run", "--epochs=1", "--workers=0", "--clusters=residual")
    export.main(ExportOptions(run=str(root / "run"), data=str(root / "data"), out=str(root / "embeddings")))
    evaluate.main(EvaluateOptions(run=str(root / "run"), data=str(root / "data"), out=str(root / "report")))
    return root


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("exact", marks=pytest.mark.long),
        pytest.param("ivf", marks=pytest.mark.long),
        pytest.param("hnsw", marks=pytest.mark.long),
        "clusters",
        pytest.param("milvus", marks=pytest.mark.long),
    ],
)
def test_evaluate_and_recommend_with_an_index(world: Path, tmp_path: Path, kind: Any) -> None:
    run, data, built = str(world / "run"), str(world / "data"), str(tmp_path / "index")
    index.main(IndexOptions(embeddings=str(world / "embeddings"), kind=kind, out=built))
    evaluate.main(EvaluateOptions(run=run, data=data, index=built, out=str(tmp_path / "report")))
    recommend.main(RecommendOptions(run=run, data=data, index=built, k=10, out=str(tmp_path / "recs")))
    metrics, expected = (json.loads((path / "report" / "metrics.json").read_text()) for path in (tmp_path, world))
    full = kind == "exact"
    assert metrics["model"].get("ranked_until") == (None if full else 100)
    assert (
        "finds, and a person beyond them counts as missed" in (tmp_path / "report" / "report.html").read_text()
    ) != full
    for task, figures in expected["tasks"].items():
        for state in ("live", "frozen"):
            own = metrics["tasks"][task][state]
            assert ("mrr" in own and "mean_rank" in own) == full
            for metric in ("recall@10", "recall@50", "recall@100", "ndcg@10"):
                assert own[metric] == pytest.approx(
                    figures[state][metric], abs=0.03 if kind in ("ivf", "hnsw", "clusters") else 1e-6
                )
    recommended = pq.read_table(tmp_path / "recs" / "part-0.parquet")
    users = pq.read_table(world / "data" / "vocabulary").num_rows
    assert np.bincount(recommended["rank"].to_numpy()).tolist() == [0, *[users] * 10], "ten for everybody"
