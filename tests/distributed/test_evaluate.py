"""Evaluation on several ranks: the report that one would write, whatever is scored."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.datasets.prepared import load_prepared
from friendrec.pipeline import evaluate
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.evaluation import scoring
from tests.tokens import publish_random_tokens
from tests.training import joined, publish_data, train_run, train_stu_run

from .harness import Workers


@pytest.fixture(scope="module")
def root(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/data, DIR/run, and DIR/lists as another program might make them."""
    root = tmp_path_factory.mktemp("evaluate")
    users = load_prepared(publish_data(root / "data", users=80, events=900)).user_ids
    rng = np.random.default_rng(0)
    rows = [(user, rank, friend) for user in users for rank, friend in enumerate(rng.choice(users, 12, replace=False))]
    columns = dict(zip(("user_id", "rank", "candidate_id"), map(np.array, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), root / "lists.parquet")
    workers.run(1, train_run, root / "data", root / "run", "--epochs=1", "--workers=0")
    return root


@pytest.fixture(scope="module")
def beside(workers: Workers, root: Path) -> None:
    """DIR/other, to stand beside DIR/run, and DIR/stu-run, whose tokens hold newcomers."""
    data = load_prepared(root / "data")
    workers.run(1, train_run, root / "data", root / "other", "--epochs=1", "--workers=0", "--no-copy-term")
    publish_random_tokens(root / "data", root / "tokens", newcomers=data.num_users - data.num_train_users)
    workers.run(1, train_stu_run, root / "data", root / "tokens", root / "stu-run", "--epochs=1", "--workers=0")


def evaluate_run(options: dict[str, Any]) -> int:
    """How many questions this rank puts to the model."""
    asked = 0
    target_ranks = scoring.target_ranks

    def counted(retriever: Any, queries: Any, targets: Any) -> Any:
        nonlocal asked
        asked += len(targets)
        return target_ranks(retriever, queries, targets)

    with joined(), patch.object(scoring, "BLOCK_QUERIES", 16), patch.object(scoring, "target_ranks", counted):
        evaluate.main(EvaluateOptions(**options))
    return asked


@pytest.mark.parametrize(
    "what",
    ["run", *(pytest.param(what, marks=pytest.mark.long) for what in ("also", "stu", "baselines", "recommendations"))],
)
def test_two_ranks_write_the_report_of_one(
    workers: Workers, root: Path, tmp_path: Path, what: str, request: pytest.FixtureRequest
) -> None:
    if what in ("also", "stu"):
        request.getfixturevalue("beside")
    chosen: dict[str, Any] = {
        "run": {"run": str(root / "run")},
        "also": {"run": str(root / "run"), "also": str(root / "other")},
        "stu": {"run": str(root / "stu-run"), "also": str(root / "other"), "period": "test"},
        "baselines": {"baselines": True},
        "recommendations": {"recommendations": str(root / "lists.parquet")},
    }[what]
    scored = {}
    for ranks in (1, 2):
        options = {"data": str(root / "data"), "out": str(tmp_path / f"{ranks}"), **chosen}
        for run in ("stu-run", "other"):
            (root / run / evaluate.TEST_USES).unlink(missing_ok=True)
        scored[ranks] = workers.run(ranks, evaluate_run, options)
    first, second = ((tmp_path / f"{ranks}" / "metrics.json").read_text() for ranks in (1, 2))
    assert first == second
    one = json.loads(first)
    assert (tmp_path / "1" / "report.html").read_text() == (tmp_path / "2" / "report.html").read_text()
    if what == "run":
        assert sum(scored[2]) == scored[1][0], "no question is asked twice"
        assert min(scored[2]) > 0.25 * scored[1][0]
        assert one["tasks"]["next_contact"]["live"]["recall@10"] > 0
    if what == "stu":
        assert one["beside"].keys() == {"two_tower_mlp", "fusion"}
        assert one["protocol"]["test_uses"] == one["protocol"]["test_uses_beside"] == 1
        assert one["newcomers"]["events"]["next_contact"] > 0
        assert one["newcomers"]["among"]["all"]["next_contact"].keys() > {"chance", "model", "two_tower_mlp"}


@pytest.mark.long
def test_a_use_of_the_test_period_is_one_use_on_two_ranks(workers: Workers, root: Path, tmp_path: Path) -> None:
    options = {
        "data": str(root / "data"), "run": str(root / "run"), "out": str(tmp_path / "report"), "period": "test",
    }  # fmt: skip
    workers.run(2, evaluate_run, options)
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["protocol"]["test_uses"] == 1
    assert len((root / "run" / evaluate.TEST_USES).read_text().splitlines()) == 1
