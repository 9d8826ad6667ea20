"""The concept repository's table: what is trained on, what a known answer scores, and that only the leak scores."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from friendrec.datasets.packing import Packer
from friendrec.datasets.prepared import PreparedData, load_prepared
from friendrec.errors import FriendrecError
from friendrec.models.config import TwoTowerConfig
from friendrec.pipeline import evaluate
from friendrec.pipeline.config import RunConfig, TrainingConfig
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.evaluation import reference_model, reference_table
from friendrec.pipeline.evaluation.reference import prefixes
from friendrec.pipeline.evaluation.reference_model import Examples, ReferenceModel
from friendrec.pipeline.evaluation.reference_table import PUBLISHED, judge, settings
from friendrec.pipeline.inference import encode_queries, encode_targets
from friendrec.pipeline.prepare import PrepareOptions
from friendrec.pipeline.prepare import main as prepare
from friendrec.pipeline.publish import publish
from tests.synthetic import prepared_from_events

USERS, EVENTS = 150, 2000
SMALL = RunConfig(preset="small", model=TwoTowerConfig(dim=32, num_heads=2, hidden=32, copy_term=False))


def random_events(seed: int) -> tuple[np.ndarray, np.ndarray, None, np.ndarray]:
    """Who does what to whom is drawn uniformly: nothing can be known before it happens."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, USERS, EVENTS),
        rng.integers(0, USERS, EVENTS),
        None,
        np.sort(rng.integers(1, 10**12, EVENTS)),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """A random log whose users all count as train users."""
    prepared = prepared_from_events(*random_events(0), path=tmp_path_factory.mktemp("data"))
    return dataclasses.replace(prepared, num_train_users=prepared.num_users)


@pytest.fixture(scope="module")
def examples(data: PreparedData) -> Examples:
    return Examples.of(data)


def small_model(data: PreparedData, examples: Examples, config: RunConfig = SMALL) -> ReferenceModel:
    return ReferenceModel(config, Packer(data, config.context), examples)


def test_what_is_trained_on(data: PreparedData, examples: Examples) -> None:
    found = settings(data, examples, seed=3)
    for setting in found.values():
        assert sorted(np.concatenate(setting.split)) == list(range(len(examples.actor)))
        assert (np.diff(setting.train) > 0).all()
    assert not set(found["own_targets"].train) & set(found["own_targets"].split.test)
    by_time = found["temporal_split"]
    assert sorted(by_time.split.train) == by_time.train.tolist()
    first, second, third = (examples.time[part] for part in by_time.split)
    assert first.max() <= second.min() and second.max() <= third.min()
    steps = set()
    for example in found["leaky"].split.train:
        begin = np.searchsorted(examples.actor, examples.actor[example])
        steps.update(range(begin, example + 1))
    assert found["leaky"].train.tolist() == sorted(steps)
    assert len(steps & set(found["leaky"].split.test)) > 0.6 * len(found["leaky"].split.test)


def test_examples_are_what_prefixes_point_at(data: PreparedData, examples: Examples) -> None:
    expected = [
        (u, data.partner[i], data.timestamp[i])
        for u in range(data.num_users)
        for i in [i for i in range(data.offsets[u], data.offsets[u + 1]) if data.direction[i] == 0][1:]
    ]
    assert list(zip(examples.actor, examples.target, examples.time, strict=True)) == expected
    assert len(prefixes(data)) == len(expected)


def test_a_known_answer_scores_all_and_a_constant_the_worst_rank() -> None:
    targets = np.arange(64)
    answer = np.eye(64, 20_000, dtype=np.float32)
    assert judge(answer, targets, seed=0) == {"accuracy": 1.0, "mrr": 1.0, "mean_rank": 1.0, "recall@10": 1.0}
    constant = judge(np.zeros_like(answer), targets, seed=0)
    assert (constant["mean_rank"], constant["recall@10"]) == (35.0, 0.0)
    assert constant["mrr"] == pytest.approx(1 / 35)


def test_scores_are_those_of_the_run_s_own_encoders(data: PreparedData, examples: Examples) -> None:
    model = small_model(data, examples)
    rows = np.random.default_rng(0).permutation(len(examples.actor))[:200]
    queries = encode_queries(model.model, model.packer, examples.actor[rows], examples.time[rows]).vector
    expected = queries @ encode_targets(model.model, model.packer, np.arange(data.num_users)).T
    np.testing.assert_allclose(model.scores(rows), expected, rtol=1e-4, atol=1e-4)


def test_parameters_are_all_weights_tables_included(data: PreparedData, examples: Examples) -> None:
    model = small_model(data, examples)
    rows = (USERS + 1) + 2 + 2  # users and the unknown one, kinds of event, conditions
    dense = [p.numel() for name, p in model.model.named_parameters() if not name.startswith("lookup.")]
    assert model.parameters == rows * 32 + sum(dense) == sum(v.numel() for v in model.model.state_dict().values())


def test_the_best_epoch_is_kept_and_training_stops_early(
    data: PreparedData, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_model, "EPOCHS", 8)
    model, values, seen, advanced = small_model(data, examples), iter([1.0, 3.0, 2.0, 2.0, 2.0, 9.0]), [], []

    def validate() -> float:
        seen.append(model.scores(np.arange(20)))
        return next(values)

    model.fit(np.arange(300), validate, lambda: advanced.append(1))
    assert (len(seen), len(advanced)) == (5, 8)
    assert not np.array_equal(seen[1], seen[4])
    np.testing.assert_array_equal(model.scores(np.arange(20)), seen[1])


def test_the_seed_decides(data: PreparedData, examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_model, "EPOCHS", 2)
    rows, scores = np.arange(300), []
    for seed in (5, 5, 6):
        config = dataclasses.replace(SMALL, training=TrainingConfig(seed=seed))
        model = small_model(data, examples, config)
        model.fit(rows, lambda: 0.0, lambda: None)
        scores.append(model.scores(rows))
    np.testing.assert_array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2])


def test_only_the_leak_scores_on_a_random_log(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_model, "ACTORS", 16)
    metrics = reference_table.reference_table(data, {"small": SMALL}, seeds=[0])
    found, share = metrics["reference"]["small"], metrics["protocol"]["test_targets_trained_on"]
    assert share["leaky"] > 0.7 and share["own_targets"] == share["temporal_split"] == 0
    assert found["mean_rank"] < 11 and found["accuracy"] > 0.6
    for honest in found["honest"].values():
        assert honest["mean_rank"] == pytest.approx(18, abs=2)  # of 35; 185 examples
        assert honest["accuracy"] == pytest.approx(0.25, abs=0.1)


def publish_log(out: Path, events: int = EVENTS) -> Path:
    with publish(out, kind="data", options=None, inputs={}) as attempt:
        prepared_from_events(
            *(column if column is None else column[:events] for column in random_events(1)), path=attempt
        )
    return out


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reference_model, "EPOCHS", 1)
    options = {"data": str(publish_log(tmp_path / "data")), "out": str(tmp_path / "report"), "protocol": "reference"}
    evaluate.main(EvaluateOptions(**options))  # type: ignore[arg-type]
    metrics: dict[str, Any] = json.loads((tmp_path / "report" / "metrics.json").read_text())
    protocol, table = metrics["protocol"], metrics["reference"]
    assert (protocol["name"], protocol["label"], protocol["seeds"], protocol["candidates"]) == (
        "reference",
        "leaky",
        [0, 1],
        35,
    )
    assert protocol["train"] + protocol["validation"] + protocol["test"] == protocol["events"] - USERS
    assert list(table) == ["two_tower_mlp", "two_tower_moe", "popularity", "chance"]
    for name in ("two_tower_mlp", "two_tower_moe"):
        row = table[name]
        assert row["seeds"] == 2 and row["train_seconds"] > 0
        for figures in (row, *row["honest"].values()):
            assert 0 <= figures["accuracy"] <= 1 and 0 < figures["mrr"] <= 1 and 1 <= figures["mean_rank"] <= 35
    assert table["two_tower_mlp"]["published"] == {
        "accuracy": 0.7733,
        "mrr": 0.4621,
        "mean_rank": 11.29,
        "parameters": 1_280_000,
    }
    assert table["two_tower_moe"]["parameters"] > table["two_tower_mlp"]["parameters"] > 64 * USERS
    html = (tmp_path / "report" / "report.html").read_text()
    assert "It is leaky" in html and "http" not in html and f"{table['two_tower_mlp']['parameters']:,}" in html
    assert "two_tower_moe" in capsys.readouterr().out


def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"data": str(publish_log(tmp_path / "data")), "out": str(tmp_path / "report"), "protocol": "reference"}
    with pytest.raises(FriendrecError, match="--baselines has no meaning in the protocol reference"):
        evaluate.main(EvaluateOptions(**options, baselines=True))  # type: ignore[arg-type]
    with pytest.raises(FriendrecError, match="--interactions is for the protocol link alone"):
        evaluate.main(EvaluateOptions(**options, interactions="log"))  # type: ignore[arg-type]
    monkeypatch.setattr(reference_table, "MOST", 100_000)
    with pytest.raises(FriendrecError, match="too much for a full softmax"):
        evaluate.main(EvaluateOptions(**options))  # type: ignore[arg-type]
    assert not (tmp_path / "report").exists()
    few = options | {"data": str(publish_log(tmp_path / "few", events=20))}
    with pytest.raises(FriendrecError, match="use a longer log"):
        evaluate.main(EvaluateOptions(**few))  # type: ignore[arg-type]


@pytest.mark.long
def test_both_published_rows_are_reached_and_nothing_is_left_without_the_leak(
    shared_data: Path, tmp_path: Path
) -> None:
    """On the concept repository's own log, one seed."""
    log = shared_data.parent / "seed" / "regular.parquet"
    prepare(PrepareOptions(interactions=str(log), out=str(tmp_path / "data")))
    table = reference_table.reference_table(load_prepared(tmp_path / "data"), seeds=[0])["reference"]
    for name, published in PUBLISHED.items():
        found = table[name]
        assert found["accuracy"] >= published["accuracy"] and found["mrr"] >= published["mrr"]
        assert found["mean_rank"] <= published["mean_rank"] and found["parameters"] <= published["parameters"]
        for honest in found["honest"].values():
            assert honest["mean_rank"] == pytest.approx(17.5, abs=0.7)
            assert honest["recall@10"] < 0.03
