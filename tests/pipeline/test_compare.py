"""Rows that differ by what they say, differences that are paired, and cells that are made once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline import cells, compare, evaluate, export, tokenize, train
from friendrec.pipeline.climb import ROWS, Row, chosen_rows, rows_before
from friendrec.pipeline.compare import CompareOptions
from friendrec.pipeline.config import preset
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.evaluation import report
from friendrec.pipeline.evaluation.comparison import recalls
from friendrec.pipeline.evaluation.results import MODEL, Evaluation
from friendrec.pipeline.evaluation.stored import load_ranks, save_ranks
from friendrec.pipeline.evaluation.tasks import STATES, TASKS, Events
from friendrec.pipeline.export import ExportOptions
from friendrec.pipeline.inference import open_recommender
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.tokenize import TokenizeOptions
from tests.training import at_step, joined, losses, publish_data

NAMES = [row.name for row in ROWS]


def settings(row: Row) -> dict[str, Any]:
    """Every field of the run that a row trains, by path."""
    config = train.parse([row.preset, "--data=d", "--out=o", *row.flags]).config.to_dict()
    nested = {f"{part}.{name}": value for part in config if part != "preset" for name, value in config[part].items()}
    assert len(nested) > 30
    return nested


@pytest.mark.parametrize(
    ("name", "path", "values"),
    [
        ("history", "model.history_encoder", ("none", "pooled_attention")),
        ("mlp", "model.interaction", ("none", "mlp")),
        ("moe", "model.interaction", ("mlp", "moe")),
        ("temporal", "reader.temporal", (False, True)),
        ("copy_term", "model.copy_term", (False, True)),
        ("transformer", "model.history_encoder", ("pooled_attention", "transformer")),
        ("clusters", "model.clusters", ("off", "residual")),
    ],
)
def test_a_row_differs_from_the_one_before_in_what_it_says_alone(name: str, path: str, values: tuple[Any, Any]) -> None:
    place = NAMES.index(name)
    before, after = settings(ROWS[place - 1]), settings(ROWS[place])
    assert {field for field in after if before[field] != after[field]} == {path}
    assert (before[path], after[path]) == values


def test_the_climb_starts_with_two_ids_and_ends_with_the_preset() -> None:
    start = settings(ROWS[0])
    assert (start["model.history_encoder"], start["model.interaction"]) == ("none", "none")
    assert not start["model.copy_term"] and not start["reader.temporal"]
    ours, end = preset("two_tower_moe").to_dict(), settings(ROWS[NAMES.index("transformer")])
    assert all(ours[part][name] == end[f"{part}.{name}"] for part, _, name in (path.partition(".") for path in end))


def test_the_row_that_writes_codes_is_its_preset_and_brings_the_row_they_are_of() -> None:
    row, before = ROWS[NAMES.index("stu")], ROWS[NAMES.index("transformer")]
    assert (row.preset, row.flags, row.codes_of) == ("stu", [], before.name)
    ours, theirs = settings(row), settings(before)
    assert {field for field in ours if field.startswith("training") and ours[field] != theirs[field]} == set()
    assert ours["reader.batch_size"] == theirs["reader.batch_size"]
    assert chosen_rows("stu") == [before, row]
    assert chosen_rows("history") == [ROWS[NAMES.index("history")]]
    compared = {"history": "id_dot_product", "transformer": "history", "clusters": "transformer", "stu": "transformer"}
    assert rows_before(chosen_rows("id_dot_product,history,clusters,stu")) == compared


# Differences.


def random_rows(names: list[str], num_events: int = 60) -> dict[str, Evaluation]:
    rng = np.random.default_rng(0)
    index, is_new = np.arange(num_events), rng.random(num_events) < 0.6
    events = Events(
        index, rng.integers(0, 9, num_events), index, index, is_new, is_new & (rng.random(num_events) < 0.5)
    )
    ranks = {name: {state: rng.integers(1, 25, (3, num_events)) / 1.0 for state in STATES} for name in names}
    return {name: Evaluation(events, {MODEL: ranks[name]}) for name in names}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("state", STATES)
def test_differences_are_paired_by_user(task: str, state: str) -> None:
    """Users are drawn one by one; both rows are asked about all events of the drawn, as often as they are drawn."""
    rows = random_rows(["first", "second", "third"])
    found = recalls(rows, {"second": "first", "third": "first"})
    events = rows["first"].events
    chosen = np.flatnonzero(events.of_task(task))
    level = {"next_contact": 0, "new_link": 1, "reply": 1, "unprompted_link": 2}[task]
    hits = {name: row.ranks[MODEL][state][level][chosen] <= 10 for name, row in rows.items()}
    users = sorted(set(events.actor[chosen].tolist()))
    rng = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {"second": [], "third": []}
    for draw in rng.integers(len(users), size=(1000, len(users))):
        asked = np.concatenate([np.flatnonzero(events.actor[chosen] == users[u]) for u in draw])
        for name, before in (("second", "first"), ("third", "first")):
            drawn[name].append(float(np.mean(hits[name][asked]) - np.mean(hits[before][asked])))
    for name, before in (("second", "first"), ("third", "first")):
        own = found[name][task][state]
        assert own["recall@10"] == pytest.approx(hits[name].mean())
        assert own["difference"] == pytest.approx(hits[name].mean() - hits[before].mean())
        assert own["difference_ci"] == pytest.approx(np.quantile(drawn[name], [0.025, 0.975]))
    assert "difference" not in found["first"][task][state]


def test_ranks_are_stored_with_their_events(tmp_path: Path) -> None:
    (saved,) = random_rows(["row"]).values()
    saved.ranks[MODEL]["live"][0, :5] = [np.nan, np.inf, 1.5, 2, 3]
    save_ranks(tmp_path, saved)
    loaded = load_ranks(tmp_path)
    for name, values in vars(saved.events).items():
        np.testing.assert_array_equal(getattr(loaded.events, name), values)
    assert loaded.ranks[MODEL].keys() == {"live", "frozen"}
    for state in STATES:
        np.testing.assert_array_equal(loaded.ranks[MODEL][state], saved.ranks[MODEL][state])


# Mistakes.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("compare") / "data", users=60, events=700)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--rows=mpl"], "--rows has no row 'mpl': did you mean mlp?"),
        (["--minutes=0"], "--minutes must be above 0"),
        (["--nproc=0"], "--nproc at least 1"),
        (["--data=gone"], "gone does not exist: pass --data what `friendrec prepare` made"),
        (["--out=s3://bucket/x"], "runs need a directory"),
        (["--rws=mlp"], "did you mean --rows?"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(data: Path, tmp_path: Path, argv: list[str], line: str) -> None:
    with pytest.raises(FriendrecError) as raised:
        compare.main(compare.parse([f"--data={data}", f"--out={tmp_path / 'out'}", *argv]))
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


# Cells.


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs run in this process, without pictures in the rows' own reports; `verb place` of each."""
    calls: list[str] = []

    def call(place: Path, words: list[str], nproc: int, out: Path) -> None:
        calls.append(f"{words[0]} {place.name}")
        with joined():
            if words[0] == "train":
                train.main(train.parse(words[1:]))
                return
            named = dict(zip(words[1::2], words[2::2], strict=False))
            if words[0] == "export":
                export.main(ExportOptions(run=named["--run"], data=named["--data"], out=named["--out"]))
            elif words[0] == "tokenize":
                tokenize.main(TokenizeOptions(embeddings=named["--embeddings"], out=named["--out"]))
            else:
                options = {name: named.get(f"--{name}") for name in ("data", "run", "also", "period", "out")}
                evaluate.main(EvaluateOptions(**options, baselines="--baselines" in words))  # type: ignore[arg-type]

    monkeypatch.setattr(cells, "call", call)
    monkeypatch.setattr(report, "write_report", lambda *_: None)
    parse = train.parse
    monkeypatch.setattr(train, "parse", lambda argv: parse([*argv, "--dim=8", "--workers=0"]))
    return calls


def test_a_finished_cell_is_not_repeated_and_a_begun_one_goes_on(
    data: Path, tmp_path: Path, called: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = CompareOptions(data=str(data), out=str(tmp_path / "out"), rows="mlp,history", epochs=3)

    def stop() -> None:
        if called[-1] == "train mlp":
            raise KeyboardInterrupt

    with at_step(2, stop), pytest.raises(KeyboardInterrupt):
        compare.main(options)
    first = ["evaluate baselines", "train history", "evaluate history", "train mlp"]
    assert called == first
    run = tmp_path / "out" / "rows" / "mlp" / "run"
    before = (run / "metrics.jsonl").read_text().splitlines()
    assert len(losses(run)) == 2 and not (tmp_path / "out" / "manifest.json").exists()
    called.clear()
    compare.main(options)
    assert called == ["train mlp", "evaluate mlp"]
    after = (run / "metrics.jsonl").read_text().splitlines()
    assert after[:2] == before[:2], "what was done before the checkpoint, to the hundredth of a second"
    assert len(losses(run)) == 3
    called.clear()
    capsys.readouterr()
    compare.main(options)
    assert called == []
    assert "mlp" in capsys.readouterr().out
    more = CompareOptions(data=str(data), out=str(tmp_path / "out"), rows="history,mlp,moe", epochs=3)
    compare.main(more)
    assert called == ["train moe", "evaluate moe"]
    check(tmp_path / "out", data, ["history", "mlp", "moe"])
    with pytest.raises(FriendrecError, match="with another budget"):
        compare.main(CompareOptions(data=str(data), out=str(tmp_path / "out"), rows="mlp", epochs=4))


def test_codes_are_of_the_row_before_and_both_lists_are_merged(
    data: Path, tmp_path: Path, called: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = CompareOptions(data=str(data), out=str(tmp_path / "out"), rows="stu", epochs=1)
    compare.main(options)
    made = ["export stu", "tokenize stu", "train stu", "evaluate stu"]
    assert called == ["evaluate baselines", "train transformer", "evaluate transformer", *made]
    check(tmp_path / "out", data, ["transformer", "stu"])
    rows = tmp_path / "out" / "rows"
    assert open_published(rows / "stu" / "embeddings")[1].inputs["run"]["path"] == str(rows / "transformer" / "run")
    assert open_published(rows / "stu" / "run")[1].inputs["tokens"]["path"] == str(rows / "stu" / "stu")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["rows"]["stu"]["steps"] == metrics["rows"]["transformer"]["steps"]
    own = json.loads((rows / "stu" / "report" / "metrics.json").read_text())
    assert metrics["fusion"] == {"stu": own["beside"]["fusion"]}
    merged = f"{metrics['fusion']['stu']['new_link']['live']['recall@10']:.3f}"
    for page in (capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()):
        assert merged in page.partition("fusion")[2]
    called.clear()
    compare.main(options)
    assert called == []


def check(out: Path, data: Path, names: list[str]) -> None:
    """The figures are those of the rows' reports and models."""
    _, manifest = open_published(out, "comparison", verify=True)
    assert set(manifest.files) == {"metrics.json", "report.html"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["rows"]) == names
    assert metrics["protocol"]["period"] == "validation"
    html = (out / "report.html").read_text()
    for name, row in metrics["rows"].items():
        own = json.loads((out / "rows" / name / "report" / "metrics.json").read_text())
        for task in TASKS:
            for state in STATES:
                for figure in ("recall@10", "recall@10_ci"):
                    assert row["tasks"][task][state][figure] == pytest.approx(own["tasks"][task][state][figure])
        model = open_recommender(out / "rows" / name / "run", data).model
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["table_bytes"] == sum(4 * p.numel() for p in model.lookup.parameters())
        assert row["table_bytes"] + row["dense_bytes"] == 4 * row["parameters"]
        assert row["queries_per_second"] > 0 and row["steps"] > 0
        assert f"<td>{name}</td>" in html
    baselines = json.loads((out / "rows" / "baselines" / "report" / "metrics.json").read_text())["baselines"]
    live = {name: tasks["new_link"]["live"].get("recall@10", -1) for name, tasks in baselines.items()}
    assert metrics["baselines"]["new_link"]["live"]["recall@10"] == max(live.values())


@pytest.mark.long
def test_sigterm_ends_the_row_and_the_same_command_goes_on_with_two_processes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "friendrec", "compare", "--data", str(data), "--out", str(out)]
    command += ["--rows", "temporal,copy_term", "--nproc", "2", "--epochs", "2"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 120
    while not (out / "rows" / "temporal" / "run" / "config.json").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True)
    check(out, data, ["temporal", "copy_term"])
    assert json.loads((out / "metrics.json").read_text())["budget"]["processes"] == 2
    assert "trained" in (out / "rows" / "copy_term" / "train.log").read_text()
