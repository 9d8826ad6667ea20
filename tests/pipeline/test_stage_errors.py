"""Mistakes at train, export, recommend and evaluate: one line with the remedy, exit code 2, nothing left behind."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.pipeline.cli import main
from tests.training import SMALL, export_run, index_embeddings, publish_data, train_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, run, embeddings, index; `other` is data of other people; `begun` an unfinished run."""
    root = tmp_path_factory.mktemp("errors")
    data = publish_data(root / "data")
    publish_data(root / "other", seed=1, users=120)
    train_run(data, root / "run", "--epochs=1", "--workers=0")
    export_run(run=str(root / "run"), data=str(data), out=str(root / "embeddings"))
    index_embeddings(root / "embeddings", root / "index")
    shutil.copytree(root / "run", root / "begun")
    (root / "begun" / "manifest.json").unlink()
    shutil.copytree(root / "run", root / "damaged")
    next((root / "damaged" / "checkpoints").glob("step-*/*.distcp")).write_bytes(b"")
    (root / "foreign").mkdir()
    (root / "foreign" / "file").touch()
    pq.write_table(pa.table({"user_id": [1000, 5]}), root / "unknown.parquet")
    pq.write_table(pa.table({"id": [1000]}), root / "nameless.parquet")
    return root


TRAIN = "train two_tower_mlp --data data --out new"
EXPORT = "export --run run --data data --out new"
RECOMMEND = "recommend --run run --data data --index index --out new"
MISTAKES = {
    "train two_tower_mpl --data data --out new": "two_tower_mlp",
    "train --data data --out new": "name a preset first",
    f"{TRAIN} --epoch 2": "--epochs",
    "train two_tower_mlp --data nowhere --out new": "nowhere does not exist",
    "train two_tower_mlp --data foreign --out new": "no manifest.json",
    "train two_tower_mlp --data run --out new": "expected a prepared data set",
    "train two_tower_mlp --data data --out run": "choose another --out",
    "train two_tower_mlp --data data --out begun": "--resume",
    "train two_tower_mlp --data data --out begun --resume --dim 64": "another config",
    "train two_tower_mlp --data data --out foreign": "choose another --out",
    f"{TRAIN} --batch-size 8": "chunk length",
    f"{TRAIN} --dim 10": "dim 10",
    f"{TRAIN} --uniform-negatives 0": "uniform_negatives",
    f"{TRAIN} --warmup-share 2": "warmup_share",
    "export --run begun --data data --out new": "no manifest.json",
    "export --run data --data data --out new": "expected a run",
    "export --run run --data other --out new": "another vocabulary",
    "export --run damaged --data data --out new": "make",
    f"{EXPORT} --as-of yesterday": "2025-01-31T12:00:00Z",
    f"{EXPORT} --dtype float64": "float64",
    "index --embeddings run --out new": "expected embeddings",
    "recommend --run run --data other --index index --out new": "another vocabulary",
    "recommend --run run --data data --index embeddings --out new": "expected an index",
    f"{RECOMMEND} --k 0": "at least 1",
    f"{RECOMMEND} --users nowhere.parquet": "nowhere.parquet",
    f"{RECOMMEND} --users nameless.parquet": "user_id",
    f"{RECOMMEND} --users unknown.parquet": "the first is 5",
    "evaluate --run run --data other --out new": "another vocabulary",
    "evaluate --data data --out new": "nothing to evaluate",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_one_line_and_nothing_left(
    root: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert MISTAKES[command] in lines[0]
    assert "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before
    assert not (root / "new").exists()


@pytest.mark.parametrize(
    "command", ["train two_tower_mlp --data data --out run --epochs=1 --workers=0 " + " ".join(SMALL), EXPORT]
)
def test_finished_work_is_not_repeated(
    root: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    command = command.replace("--out new", "--out embeddings")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert main(command.split()) == 0
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before


def test_a_plan_is_printed_and_nothing_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    assert main([*TRAIN.split(), "--plan-only", "--world-size", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("row_wise") >= 8
    assert "needed in all" in printed
    assert not (root / "new").exists()


def test_a_loss_that_is_not_finite_stops_with_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    rates = ["--dense-learning-rate", "1e30", "--table-learning-rate", "1e30", "--warmup-share", "0", "--epochs", "3"]
    assert main(["train", "two_tower_mlp", "--data", "data", "--out", "wild", "--workers", "0", *SMALL, *rates]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "--dense-learning-rate" in line
    assert not (root / "wild" / "manifest.json").exists()
    assert json.loads((root / "wild" / "config.json").read_text())
