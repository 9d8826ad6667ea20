"""Mistakes in train, export, evaluate and recommend: one line with the remedy, exit code 2, nothing half-made."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from friendrec.datasets.packing import Tables
from friendrec.datasets.prepared import load_prepared
from friendrec.pipeline import cli, train
from friendrec.pipeline.build import build_model
from friendrec.pipeline.config import RunConfig
from friendrec.pipeline.publish import open_published
from friendrec.sharding import checkpoint
from friendrec.sharding.optimizers import Optimizers
from tests.training import SMALL, export_run, index_embeddings, losses, publish_data, train_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, `run`, `embeddings` and `index` of one chain; `other`, of other users; `begun`, unfinished."""
    folder = tmp_path_factory.mktemp("mistakes")
    data = publish_data(folder / "data")
    publish_data(folder / "other", users=130, seed=1)
    train_run(data, folder / "run", "--epochs=1", "--workers=0")
    export_run(run=str(folder / "run"), data=str(data), out=str(folder / "embeddings"))
    index_embeddings(folder / "embeddings", folder / "index")
    shutil.copytree(folder / "run", folder / "begun")
    (folder / "begun" / "manifest.json").unlink()
    pq.write_table(pa.table({"user_id": [1000, 5]}), folder / "unknown.parquet")
    pq.write_table(pa.table({"id": [1000]}), folder / "nameless.parquet")
    return folder


def times(folder: Path) -> dict[Path, int]:
    """When each file was written, to see that none was."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _same_handler_afterwards() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command ends with."""
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line or line.startswith("error: ") for line in lines[:-1])
    return lines[-1].removeprefix("error: ")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("nope --data={data} --out={out}", "unknown preset 'nope': choose one of two_tower_mlp"),
        ("two_tower_mpl --data={data} --out={out}", "unknown preset 'two_tower_mpl': did you mean two_tower_mlp?"),
        ("--data={data} --out={out}", "name a preset first"),
        ("two_tower_mlp --data={data}", "needs --out"),
        ("two_tower_mlp --data={data} --out={out} --dimm 8", "has no argument --dimm: did you mean --dim?"),
        ("two_tower_mlp --data={data} --out={out} --dim=ten", "--dim"),
        ("two_tower_mlp --data={data} --out={out} --dim=10", "dim 10 must be a multiple of 4"),
        ("two_tower_mlp --data={data} --out={out} --uniform-negatives=0", "uniform_negatives"),
        ("two_tower_mlp --data={data} --out={out} --warmup-share=2", "warmup_share"),
        ("two_tower_mlp --data={data} --out={out} --epochs=0", "epochs, validation_events and checkpoint_steps must"),
        ("two_tower_mlp --data={data} --out={out} --max-minutes=nan", "max_minutes must be above 0"),
        ("two_tower_mlp --data={data} --out={out} --order=sideways", "--order cannot be sideways"),
        ("two_tower_mlp --data={data} --out={out} --batch-size=8", "batch_size 8 is below the chunk length 32"),
        ("two_tower_mlp --data={data} --out={out} --world-size=0 --plan-only", "plan for at least 1 process"),
        ("two_tower_mlp --data={folder}/none --out={out}", "none does not exist: pass --data what"),
        ("two_tower_mlp --data={folder} --out={out}", "has no manifest.json"),
        ("two_tower_mlp --data={run} --out={out}", "is a run, expected a prepared data set: pass --data what"),
        ("two_tower_mlp --data={truncated} --out={out}", "partner.npy is damaged"),
        ("two_tower_mlp --data={lacking} --out={out}", "lacks splits.json"),
        ("two_tower_mlp --data={data} --out={run}", "already holds a run, of other config or data"),
        ("two_tower_mlp --data={data} --out={index}", "already holds an index, of other config or data"),
        ("two_tower_mlp --data={data} --out={folder}", "exists and is no run: choose another --out"),
        ("two_tower_mlp --data={data} --out={run}/plan.json", "exists and is no run: choose another --out"),
        ("two_tower_mlp --data={data} --out={run}/plan.json/new", "is not a directory to write to"),
        ("two_tower_mlp --data={data} --out=s3://bucket/run", "checkpoints need a directory"),
    ],
)
def test_train(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, line: str) -> None:
    names = {name: folder / name for name in ("data", "run", "index")} | {"folder": folder, "out": tmp_path / "out"}
    for name, broken in (("truncated", "arrays/partner.npy"), ("lacking", "splits.json")):
        if f"{{{name}}}" in argv:
            names[name] = Path(shutil.copytree(folder / "data", tmp_path / name))
            content = (names[name] / broken).read_bytes()
            (names[name] / broken).unlink()
            if name == "truncated":
                (names[name] / broken).write_bytes(content[:-10])
    before = times(folder)
    assert line in refusal(capsys, "train", *argv.format(**names).split())
    assert not (tmp_path / "out").exists()
    assert times(folder) == before


def test_validation_without_the_task_that_stops(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told at the start, not after an epoch."""
    with patch("friendrec.pipeline.evaluation.tasks.Events.of_task", lambda self, task: self.is_new & False):
        argv = ["train", "two_tower_mlp", f"--data={folder / 'data'}", f"--out={tmp_path / 'out'}", *SMALL]
        assert "pass another --stop-on" in refusal(capsys, *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("export --run={run} --data={other}", "was trained on data with another vocabulary than"),
        ("export --run={begun} --data={data}", "has no manifest.json"),
        ("index --embeddings={run}", "expected embeddings"),
        ("export --run={run} --data={data} --as-of=yesterday", "--as-of yesterday is no ISO 8601 time: write it as"),
        ("export --run={data} --data={data}", "is a prepared data set, expected a run: pass --run what"),
        ("export --run={run} --data={data} --dtype=float8", "--dtype cannot be float8"),
        ("export --run={stranger} --data={data}", "is a checkpoint of another model"),
        ("export --run={cut} --data={data}", "is damaged"),
        ("evaluate --data={data}", "nothing to evaluate"),
        ("evaluate --run={run} --data={other}", "was trained on data with another vocabulary than"),
        ("evaluate --run={stranger} --data={data}", "is a checkpoint of another model"),
        ("recommend --run={run} --data={other} --index={index}", "was trained on data with another vocabulary than"),
        ("recommend --run={run} --data={data} --index={index} --k=0", "--k 0: ask for at least 1 recommendation"),
        ("recommend --run={run} --data={data} --index={index} --as-of=1e9", "--as-of 1e9 is no ISO 8601 time"),
        ("recommend --run={run} --data={data} --index={index} --users={run}/no", "no such file"),
        ("recommend --run={run} --data={data} --index={index} --users={folder}/nameless.parquet", "user_id"),
        ("recommend --run={run} --data={data} --index={index} --users={folder}/unknown.parquet", "the first is 5"),
        ("recommend --run={run} --data={data} --index={data}", "is a prepared data set, expected an index"),
        ("recommend --run={stranger} --data={data} --index={index}", "is a checkpoint of another model"),
    ],
)
def test_what_follows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, line: str) -> None:
    names = {name: folder / name for name in ("data", "other", "run", "index", "begun")} | {"folder": folder}
    if "{stranger}" in argv:
        names["stranger"] = with_the_checkpoint_of_another_model(folder, tmp_path)
    if "{cut}" in argv:
        names["cut"] = Path(shutil.copytree(folder / "run", tmp_path / "cut"))
        (file,) = names["cut"].glob("checkpoints/*/__0_0.distcp")
        file.write_bytes(file.read_bytes()[:-10])
    before = times(folder)
    said = refusal(capsys, *argv.format(**names).split(), f"--out={tmp_path / 'out'}")
    assert line.lower() in said.lower()
    assert [path for path in tmp_path.iterdir() if "out" in path.name] == []
    assert times(folder) == before


def with_the_checkpoint_of_another_model(folder: Path, tmp_path: Path) -> Path:
    """A run whose checkpoint was put there from a wider model, the manifest made again."""
    run = Path(shutil.copytree(folder / "run", tmp_path / "stranger"))
    train_run(folder / "data", tmp_path / "wide", "--epochs=1", "--workers=0", "--hidden=24")
    _, manifest = open_published(run)
    shutil.rmtree(run / manifest.extra["checkpoint"])
    (wide,) = (tmp_path / "wide" / "checkpoints").iterdir()
    shutil.copytree(wide, run / manifest.extra["checkpoint"])
    (run / "manifest.json").unlink()
    train.write_manifest(
        run, kind="run", options=manifest.options, inputs={"data": folder / "data"}, extra=manifest.extra
    )
    return run


def test_an_unfinished_run_is_taken_up_by_the_same_config_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    (run / "manifest.json").unlink()
    argv = ["train", "two_tower_mlp", f"--out={run}", *SMALL, "--epochs=1", "--workers=0"]
    before = (run / "config.json").read_text()
    same = [*argv, f"--data={folder / 'data'}"]
    assert "holds an unfinished run: pass --resume to go on" in refusal(capsys, *same)
    assert "begun with another config or data" in refusal(capsys, *same, "--resume", "--seed=1")
    assert "begun with another config or data" in refusal(capsys, *argv, f"--data={folder / 'other'}", "--resume")
    assert (run / "config.json").read_text() == before
    for file in run.glob("checkpoints/*/__0_0.distcp"):
        shutil.copy(folder / "data" / "splits.json", file)  # damaged: the run starts from the start
    assert cli.main([*same, "--resume"]) == 0
    ours, expected = losses(run), losses(folder / "run")
    assert ours == pytest.approx({step: expected[step] for step in ours})
    assert ours


@pytest.mark.parametrize("verb", ["train", "export", "recommend", "evaluate"])
def test_finished_work_is_not_done_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    argv = {
        "train": f"train two_tower_mlp --data={folder}/data {' '.join(SMALL)} --epochs=1 --workers=0",
        "export": f"export --run={folder}/run --data={folder}/data",
        "recommend": f"recommend --run={folder}/run --data={folder}/data --index={folder}/index --k=3",
        "evaluate": f"evaluate --run={folder}/run --data={folder}/data",
    }[verb].split()
    assert cli.main([*argv, f"--out={tmp_path / 'out'}"]) == 0
    made = (tmp_path / "out" / "manifest.json").read_bytes()
    capsys.readouterr()
    assert cli.main([*argv, f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "up to date" in said or "already" in said
    assert (tmp_path / "out" / "manifest.json").read_bytes() == made
    if verb != "train":  # and something else is refused, early
        assert "choose another --out" in refusal(capsys, *argv, f"--out={folder / 'index'}")


def test_plan_only(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "two_tower_mlp", f"--data={folder / 'data'}", f"--out={tmp_path / 'out'}", *SMALL]
    assert cli.main([*argv, "--plan-only", "--world-size=8"]) == 0
    shown = capsys.readouterr().out
    assert sum("user " in line and "row_wise" in line for line in shown.splitlines()) == 8
    assert shown.count("needed in all") == 8
    assert "KiB" in shown
    assert list(tmp_path.iterdir()) == []


def poisoned(optimizers: Optimizers) -> float:
    """A step after which a weight is not a number, though the loss before it was one."""
    with torch.no_grad():
        next(iter(optimizers.dense.params.values())).flatten()[0] = torch.nan
    return 1.0


def test_weights_that_are_no_numbers_are_never_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not at the end of an epoch either, where they would rank every target first."""
    out = tmp_path / "out"
    argv = ["train", "two_tower_mlp", f"--data={folder / 'data'}", f"--out={out}", *SMALL, "--workers=0"]
    with patch.object(Optimizers, "finish_step", poisoned):
        assert "not finite any more: lower --dense-learning-rate" in refusal(capsys, *argv, "--batch-size=4096")
    assert checkpoint.latest(out / "checkpoints") is None
    assert not (out / "manifest.json").exists()


ABSURD = ("--dense-learning-rate=1e20", "--warmup-share=0", "--checkpoint-steps=1")


def test_a_loss_that_is_no_number_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "two_tower_mlp", f"--data={folder / 'data'}", f"--out={tmp_path / 'run'}", *SMALL, *ABSURD]
    line = refusal(capsys, *argv, "--workers=0")
    assert "the loss is" in line and "lower --dense-learning-rate" in line
    assert_no_nonsense_was_saved(folder, tmp_path / "run")


@pytest.mark.long
def test_a_loss_that_is_no_number_stops_all_ranks_with_one_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launch = [sys.executable, "-P", "-m", "friendrec.pipeline.launch", "--nproc", "2", "--"]
    train = ["train", "two_tower_mlp", f"--data={folder / 'data'}", f"--out={out}", *SMALL]
    result = subprocess.run([*launch, *train, *ABSURD], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if "error" in line)
    assert "the loss is" in line
    assert "lower --dense-learning-rate" in line
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    assert_no_nonsense_was_saved(folder, out)


def assert_no_nonsense_was_saved(folder: Path, out: Path) -> None:
    """What is there are the checkpoints before it."""
    assert not (out / "manifest.json").exists()
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    model = build_model(RunConfig.load(out), Tables.of(load_prepared(folder / "data")))
    checkpoint.load_whole(newest, model)
    assert all(p.isfinite().all() for p in model.parameters())


def test_ranks_refuse_together(folder: Path) -> None:
    """No rank waits for another that has gone."""
    launch = [sys.executable, "-P", "-m", "friendrec.pipeline.launch", "--nproc", "2", "--"]
    train = ["train", "two_tower_mlp", f"--data={folder / 'data'}", f"--out={folder / 'index'}"]
    result = subprocess.run([*launch, *train], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "already holds an index" in result.stderr
