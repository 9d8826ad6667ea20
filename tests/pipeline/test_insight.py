"""Runs are made once and shared with `compare`; the figures are those of the runs' own searches."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from friendrec import __version__
from friendrec.datasets.prepared import load_prepared
from friendrec.errors import FriendrecError
from friendrec.pipeline import cells, cli, insight, train
from friendrec.pipeline.cli import read_verb
from friendrec.pipeline.climb import ROWS
from friendrec.pipeline.config import preset
from friendrec.pipeline.evaluation import speed
from friendrec.pipeline.evaluation.reduced import SHARES, Searches
from friendrec.pipeline.evaluation.scoring import recommender_ranks
from friendrec.pipeline.evaluation.tasks import scored_events
from friendrec.pipeline.inference import Recommender, open_recommender
from friendrec.pipeline.insight import InsightOptions, rows_of
from friendrec.pipeline.manifest import put_manifest
from friendrec.pipeline.publish import open_published, publish, write_manifest
from tests.training import joined, publish_data

NAMES = ["mlp-0", "mlp-clusters-0", "moe-0", "moe-clusters-0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("insight") / "small", users=150, events=900)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trains in this process, and times in it too; what each was called for. A tenth is nearly all of so few users."""
    calls: list[str] = []

    def call(place: Path, words: list[str], nproc: int, out: Path) -> None:
        calls.append(f"{words[0]} {place.name}")
        with joined():
            train.main(train.parse(words[1:]))

    def measured(*arguments: Any) -> Any:
        calls.append("time")
        return measure(*arguments)

    monkeypatch.setattr(cells, "call", call)
    measure = speed.measure
    monkeypatch.setattr(speed, "measure", measured)
    monkeypatch.setitem(SHARES, "10 %", 0.9)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    parse = train.parse
    monkeypatch.setattr(train, "parse", lambda argv: parse([*argv, "--dim=8", "--workers=0", "--num-clusters=9"]))
    return calls


def run(data: Path, out: Path, **options: Any) -> dict[str, Any]:
    insight.main(InsightOptions(data=(str(data),), out=str(out), epochs=1, **{"seeds": "0", **options}))
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


def test_rows_are_the_presets_with_one_switch() -> None:
    rows = rows_of(7)
    configs = [train.parse([row.preset, "--data=d", "--out=o", *row.flags]).config for row in rows]
    assert [(config.model.interaction, config.model.clusters) for config in configs] == [
        ("mlp", "off"), ("mlp", "residual"), ("moe", "off"), ("moe", "residual"),
    ]  # fmt: skip
    assert {config.training.seed for config in configs} == {7}
    assert read_verb(["insight", "--data=a", "--data", "b", "--out=c"])[1].data == ("a", "b")


@pytest.mark.long
def test_cells_are_made_once_and_measured_as_they_are(
    data: Path, tmp_path: Path, called: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    metrics = run(data, out)
    assert called == [*(f"train {name}" for name in NAMES), "time"]
    _, manifest = open_published(out, "insight", verify=True)
    assert set(manifest.files) == {"metrics.json", "report.html"}
    found = metrics["data"]["small"]
    check_cells(out / "small" / "rows", data, found)
    said = capsys.readouterr().out
    assert found["finding"] in said and "1 % is left out: one list of" in said and "too few" not in said
    assert [(effect["factor"], effect["level"]) for effect in found["effects"]] == [
        ("model", "two_tower_moe"), ("clusters", "on"), ("share", "10 %"),
    ]  # fmt: skip
    called.clear()
    run(data, out)
    assert called == [], "found finished"
    assert found["finding"] in capsys.readouterr().out
    with pytest.raises(FriendrecError, match="with another budget"):
        run(data, out, minutes=1.0, seeds="0,1")


def check_cells(rows: Path, data: Path, found: dict[str, Any]) -> None:
    """Exact recall is what an evaluation of the run says, that of a smaller search what the lists opened hold."""
    assert [Path(cell["run"]).parent.name for cell in found["cells"][::2]] == NAMES
    for exact, tenth in zip(found["cells"][::2], found["cells"][1::2], strict=True):
        recommender = open_recommender(exact["run"], data)
        assert live_recall(recommender) == pytest.approx(exact["recall@10"])
        assert (exact["share"], exact["share_compared"], exact["nprobe"]) == ("100 %", 1.0, 0)
        assert (tenth["share"], tenth["model"], tenth["clusters"]) == ("10 %", exact["model"], exact["clusters"])
        assert 0 < tenth["share_compared"] <= 0.95 and tenth["nprobe"] >= 1  # chosen on a sample, here on all
        searches = Searches.load(rows / Path(exact["run"]).parent.name / "searches")
        assert searches.hits[0].mean() == pytest.approx(exact["recall@10"])
        assert np.isnan(searches.hits[2]).all() and searches.least > 0.01
        for cell in (exact, tenth):
            assert cell["queries_per_second"] == pytest.approx(1e3 / (cell["encode_ms"] + cell["search_ms"]))


def live_recall(recommender: Recommender) -> float:
    events, _ = scored_events(recommender.data, "validation", recommender.exclusions)
    ranks = recommender_ranks(recommender.data, events, recommender.exclusions, recommender, "live")
    return float((ranks[1][events.is_new] <= 10).mean())


@pytest.mark.long
def test_more_seeds_and_runs_of_a_comparison(data: Path, tmp_path: Path, called: list[str]) -> None:
    out, comparison = tmp_path / "out", tmp_path / "comparison"
    budget = cells.Budget(data=str(data), minutes=2.0, epochs=1, nproc=1)
    row = next(row for row in ROWS if row.name == "clusters")
    place = comparison / "rows" / "clusters"
    cells.train_cell(cells.plan(row, place, budget, load_prepared(data)), budget)
    called.clear()
    metrics = run(data, out, comparisons=str(comparison))
    assert called == ["train mlp-0", "train mlp-clusters-0", "train moe-0", "time"]
    assert str(place / "run") in {cell["run"] for cell in metrics["data"]["small"]["cells"]}
    called.clear()
    metrics = run(data, out, comparisons=str(comparison), seeds="0,1")
    assert called == [*(f"train {name[:-1]}1" for name in NAMES), "time"]
    assert list(metrics["data"]["small"]["effects"][0]["recall@10"]["ratio_by_seed"]) == ["0", "1"]


def test_a_run_counts_as_made_whatever_its_preset_is_called(data: Path, tmp_path: Path) -> None:
    """Not one of another budget, of other data, by another friendrec, cut short otherwise, nor an unfinished one."""
    budget = cells.Budget(data=str(data), minutes=2.0, epochs=1, nproc=1)
    prepared = load_prepared(data)
    cell = cells.plan(rows_of(0)[3], tmp_path / "mine", budget, prepared)

    def begun(name: str, **changes: Any) -> Path:
        theirs = cells.plan(next(row for row in ROWS if row.name == "clusters"), tmp_path / name, budget, prepared)
        identity = theirs.config.identity({"data": data})
        identity["config"]["training"] |= changes.pop("training", {})
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "config.json").write_text(json.dumps(identity | changes))
        return tmp_path / name / "run"

    def finished(run: Path, step: int = cell.steps, processes: int = 1, version: str = __version__) -> Path:
        extra = {"progress": {"step": step}, "world_size": processes}
        made = write_manifest(run, kind="run", options={}, inputs={}, extra=extra)
        put_manifest(run, replace(made, versions=made.versions | {"friendrec": version}))
        return run

    runs = [
        finished(begun("other", training={"max_minutes": 3.0})),
        finished(begun("strange", data="other")),
        finished(begun("old"), version="0.0.1"),
        finished(begun("short"), step=cell.steps - 1, processes=2),
        begun("unfinished"),
    ]
    assert cells.made_before(cell, budget, runs) == cell
    for name, how in (("whole", {"processes": 2}), ("as short", {"step": cell.steps - 1}), ("good", {})):
        good = finished(begun(name), **how)  # type: ignore[arg-type]
        assert cells.made_before(cell, budget, [*runs, good]).run == good
    assert cells.made_before(cells.plan(rows_of(0)[2], tmp_path / "mine", budget, prepared), budget, [good]).run != good


def test_data_is_called_as_its_directory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    options = InsightOptions(data=(".", "..", "b/", "s3://bucket/c/"), out="out", seeds="00,7")
    assert options.names == ["a", tmp_path.name, "b", "c"]
    assert options.each_seed == [0, 7] and options.settings["seeds"] == "0,7"


def test_runs_that_were_cut_short_are_named(tmp_path: Path) -> None:
    planned = []
    for row, step in zip(rows_of(0), (7, 5, 7, 1), strict=True):
        with publish(tmp_path / row.name, kind="run", options={}, inputs={}, extra={"progress": {"step": step}}) as run:
            (run / "config.json").write_text("{}")
        planned.append(cells.Cell(row, tmp_path, tmp_path / row.name, [], preset("two_tower_mlp"), steps=7))
    (line,) = insight._cut_short(planned, 0.5)
    assert line == "0.5 minutes were too few for the 7 steps of a run: mlp-clusters-0 5, moe-clusters-0 1"
    assert insight._cut_short(planned[::2], 0.5) == []


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--seeds=a"], "--seeds a: give whole numbers"),
        (["--seeds=,"], "--seeds ,: give whole numbers"),
        (["--seeds=0,-1"], "--seeds 0,-1: give whole numbers"),
        (["--seeds=0,0"], "--seeds 0,0: one is there twice"),
        (["--seeds=3,0,00"], "--seeds 3,0,00: one is there twice"),
        (["--data=/"], "--data / has no name"),
        (["--data=s3://bucket/x/.."], "--data s3://bucket/x/.. has no name"),
        (["--data={data}/."], "two are of one name"),
        (["--minutes=0"], "--minutes must be above 0"),
        (["--data={data}/../small"], "two are of one name"),
        (["--data=gone"], "gone does not exist: pass --data what `friendrec prepare` made"),
        (["--out=s3://bucket/x"], "runs need a directory"),
        (["--comparisons=gone"], "--comparisons gone does not exist: pass what `friendrec compare` made"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    words = [f"--data={data}", f"--out={tmp_path / 'out'}", *(word.format(data=data) for word in argv)]
    assert cli.main(["insight", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_command_itself(data: Path, tmp_path: Path) -> None:
    """Processes of its own train and time; 10 % of so few users hold no list, so that nothing can be compared."""
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "friendrec", "insight", "--data", str(data), "--out", str(out)]
    command += ["--seeds", "3", "--epochs", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert {cell["share"] for cell in metrics["data"]["small"]["cells"]} == {"100 %"}
    assert "no list fits in the shares asked for" in done.stdout
