"""`friendrec frontier` on a small run: what its files hold, against evaluate and brute force; and its mistakes."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from friendrec.pipeline import frontier
from friendrec.pipeline.evaluation.frontier import K, asked, sampled_events
from friendrec.pipeline.frontier import FrontierOptions
from friendrec.pipeline.inference import open_recommender
from friendrec.pipeline.retrieval.exact import ExactIndex
from tests.pipeline.retrieval.contract import brute_force
from tests.pipeline.test_stage_errors import refusal, times
from tests.training import export_run, publish_data, tokenize_embeddings, train_run, train_stu_run

KEYS = {
    "index",
    "parameter",
    "share_scored",
    "task_recall@100",
    "neighbour_recall@100",
    "queries_per_second",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, a `run` without clusters, and its frontier; `other` data."""
    folder = tmp_path_factory.mktemp("frontier")
    data = publish_data(folder / "data", users=320, events=1600)
    publish_data(folder / "other", users=130, seed=1)
    train_run(data, folder / "run", "--epochs=1", "--workers=0")
    frontier.main(FrontierOptions(run=str(folder / "run"), data=str(data), queries=40, out=str(folder / "frontier")))
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "frontier" / "frontier.json").read_text())
    return found


def of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["index"] == kind]


def test_the_files_hold_what_they_should(folder: Path, rows: list[dict[str, Any]]) -> None:
    assert all(set(row) == KEYS for row in rows)
    assert list(dict.fromkeys(row["index"] for row in rows)) == ["exact", "ivf", "ivfpq", "hnsw"]
    assert [row["parameter"] for row in of(rows, "exact")] == [None]
    assert all(type(row["parameter"]) is int for row in rows if row["index"] != "exact")
    assert all(0 <= row[name] <= 1 for row in rows for name in ("task_recall@100", "neighbour_recall@100"))
    assert all(row["queries_per_second"] > 0 for row in rows)
    with (folder / "frontier" / "frontier.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["share_scored"]) for line in lines] == [row["share_scored"] for row in rows]
    plain = [float(line["queries_per_second_dense"]) for line in lines]
    assert min(plain) > 0
    page = (folder / "frontier" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2 and "http://" not in page and "https://" not in page
    summary = json.loads((folder / "frontier" / "summary.json").read_text())
    assert summary["lists"] == summary["load"]["ivf"]["lists"] == 16  # R = round(√√308) = 4, R · R
    told = [summary["exact"]["queries_per_second_dense"]]
    told += [speed for kind in summary["kinds"].values() for speed in kind["queries_per_second_dense"].values()]
    assert told == plain
    assert summary["queries"] == 40 < summary["events"] and summary["candidates"] == 308


def test_the_exact_search_finds_what_brute_force_finds(folder: Path, rows: list[dict[str, Any]]) -> None:
    recommender = open_recommender(folder / "run", folder / "data")
    assert isinstance(recommender.retriever, ExactIndex)
    events, _ = sampled_events(recommender.data, recommender.exclusions, 40)
    found = brute_force(recommender.retriever.vectors, asked(recommender, events), K)[0]
    (exact,) = of(rows, "exact")
    assert exact["task_recall@100"] == pytest.approx(np.mean((found == events.target[:, None]).any(axis=1)))
    assert 0 < exact["task_recall@100"] < 1
    assert (exact["share_scored"], exact["neighbour_recall@100"]) == (1, 1)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_at_its_end_a_kind_finds_what_exact_finds(rows: list[dict[str, Any]], kind: str) -> None:
    first, last, exact = of(rows, kind)[0], of(rows, kind)[-1], of(rows, "exact")[0]
    assert last["parameter"] == {"ivf": 16, "hnsw": 308}[kind]
    assert last["neighbour_recall@100"] == 1 and last["task_recall@100"] == exact["task_recall@100"]
    assert first["neighbour_recall@100"] < 1 and first["share_scored"] < 1 < last["share_scored"]


@pytest.mark.parametrize("kind", ["ivf", "ivfpq", "hnsw"])
def test_more_effort_compares_more(rows: list[dict[str, Any]], kind: str) -> None:
    shares = [row["share_scored"] for row in of(rows, kind)]
    efforts = [row["parameter"] for row in of(rows, kind)]
    assert efforts == sorted(efforts) and shares == sorted(shares)


def test_a_repeat_is_recognised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = times(folder)
    paths = {name: str(folder / name) for name in ("run", "data")}
    frontier.main(FrontierOptions(**paths, queries=40, out=str(folder / "frontier")))
    assert "is this frontier already" in capsys.readouterr().out
    assert times(folder) == before


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--run={run} --data={data} --kinds=ifv", "--kinds: there is no kind 'ifv': did you mean ivf"),
        ("--run={run} --data={data} --kinds=beam", "pass --stu RUN"),
        ("--run={run} --data={data} --kinds=clusters", "has no clusters"),
        ("--run={run} --data={data} --lists=400", "--lists 400 are more than the 308 candidates"),
        ("--run={run} --data={data} --lists=0", "--lists 0: give a positive number"),
        ("--run={run} --data={data} --queries=0", "--queries 0: give a positive number"),
        ("--run={run} --data={other}", "was trained on data with another vocabulary"),
        ("--run={data} --data={data}", "is a prepared data set, expected a run"),
        ("--run={run} --data={data} --stu={run}", "gives vectors and has no beams"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, line: str) -> None:
    before = times(folder)
    paths = {name: folder / name for name in ("run", "data", "other")}
    said = refusal(capsys, "frontier", *argv.format(**paths).split(), f"--out={tmp_path / 'out'}")
    assert line in said
    assert not (tmp_path / "out").exists()
    assert times(folder) == before


@pytest.mark.long
def test_beams_and_clusters_beside_the_others(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run, stu, out = (
        str(path) for path in (folder / "data", tmp_path / "run", tmp_path / "stu", tmp_path / "out")
    )
    train_run(Path(data), Path(run), "--epochs=2", "--workers=0", "--clusters=residual")
    export_run(run=run, data=data, out=str(tmp_path / "embeddings"))
    tokens = tokenize_embeddings(tmp_path / "embeddings", tmp_path / "tokens")
    train_stu_run(Path(data), tokens, Path(stu), "--epochs=1", "--workers=0")
    said = refusal(capsys, "frontier", f"--run={stu}", f"--data={data}", f"--out={out}")
    assert "pass it as --stu, a two-tower as --run" in said
    frontier.main(FrontierOptions(run=run, data=data, stu=stu, kinds="ivf,clusters,beam", queries=40, out=out))
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert list(dict.fromkeys(row["index"] for row in rows)) == ["exact", "ivf", "clusters", "beam"]
    own, exact, beams = of(rows, "clusters")[-1], of(rows, "exact")[0], of(rows, "beam")
    assert own["parameter"] == of(rows, "ivf")[-1]["parameter"] == 16
    assert (own["neighbour_recall@100"], own["task_recall@100"]) == (1, exact["task_recall@100"])
    assert [row["parameter"] for row in beams][:3] == [1, 2, 4]
    recalls = [row["neighbour_recall@100"] for row in beams]
    assert recalls[0] < recalls[-1] and recalls[-1] > 0.95
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["load"]["clusters"]["lists"] == 16
    assert set(summary["clusters_minus_ivf"]) <= {"0.5%", "1.0%", "2.0%", "3.0%", "5.0%", "10.0%"}
