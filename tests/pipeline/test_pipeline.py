"""The driver runs each stage as a job, goes on where it stopped, and stops with a clear line."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline import pipeline
from friendrec.pipeline.pipeline import PipelineOptions, Stage
from friendrec.pipeline.publish import publish

CHAIN = ["prepare", "train", "export", "index", "evaluate", "recommend"]
STU_CHAIN = ["prepare", "train", "export", "tokenize", "train", "index", "evaluate", "recommend"]
METRICS = {
    "protocol": {"period": "validation", "candidates": 1676},
    "tasks": {"next_contact": {"live": {"recall@10": 0.5}, "frozen": {"recall@10": 0.25}}},
    "baselines": {"recency": {"next_contact": {"live": {"recall@10": 0.125}}}},
}


@pytest.fixture
def options(tmp_path: Path) -> PipelineOptions:
    row = {"actor_id": [1], "target_id": [2], "action": ["message"], "timestamp": pa.array([7], pa.timestamp("us"))}
    pq.write_table(pa.table(row), tmp_path / "log.parquet")
    return PipelineOptions(
        interactions=str(tmp_path / "log.parquet"), out=str(tmp_path / "work"), train_args="--epochs 1", nproc=3
    )


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the jobs, which publish what the summary reads; the names of those that ran."""
    names: list[str] = []

    def run(stage: Stage, options: PipelineOptions, out: str) -> None:
        names.append(stage.verb)
        kind = Path(stage.output).name
        with publish(stage.output, kind=kind, options={}, inputs={}) as attempt:
            if kind == "report":
                (attempt / "metrics.json").write_text(json.dumps(METRICS))
            if kind == "recommendations":
                rows = {"user_id": [7] * 12, "rank": range(1, 13), "candidate_id": range(100, 112), "score": [1.0] * 12}
                pq.write_table(pa.table(rows), attempt / "part-0.parquet")

    monkeypatch.setattr(pipeline, "_run", run)
    return names


def test_whole_chain(options: PipelineOptions, ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.main(options)
    assert ran == CHAIN
    text = capsys.readouterr().out
    for expected in ("0.500", "0.250", "0.125", "report.html", "work/index", "user 7: 100, 101", "108, 109\n"):
        assert expected in text


def test_goes_on_at_the_first_unfinished_stage(
    options: PipelineOptions, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.main(options)
    for name in ("index", "report", "recommendations"):
        for path in (Path(options.out) / name).iterdir():
            path.unlink()
    ran.clear()
    pipeline.main(options)
    assert ran == CHAIN[3:]
    ran.clear()
    pipeline.main(options)
    assert ran == []


def test_one_directory_is_of_one_log_and_one_set_of_options(options: PipelineOptions, ran: list[str]) -> None:
    pipeline.main(options)
    other = PipelineOptions(interactions=options.interactions, out=options.out, train_args="--epochs 9")
    with pytest.raises(FriendrecError, match="begun with other --train-args: choose another --out"):
        pipeline.main(other)
    Path(options.interactions).write_bytes(b"other events")
    with pytest.raises(FriendrecError, match="begun with other --interactions"):
        pipeline.main(options)


def test_options_of_stages_to_come_may_change(options: PipelineOptions, ran: list[str]) -> None:
    pipeline.main(options)
    for name in ("report", "recommendations"):
        shutil.rmtree(Path(options.out) / name)
    ran.clear()
    pipeline.main(replace(options, evaluate_args=""))
    assert ran == CHAIN[4:]
    with pytest.raises(FriendrecError, match="begun with other --evaluate-args: choose another --out"):
        pipeline.main(options)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"prepare_args": "--time-unti s"}, "`friendrec prepare` has no argument --time-unti: did you mean"),
        (
            {"train_args": "--epoch 3"},
            "`friendrec train two_tower_mlp` has no argument --epoch: did you mean --epochs?",
        ),
        ({"evaluate_args": "--period never"}, "--period cannot be never"),
        ({"index_args": "--kind tree"}, "--kind cannot be tree: choose one of exact, "),
        ({"index_args": "--nprobe 3"}, "--nprobe means nothing to an index of kind exact: leave it out, or pass"),
        ({"preset": "stu", "index_args": "--kind ivf"}, "--tokens means nothing to an index of kind ivf: leave it"),
        ({"preset": "two_tower_clusters", "index_args": "--recall 2"}, "--recall 2.0: give a share between 0 and 1"),
        ({"preset": "two_towers"}, "unknown preset 'two_towers'"),
        ({"preset": "stu", "base_args": "--epoch 3"}, "`friendrec train two_tower_mlp` has no argument --epoch: did"),
        ({"preset": "stu", "train_args": "--dimm 3"}, "`friendrec train stu` has no argument --dimm: did you mean"),
        ({"preset": "stu", "train_args": "--negatives uniform"}, "negatives uniform are not for preset stu"),
        ({"preset": "stu", "tokenize_args": "--codebooks 3"}, "`friendrec tokenize` has no argument --codebooks"),
        ({"preset": "stu", "tokenize_args": "--codebook-size 0"}, "--codebook-size 0: give a number from 1"),
    ],
)
def test_mistakes_are_told_before_the_first_job(
    options: PipelineOptions, ran: list[str], change: dict[str, str], line: str
) -> None:
    with pytest.raises(FriendrecError, match=re.escape(line)):
        pipeline.main(replace(options, **change))
    assert ran == []
    assert not Path(options.out).exists()


@pytest.mark.parametrize("name", ["base_args", "tokenize_args"])
def test_options_of_the_stu_chain_are_for_its_preset(options: PipelineOptions, name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(FriendrecError, match=f"{flag} is for preset stu: leave it out, or pass --preset stu"):
        replace(options, **{name: "--seed 1"})


def test_a_log_with_other_names_is_told_with_the_words_to_add(options: PipelineOptions, ran: list[str]) -> None:
    table = pq.read_table(options.interactions).rename_columns(["src", "target_id", "action", "timestamp"])
    pq.write_table(table.set_column(3, "timestamp", pa.array([1_700_000_000_000])), options.interactions)
    with pytest.raises(FriendrecError, match=r"run the same command with --prepare-args='--columns actor_id=src'$"):
        pipeline.main(options)
    words = "--columns actor_id=src --time-unit ms"
    with pytest.raises(FriendrecError, match=f"with --prepare-args='{words}'$"):
        pipeline.main(replace(options, prepare_args="--columns actor_id=src"))
    pipeline.main(replace(options, prepare_args=words))
    assert ran == CHAIN


def test_stages_get_their_inputs_and_options(options: PipelineOptions) -> None:
    stages = {stage.verb: stage for stage in pipeline._stages(options, "/w")}
    assert list(stages) == CHAIN
    assert stages["prepare"].args == ("--interactions", options.interactions)
    assert stages["train"].args == ("two_tower_mlp", "--data", "/w/data", "--resume", "--epochs", "1")
    assert (stages["train"].nproc, stages["export"].nproc, stages["index"].nproc) == (3, 3, 1)
    assert stages["index"].args == ("--embeddings", "/w/embeddings", "--kind", "exact")
    assert stages["evaluate"].args[-1] == "--baselines"
    assert stages["recommend"].output == "/w/recommendations"


def test_stages_of_preset_stu(options: PipelineOptions) -> None:
    """The codes are of a two-tower's embeddings, the run is of the codes, and both models stand in the report."""
    asked = replace(options, preset="stu", base_args="--epochs 7", tokenize_args="--seed 5")
    stages = pipeline._stages(asked, "/w")
    assert [stage.verb for stage in stages] == STU_CHAIN
    named = {stage.name: stage for stage in stages}
    assert list(named) == ["data", "base", "embeddings", "stu", "run", "index", "report", "recommendations"]
    assert named["base"].args == ("two_tower_mlp", "--data", "/w/data", "--resume", "--epochs", "7")
    assert named["embeddings"].args == ("--run", "/w/base", "--data", "/w/data")
    assert named["stu"].args == ("--embeddings", "/w/embeddings", "--seed", "5")
    assert named["run"].args == ("stu", "--data", "/w/data", "--tokens", "/w/stu", "--resume", "--epochs", "1")
    assert named["index"].args == ("--tokens", "/w/stu", "--kind", "stu")
    model = ("--run", "/w/run", "--data", "/w/data", "--index", "/w/index")
    assert named["report"].args == (*model, "--also", "/w/base", "--baselines")
    assert named["recommendations"].args == model
    assert [stage.nproc for stage in stages] == [1, 3, 3, 1, 3, 1, 1, 1]


@pytest.mark.parametrize(
    ("preset", "index_args", "words"),
    [
        ("two_tower_clusters", "", ["--kind", "clusters"]),
        ("two_tower_clusters", "--dtype int8", ["--kind", "clusters", "--dtype", "int8"]),
        ("two_tower_clusters", "--kind hnsw --recall 0.9", ["--kind", "hnsw", "--recall", "0.9"]),
        ("two_tower_moe", "--kind=ivf", ["--kind=ivf"]),
        ("two_tower_moe", "", ["--kind", "exact"]),
    ],
)
def test_the_kind_of_index_is_the_preset_s_unless_named(
    options: PipelineOptions, preset: str, index_args: str, words: list[str]
) -> None:
    stages = {
        stage.verb: stage for stage in pipeline._stages(replace(options, preset=preset, index_args=index_args), "/w")
    }
    assert stages["train"].args[0] == preset
    assert stages["index"].args == ("--embeddings", "/w/embeddings", *words)


def test_another_index_is_made_of_the_same_embeddings(options: PipelineOptions, ran: list[str]) -> None:
    """As long as the one before is gone."""
    pipeline.main(options)
    with pytest.raises(FriendrecError, match="begun with other --index-args: choose another --out"):
        pipeline.main(replace(options, index_args="--kind ivf"))
    for name in ("index", "report", "recommendations"):
        shutil.rmtree(Path(options.out) / name)
    ran.clear()
    pipeline.main(replace(options, index_args="--kind ivf"))
    assert ran == CHAIN[3:]


def test_the_chain_of_preset_stu_goes_on_at_the_first_unfinished_stage(
    options: PipelineOptions, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replace(options, preset="stu")
    pipeline.main(asked)
    assert ran == STU_CHAIN
    for name in ("run", "index", "report", "recommendations"):
        shutil.rmtree(Path(options.out) / name)
    ran.clear()
    capsys.readouterr()
    pipeline.main(replace(asked, train_args="--epochs 2"))
    assert ran == STU_CHAIN[4:]
    told = capsys.readouterr().out
    assert "[2/8] train two_tower_mlp: finished before\n" in told and "[5/8] train stu\n" in told
    for change in ({"base_args": "--epochs 2"}, {"tokenize_args": "--seed 1"}, {"preset": "two_tower_mlp"}):
        with pytest.raises(FriendrecError, match=f"begun with other --{next(iter(change)).replace('_', '-')}"):
            pipeline.main(replace(asked, train_args="--epochs 2", **change))


def test_stage_that_stops_before_its_end(options: PipelineOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_run", lambda *_: None)
    with pytest.raises(FriendrecError, match="prepare stopped before its end: run the same command to go on"):
        pipeline.main(options)


JOB = """
import sys
from friendrec.pipeline.cli import guarded
from friendrec.pipeline.pipeline import PipelineOptions, Stage, _run
out, users = sys.argv[1:]
stage = Stage("simulate", f"{out}/log", ("--users", users, "--events", str(2 * int(users))))
sys.exit(guarded(lambda _: _run(stage, PipelineOptions(interactions="", out=out), out) or 0, []))
"""


def start(out: Path, users: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-c", JOB, str(out), str(users)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_job_shows_its_output_and_keeps_its_log(tmp_path: Path) -> None:
    process = start(tmp_path, users=50)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "50 users, 100 events" in out
    assert (tmp_path / "log" / "manifest.json").is_file()
    assert "50 users" in next(tmp_path.glob("logs/**/stdout.log")).read_text()


def test_failed_job_is_told_in_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, users=0)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: " in out
    last = err.strip().splitlines()[-1]
    assert last == "error: simulate failed, see its output above; the same command goes on from here"
    assert "Traceback" not in out + err


def test_signal_ends_the_job_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    process = start(tmp_path, users=5_000_000)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".log.attempt-*")):
        assert time.monotonic() < deadline, "the job did not start"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
