"""The `evaluate` verb from published data to metrics.json and report.html."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from friendrec.datasets.prepared import load_prepared
from friendrec.errors import FriendrecError
from friendrec.pipeline import evaluate
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.evaluation.baselines import BASELINES
from friendrec.pipeline.evaluation.fitted import FITTED_BASELINES, missing_baselines
from friendrec.pipeline.evaluation.slices import HISTORY_BINS
from friendrec.pipeline.evaluation.tasks import STATES, TASKS
from friendrec.pipeline.publish import publish
from tests.pipeline.evaluation import null
from tests.pipeline.evaluation.test_scoring import RecentAnswers
from tests.synthetic import prepared_from_events


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/data and DIR/run as the earlier stages leave them."""
    root = tmp_path_factory.mktemp("published")
    with publish(root / "data", kind="data", options=None, inputs={}) as attempt:
        prepared_from_events(*null.random_log(0, users=30, events=800, moments=300), path=attempt)
    said = {"preset": "two_tower_mlp", "parameters": 12345, "train_seconds": 1.5, "examples_per_second": 800}
    with publish(root / "run", kind="run", options=None, inputs={"data": root / "data"}, extra=said) as attempt:
        lines: list[dict[str, Any]] = [{"step": step, "epoch": 0, "loss": 5 - step / 10} for step in range(1, 30)]
        lines.append({"step": 30, "epoch": 0, "validation": {"new_link": {"recall@10": 0.3}}})
        (attempt / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def with_model(published: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, the run opening as a stand-in model."""
    model = RecentAnswers(load_prepared(published / "data"), [])
    monkeypatch.setattr(evaluate, "_open", lambda options, run: model)
    return published


def evaluated(root: Path, out: Path, **options: Any) -> dict[str, Any]:
    evaluate.main(EvaluateOptions(data=str(root / "data"), out=str(out), **options))
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def test_metrics_follow_the_contract(with_model: Path, tmp_path: Path) -> None:
    metrics = evaluated(with_model, tmp_path / "report", run=str(with_model / "run"), baselines=True)
    protocol = metrics["protocol"]
    assert protocol["name"] == "temporal"
    assert protocol["period"] == "validation"
    assert protocol["candidates"] == 30
    assert protocol["train_until"].startswith("1970-")
    assert protocol["events"] == protocol["uncovered"] + metrics["tasks"]["next_contact"]["events"]
    names = {"recall@10", "recall@10_ci", "recall@50", "recall@100", "ndcg@10", "mrr", "mean_rank"}
    assert set(metrics["baselines"]) == {*BASELINES, *FITTED_BASELINES} - missing_baselines().keys()
    for task in TASKS:
        for state in STATES:
            own = metrics["tasks"][task][state]
            assert set(own) == names | {"best_baseline"}
            assert own["recall@10_ci"][0] <= own["recall@10"] <= own["recall@10_ci"][1]
            best = own["best_baseline"]
            recalls = {
                name: scored[task][state]["recall@10"]
                for name, scored in metrics["baselines"].items()
                if state == "frozen" or name not in FITTED_BASELINES
            }
            assert recalls[best["name"]] == max(recalls.values())
            assert best["difference"] == pytest.approx(own["recall@10"] - max(recalls.values()))
            assert best["difference_ci"][0] <= best["difference"] <= best["difference_ci"][1]
            bins = [metrics["slices"]["history_length"][name][task][state] for name in HISTORY_BINS]
            assert sum(figures["events"] for figures in bins) == metrics["tasks"][task]["events"]
            weighted = sum(figures["events"] * figures.get("recall@10", 0) for figures in bins)
            assert weighted / metrics["tasks"][task]["events"] == pytest.approx(own["recall@10"])
    assert metrics["model"]["preset"] == "two_tower_mlp"
    assert metrics["model"]["parameters"] == 12345


def test_report_is_one_file_that_asks_the_network_for_nothing(with_model: Path, tmp_path: Path) -> None:
    evaluated(with_model, tmp_path / "report", run=str(with_model / "run"), baselines=True)
    html = (tmp_path / "report" / "report.html").read_text()
    assert html.count('src="data:image/svg+xml;base64,') == 8
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "@import" not in html
    assert "url(" not in html
    for words in ("What was measured", "two_tower_mlp", "Unprompted link", "last_interaction+last_active", "frozen"):
        assert words in html


def test_each_use_of_the_test_period_is_counted_and_shown(with_model: Path, tmp_path: Path) -> None:
    run = str(with_model / "run")
    assert evaluated(with_model, tmp_path / "a", run=run)["protocol"]["test_uses"] == 0
    for use in (1, 2):
        out = tmp_path / f"test{use}"
        assert evaluated(with_model, out, run=run, period="test")["protocol"]["test_uses"] == use
        assert f"use {use} of the test period" in (out / "report.html").read_text()
    evaluated(with_model, tmp_path / "test2", run=run, period="test")
    uses = (with_model / "run" / evaluate.TEST_USES).read_text().splitlines()
    assert len(uses) == 2, "a report that is there already is no use"


def test_baselines_need_no_run_and_a_model_no_baselines(with_model: Path, tmp_path: Path) -> None:
    metrics = evaluated(with_model, tmp_path / "baselines", baselines=True)
    assert metrics["model"] == {}
    assert metrics["protocol"]["test_uses"] is None
    assert metrics["tasks"]["reply"]["live"] == {"best_baseline": {"name": "reciprocity"}}
    metrics = evaluated(with_model, tmp_path / "model", run=str(with_model / "run"))
    assert metrics["baselines"] == {}
    assert "best_baseline" not in metrics["tasks"]["reply"]["live"]
    assert "recall@10" in metrics["tasks"]["reply"]["live"]


@pytest.mark.long
def test_two_runs_stand_side_by_side(with_model: Path, tmp_path: Path) -> None:
    """The stand-in beside itself: equal lines. Presets are the same, so the other goes by its directory."""
    with publish(with_model / "other", kind="run", options=None, inputs={}, extra={"preset": "two_tower_mlp"}):
        pass
    both = {"run": str(with_model / "run"), "also": str(with_model / "other")}
    metrics = evaluated(with_model, tmp_path / "report", **both)
    assert list(metrics["beside"]) == ["other", "fusion"]
    for task in TASKS:
        for state in STATES:
            own = metrics["tasks"][task][state]
            assert metrics["beside"]["other"][task][state]["recall@10"] == own["recall@10"]
            assert metrics["beside"]["fusion"][task][state]["better"] == "model"
    html = (tmp_path / "report" / "report.html").read_text()
    assert "Side by side" in html and "fusion, frozen" in html
    for use in (1, 2):
        protocol = evaluated(with_model, tmp_path / f"test{use}", period="test", **both)["protocol"]
        assert protocol["test_uses_beside"] == use
        assert protocol["test_uses"] == len((with_model / "run" / evaluate.TEST_USES).read_text().splitlines())
    assert len((with_model / "other" / evaluate.TEST_USES).read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to evaluate"),
        ({"baselines": True, "index": "i"}, "--run RUN"),
        ({"baselines": True, "also": "other"}, "--also is scored beside a run"),
        ({"run": "gone"}, "gone"),
    ],
)
def test_mistakes_are_told(published: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FriendrecError, match=message):
        evaluated(published, tmp_path / "report", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_without_replies_is_still_a_report(tmp_path: Path) -> None:
    """Everyone writes to their right-hand neighbour only: no reply, and no new link after the train period."""
    actor = np.tile(np.arange(10), 20)
    with publish(tmp_path / "data", kind="data", options=None, inputs={}) as attempt:
        prepared_from_events(actor, (actor + 1) % 10, None, np.arange(200), path=attempt)
    metrics = evaluated(tmp_path, tmp_path / "report", baselines=True)
    assert metrics["tasks"]["reply"]["events"] == 0
    assert metrics["baselines"]["recent_contacts"]["next_contact"]["live"]["recall@10"] == 1
    assert metrics["baselines"]["recent_contacts"]["reply"]["live"] == {}
