"""`friendrec show` tells what a directory is and where it comes from, for every kind, finished or not."""

import json
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline import index, show, tokenize, update
from friendrec.pipeline.description import epochs_table, plan_table
from friendrec.pipeline.embeddings import write_centroids, write_part
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.publish import KINDS, publish
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.show import ShowOptions, size
from friendrec.pipeline.tokenize import TokenizeOptions
from friendrec.pipeline.update import UpdateOptions
from tests.training import export_run, index_embeddings, publish_data, recommend_run, train_run

METRICS = {
    "protocol": {"name": "temporal", "period": "validation", "candidates": 1676},
    "tasks": {"next_contact": {"live": {"recall@10": 0.512}, "frozen": {"recall@10": 0.25}}},
    "beside": {"fusion": {"next_contact": {"live": {"recall@10": 0.625}}}},
}
COST = {
    "parameters": 1234, "table_bytes": 70, "dense_bytes": 7, "steps": 5, "examples_per_second": 56,
    "queries_per_second": 90,
}  # fmt: skip
LIVE = {"live": {"recall@10": 0.512}}
MERGED = {"live": {"recall@10": 0.625, "difference": 0.1, "difference_ci": [0, 1]}}
TASKS = ("next_contact", "new_link", "reply", "unprompted_link")
COMPARISON = {
    "protocol": METRICS["protocol"],
    "rows": {"history": {"tasks": dict.fromkeys(TASKS, LIVE), "new_users": {"recall@10": 0.1}, **COST}},
    "fusion": {"stu": dict.fromkeys(TASKS, MERGED)},
    "baselines": dict.fromkeys(TASKS, LIVE),
}

AT_SHARE = {"task_recall": 0.31, "of_exact": 0.93}
FRONTIER = {
    "candidates": 1676, "queries": 700, "lists": 36,
    "exact": {"task_recall@100": 0.512, "queries_per_second": 1234.4},
    "kinds": {
        "clusters": {
            "at_share": {"5.0%": AT_SHARE}, "share_at_95_percent_of_exact": 0.061,
            "speed_at_task_recall": {"95%": 777.0},
        },
    },
}  # fmt: skip
RATIO = {
    "before": 0.4,
    "after": 0.39,
    "difference": -0.01,
    "difference_ci": [-0.02, 0.001],
    "ratio": 0.975,
    "ratio_ci": [0.95, 1.01],
}
SPEED = {
    "before": 500.0,
    "after": 1500.0,
    "difference": 1000.0,
    "difference_ci": [900, 1100.4],
    "ratio": 3.0,
    "ratio_ci": [2.9, 3.1],
}
EFFECT = {"recall@10": RATIO, "queries_per_second": SPEED}
INSIGHT = {
    "data": {
        "collegemsg": {
            "finding": "collegemsg: the search matters more",
            "effects": [{"factor": "share", "level": "10 %"} | EFFECT],
            "clusters": {"100 %": EFFECT},
        }
    }
}


def shown(capsys: pytest.CaptureFixture[str], place: Any, **options: bool) -> str:
    capsys.readouterr()
    show.main(ShowOptions(directory=str(place), **options))
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory of every kind; the report, the log and the comparison hold what `show` reads of them."""
    folder = tmp_path_factory.mktemp("show")
    data, run, embeddings, indexed = (str(folder / name) for name in ("data", "run", "embeddings", "index"))
    with publish(folder / "log", kind="log", options={}, inputs={}, extra={"users": 150, "seed": 3}) as attempt:
        (attempt / "interactions").mkdir()
        pq.write_table(pa.table({"actor_id": [1]}), attempt / "interactions" / "part-0.parquet")
    publish_data(Path(data))
    train_run(Path(data), Path(run), "--epochs=2", "--patience=0", "--workers=0")
    export_run(run=run, data=data, out=embeddings)
    index_embeddings(Path(embeddings), Path(indexed))
    tokenize.main(TokenizeOptions(embeddings=embeddings, codebook_size=16, out=str(folder / "stu")))
    recommend_run(run=run, data=data, index=indexed, k=3, out=str(folder / "recommendations"))
    for name, metrics in (
        ("report", METRICS),
        ("comparison", COMPARISON),
        ("insight", INSIGHT),
        ("frontier", FRONTIER),
    ):
        with publish(folder / name, kind=name, options={}, inputs={"data": data}) as attempt:
            (attempt / ("summary.json" if name == "frontier" else "metrics.json")).write_text(json.dumps(metrics))
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("log", ["users     150", "seed      3"]),
        ("data", ["145, ", " of them in train", "message (target)", "request (history)"]),
        ("run", ["two_tower_mlp", "dim 8", "num_heads 2", "2 epochs", "row_wise"]),
        ("embeddings", ["138", "9 × float32", "made from", "run: ", "data: "]),
        ("stu", ["138", "rqkmeans", "16 × 16 × 16 tokens", "perplexity", "embeddings: "]),
        ("index", ["exact", "138", "embeddings: "]),
        ("report", ["report.html", "0.512", "0.250", "fusion", "0.625"]),
        ("recommendations", ["145", "435, at most 3 a user"]),
        ("frontier", ["1,676", "700", "0.512, 1,234 queries/s", "clusters", "0.310 [93%]", "6.10%", "777"]),
        (
            "insight",
            [
                "collegemsg  the search matters more",
                "10 % compared",
                "×0.975 (0.950–1.010)",
                "×3.000 (2.900–3.100)",
                "-0.0100 (-0.0200 to +0.0010)",
                "+1,000 (+900 to +1,100)",
                "clusters, 100 %",
            ],
        ),
        ("comparison", ["history", "0.512", "1,234", "fusion with stu", "0.625 +0.100 "]),
    ],
)
def test_every_kind_is_told(capsys: pytest.CaptureFixture[str], made: Path, kind: str, words: list[str]) -> None:
    text = shown(capsys, made / kind)
    assert text.startswith(f"{made / kind}: {KINDS[kind][0]}\n")
    for word in [
        *words,
        "sizes agree",
        "friendrec 0.",
        json.loads((made / kind / "manifest.json").read_text())["created"],
    ]:
        assert word in text


def test_an_index_of_clusters_tells_its_lists_and_its_updates(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    vectors = np.random.default_rng(0).standard_normal((40, 3), np.float32)
    for name, users in (("embeddings", np.arange(40)), ("newer", np.arange(30, 45) % 43)):
        with publish(tmp_path / name, kind="embeddings", options={}, inputs={}) as attempt:
            write_part(attempt / "part-0.parquet", users, vectors[: len(users)], vectors[: len(users)], "float32")
            write_centroids(attempt, Centroids(vectors[:4].copy(), 2))
    pq.write_table(pa.table({"user_id": [5, 6]}), tmp_path / "leaving.parquet")
    built = str(tmp_path / "index")
    words = {"kind": "clusters", "nprobe": 2, "dtype": "int8"}
    index.main(IndexOptions(embeddings=str(tmp_path / "embeddings"), out=built, **words))  # type: ignore[arg-type]
    text = shown(capsys, built)
    for fact in (
        "clusters",
        "lists       4",
        "cells       2",
        "copies      1",
        "nprobe      2",
        "int8",
        "candidates  40",
    ):
        assert fact in text
    assert "int8" in text and "updates" not in text
    update.main(UpdateOptions(index=built, embeddings=str(tmp_path / "newer")))
    update.main(UpdateOptions(index=built, delete=str(tmp_path / "leaving.parquet"), compact=True))
    text = shown(capsys, built)
    assert "candidates  43" in text and "deleted     2" in text
    rows = [[cell.strip() for cell in line.split("│")[2:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["3", "12", "", "", str(tmp_path / "newer")],
        ["", "", "", "2", str(tmp_path / "leaving.parquet")],
        ["", "", "", "", "itself, compacted"],
    ]


def test_all_kinds_were_tried(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == set(KINDS)


def test_epochs_of_a_run_are_those_of_its_metrics(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    lines = [json.loads(line) for line in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    first = [line["loss"] for line in lines[: next(i for i, line in enumerate(lines) if "validation" in line)]]
    text = shown(capsys, made / "run")
    assert f"{sum(first) / len(first):.3f}" in text
    for line in lines:
        if "validation" in line:
            assert f"{line['validation']['new_link']['recall@10']:.3f}" in text
    best = json.loads((made / "run" / "manifest.json").read_text())["extra"]["progress"]["best_step"]
    (marked,) = [row for row in text.splitlines() if "│ * │" in row]
    assert f" {best:,} " in marked


def test_lineage_goes_back_and_tells_what_is_gone_or_changed(
    capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path
) -> None:
    lines = shown(capsys, made / "recommendations").partition("made from\n")[2].splitlines()
    told = [line.split(": ")[0] for line in lines]
    assert told == ["  data", "  index", "    embeddings", "      data", "      run", "        data", "  run"]
    assert sum("see above" in line for line in lines) == 3
    names = ("data", "embeddings", "index")
    for name in names:
        shutil.copytree(made / name, tmp_path / name)
        path = tmp_path / name / "manifest.json"
        path.write_text(path.read_text().replace(str(made), "/nowhere"))
    text = shown(capsys, tmp_path / "index")
    assert f"embeddings: {tmp_path}/embeddings, unchanged: embeddings, made" in text
    assert f"data: {tmp_path}/data, unchanged" in text
    assert "run: /nowhere/run, gone\n" in text
    (tmp_path / "data").rename(tmp_path / "old")
    publish_data(tmp_path / "data", seed=1)
    path = tmp_path / "embeddings" / "manifest.json"
    path.write_text(path.read_text().replace("/nowhere", str(tmp_path)))
    assert f"data: {tmp_path}/data, changed" in shown(capsys, tmp_path / "embeddings")


def test_a_raw_log_is_compared_when_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    log.write_bytes(b"events")
    with publish(tmp_path / "out", kind="odd", options={}, inputs={"interactions": log}, extra={"size": 7}) as attempt:
        (attempt / "file").write_text("x")
    assert f"interactions: {log}, not checked\n" in shown(capsys, tmp_path / "out")
    assert f"interactions: {log}, unchanged\n" in shown(capsys, tmp_path / "out", verify=True)
    log.write_bytes(b"others")
    assert f"interactions: {log}, changed\n" in shown(capsys, tmp_path / "out", verify=True)


def test_a_folder_of_a_log_leads_to_the_log(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    inputs = {"interactions": made / "log" / "interactions"}
    with publish(tmp_path / "out", kind="odd", options={}, inputs=inputs) as attempt:
        (attempt / "file").write_text("x")
    assert f"interactions: {made}/log/interactions, unchanged: a log, made" in shown(capsys, tmp_path / "out")


def test_damage_is_told(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_bytes(file.read_bytes()[::-1])
    assert "sizes agree" in shown(capsys, tmp_path / "run")
    assert "damaged, config.json has another checksum; make it again" in shown(capsys, tmp_path / "run", verify=True)
    file.unlink()
    assert "damaged, config.json is missing; make it again" in shown(capsys, tmp_path / "run")


def test_behind_a_url(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    url = f"memory://{uuid4().hex}/embeddings"
    export_run(run=str(made / "run"), data=str(made / "data"), out=url)
    text = shown(capsys, url, verify=True)
    assert text.startswith(f"{url}: embeddings\n")
    for word in ("138", "9 × float32", "checksums agree", f"run: {made}/run, unchanged"):
        assert word in text


def test_an_unfinished_run_says_how_to_go_on(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(made / "run", out)
    (out / "manifest.json").unlink()
    newest = max(out.glob("checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    description = json.loads((newest / "checkpoint.json").read_text())
    description["extra"]["progress"] |= {"epoch": 1, "seconds": 90.0}
    (newest / "checkpoint.json").write_text(json.dumps(description))
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"half a li')
    text = shown(capsys, out)
    step = int(newest.name.removeprefix("step-"))
    assert text.startswith(f"{out}: a run that is not finished, or still trains\n")
    assert f"step {step:,} in epoch 2 of 2, after 1.5 of at most 10 minutes" in text
    assert f"friendrec train two_tower_mlp --data DATA --out {out} --resume" in text
    assert "row_wise" in text
    shutil.rmtree(out / "checkpoints")
    assert "no checkpoint yet" in shown(capsys, out)


def test_the_directory_of_a_pipeline(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "pipeline.json").write_text(json.dumps({"interactions": "0f", "preset": "two_tower_mlp"}))
    lines = shown(capsys, tmp_path).splitlines()
    assert any(line.split()[:2] == ["data", "made"] for line in lines)
    assert sum("not finished: the same command goes on" in line for line in lines) == 5
    (tmp_path / "pipeline.json").write_text(json.dumps({"interactions": "0f", "preset": "stu"}))
    told = [line.split()[0] for line in shown(capsys, tmp_path).splitlines()[2:]]
    assert told == ["data", "base", "embeddings", "stu", "run", "index", "report", "recommendations"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, None])
def test_what_is_not_ours_is_one_line(tmp_path: Path, make: Any) -> None:
    place = tmp_path / "place"
    if make is not None:
        make(place)
    with pytest.raises(FriendrecError, match=r"not made by friendrec: check|does not exist: check") as caught:
        show.main(ShowOptions(directory=str(place)))
    assert "\n" not in str(caught.value)


def test_a_config_of_others_is_one_line(tmp_path: Path) -> None:
    for content in ("{}", "[]", "no"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(FriendrecError, match=r"has a config.json that is not a run's: check the path"):
            show.main(ShowOptions(directory=str(tmp_path)))


def test_sizes_and_plans() -> None:
    assert [size(n) for n in (0, 999, 1500, 2_500_000, 3e9)] == ["0 bytes", "999 bytes", "1.5 kB", "2.5 MB", "3.0 GB"]
    row = {"table": "user", "sharding": "row_wise", "first_row": 0, "rows": 50, "dim": 8}
    table = plan_table([row | {"rank": 0}, row | {"rank": 1, "first_row": 50, "rows": 49}])
    assert [list(column.cells) for column in table.columns] == [["user"], ["row_wise"], ["2"], ["99"], ["8"]]
    columns = {"table": "user", "sharding": "column_wise", "first_row": 0, "rows": 50, "dim": 4}
    table = plan_table([columns | {"rank": r, "first_column": 4 * r} for r in (0, 1)])
    assert [next(iter(column.cells)) for column in table.columns][2:] == ["2", "50", "8"]
    assert epochs_table([], 0).row_count == 0
