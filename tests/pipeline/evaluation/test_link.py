"""The link protocol: its figures against scikit-learn, its splits, and the published line of EdgeBank."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from friendrec.errors import FriendrecError
from friendrec.pipeline import evaluate
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.evaluation.link import (
    BATCH,
    EdgeBank,
    Links,
    area_under_curve,
    average_precision,
    link_metrics,
)
from friendrec.pipeline.prepare import PrepareOptions
from friendrec.pipeline.prepare import main as prepare


def random_links(seed: int, hide: int = 0) -> Links:
    rng = np.random.default_rng(seed)
    return Links.of(rng.integers(0, 30, 3000), rng.integers(0, 30, 3000), rng.integers(0, 2000, 3000), hide)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_figures_are_those_of_scikit_learn(levels: int) -> None:
    rng = np.random.default_rng(levels)
    positive, negative = rng.integers(0, levels, 200) / levels, rng.integers(0, levels, 150) / levels
    truth, scores = np.repeat([1, 0], [200, 150]), np.concatenate([positive, negative])
    assert average_precision(positive, negative) == pytest.approx(average_precision_score(truth, scores))
    assert area_under_curve(positive, negative) == pytest.approx(roc_auc_score(truth, scores))


def test_periods_and_who_is_unseen() -> None:
    links = random_links(0)
    first, second = np.quantile(links.timestamp, [0.7, 0.85])
    assert (links.timestamp[: links.train_end] <= first).all()
    assert (links.timestamp[links.train_end : links.test_begin] > first).all()
    assert (links.timestamp[: links.test_begin] <= second).all()
    assert (links.timestamp[links.test_begin :] > second).all()
    kept = ~links.hidden[: links.train_end]
    seen = np.union1d(links.actor[: links.train_end][kept], links.target[: links.train_end][kept])
    assert len(seen) == 27, "a tenth of the 30 users touches no train event"
    assert not links.hidden[links.train_end :].any()
    assert not np.array_equal(links.hidden, random_links(0, hide=1).hidden)


def test_edge_bank_knows_pairs_of_what_is_not_hidden_and_of_earlier_batches() -> None:
    links = random_links(1)
    bank = EdgeBank(links)
    for begin in range(links.test_begin, len(links), BATCH):
        batch = slice(begin, min(begin + BATCH, len(links)))
        past = np.flatnonzero(~links.hidden[:begin])
        seen = set(zip(links.actor[past].tolist(), links.target[past].tolist(), strict=True))
        targets = np.random.default_rng(begin).integers(0, 30, batch.stop - begin)
        expected = [pair in seen for pair in zip(links.actor[batch].tolist(), targets.tolist(), strict=True)]
        assert bank.scores(batch, targets).tolist() == expected


class Coin:
    def scores(self, batch: slice, targets: np.ndarray) -> np.ndarray:
        return np.random.default_rng(batch.start + int(targets[0])).random(batch.stop - batch.start)


def test_a_coin_scores_half() -> None:
    figures = link_metrics(random_links(2), Coin(), seed=0)
    assert figures["auc"] == pytest.approx(0.5, abs=0.06)


def test_the_published_line_of_edge_bank(shared_data: Path, tmp_path: Path) -> None:
    """UCI in DyGLib's table: 76.20 / 77.30. Through the verbs, from data whose cleaning dropped 37 rows."""
    prepare(PrepareOptions(interactions=str(shared_data / "collegemsg.parquet"), out=str(tmp_path / "data")))
    evaluate.main(EvaluateOptions(data=str(tmp_path / "data"), protocol="link", out=str(tmp_path / "report")))
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["protocol"] == {"name": "link", "label": "easy", "events": 59_835}
    figures = metrics["link"]["edge_bank"]
    assert (figures["test_events"], figures["targets"], figures["seeds"]) == (8976, 1862, 5)
    assert figures["average_precision"] == pytest.approx(0.7620, abs=0.003)
    assert figures["auc"] == pytest.approx(0.7730, abs=0.003)
    assert "easy protocol" in (tmp_path / "report" / "report.html").read_text()


def test_the_log_may_have_moved_and_mistakes_are_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {"from": rng.integers(0, 30, 500), "to": rng.integers(0, 30, 500), "action": ["say"] * 500}
    table = pa.table(columns | {"timestamp": np.sort(rng.integers(1, 10**6, 500))})
    pq.write_table(table, tmp_path / "log.parquet")
    renamed = {"columns": "actor_id=from,target_id=to", "time_unit": "s"}
    prepare(PrepareOptions(interactions=str(tmp_path / "log.parquet"), out=str(tmp_path / "data"), **renamed))  # type: ignore[arg-type]
    (tmp_path / "log.parquet").rename(tmp_path / "moved.parquet")
    options = {"data": str(tmp_path / "data"), "protocol": "link", "out": str(tmp_path / "report")}
    with pytest.raises(FriendrecError, match="does not exist"):
        evaluate.main(EvaluateOptions(**options))  # type: ignore[arg-type]
    (tmp_path / "log.parquet").write_bytes(b"something else")
    with pytest.raises(FriendrecError, match="has changed since"):
        evaluate.main(EvaluateOptions(**options))  # type: ignore[arg-type]
    with pytest.raises(FriendrecError, match="--baselines has no meaning"):
        evaluate.main(EvaluateOptions(**options, baselines=True))  # type: ignore[arg-type]
    moved = str(tmp_path / "moved.parquet")
    temporal = EvaluateOptions(data=options["data"], baselines=True, interactions=moved, out=options["out"])
    with pytest.raises(FriendrecError, match="--protocol link"):
        evaluate.main(temporal)
    evaluate.main(EvaluateOptions(**options, interactions=moved))  # type: ignore[arg-type]
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["protocol"]["events"] == 500
