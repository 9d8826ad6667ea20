"""From a log to recommendations: by the one command as TorchX jobs, and verb by verb on ids and roles of every kind."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import friendrec
from friendrec.datasets.simulator import simulate
from friendrec.errors import FriendrecError
from friendrec.pipeline import cli, evaluate, export, index, pipeline, prepare, recommend
from friendrec.pipeline.evaluation.fitted import FITTED_BASELINES
from friendrec.pipeline.evaluation.scoring import recommender_ranks
from friendrec.pipeline.evaluation.tasks import LEVEL, STATES, TASKS, Events
from friendrec.pipeline.inference import Recommender, open_recommender
from friendrec.pipeline.pipeline import PipelineOptions, Stage
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.times import end_of_log
from tests.training import SMALL, SMALL_STU, joined, train_run

PUBLISHED = ("data", "run", "embeddings", "index", "report", "recommendations")
METRICS = {"recall@10", "recall@10_ci", "recall@50", "recall@100", "ndcg@10", "mrr", "mean_rank"}
FOUND = METRICS - {"mrr", "mean_rank"}
"""Of what a search that looks no further than a hundred finds."""


def run_pipeline(
    repository: Path, interactions: Path, out: Path, preset: str = "two_tower_mlp"
) -> "subprocess.CompletedProcess[str]":
    """The command of the README, with two processes."""
    command = [sys.executable, "-P", "-m", "torchx.cli.main", "run", "-s", "local_cwd"]
    command += ["torchx_components/components.py:pipeline", "--interactions", str(interactions), "--out", str(out)]
    command += ["--preset", preset, "--nproc", "2"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=repository, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.long
@pytest.mark.parametrize(
    ("preset", "more"), [("two_tower_mlp", ()), ("two_tower_clusters", ()), ("stu", ("base", "stu"))]
)
def test_one_command_leaves_everything(repository: Path, tmp_path: Path, preset: str, more: tuple[str, ...]) -> None:
    log, out = tmp_path / "log.parquet", tmp_path / "out"
    pq.write_table(simulate(users=300, events=3000, seed=0).interactions, log)
    run_pipeline(repository, log, out, preset)
    for name in (*PUBLISHED, *more):
        open_published(out / name, "run" if name == "base" else name, verify=True)
    assert len(list((out / "embeddings").glob("part-*.parquet"))) == 2
    assert_report_keeps_the_contract(out / "report")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
    again = run_pipeline(repository, log, out, preset)
    told = re.findall(r"\[\d/\d\] [\w ]+: finished before", again.stdout + again.stderr)
    assert len(told) == 6 + len(more)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")} == before


def assert_report_keeps_the_contract(report: Path) -> None:
    """metrics.json of design.md §3, and a page that asks the network for nothing."""
    metrics = json.loads((report / "metrics.json").read_text())
    assert {"protocol", "tasks", "baselines", "slices", "model"} <= metrics.keys()
    assert metrics["protocol"]["name"] == "temporal"
    assert metrics["protocol"]["period"] == "validation"
    assert metrics["protocol"]["candidates"] > 200
    for task in TASKS:
        assert metrics["tasks"][task]["events"] > 0
        for state in STATES:
            assert metrics["tasks"][task][state].keys() >= (FOUND if "ranked_until" in metrics["model"] else METRICS)
            for name, figures in metrics["baselines"].items():
                fitted_live = name in FITTED_BASELINES and state == "live"
                assert figures[task][state].keys() == (set() if fitted_live else METRICS)
            assert metrics["slices"]["history_length"]["0"][task][state].keys() >= {"events"}
    assert metrics["model"].keys() >= {"preset", "parameters", "train_seconds", "examples_per_second"}
    assert metrics["model"]["world_size"] == 2
    html = (report / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", html)
    assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", html)


@pytest.mark.long
def test_a_real_log_in_ten_minutes(repository: Path, shared_data: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    run_pipeline(repository, shared_data / "collegemsg.parquet", tmp_path / "out")
    assert time.monotonic() - begun < 600
    metrics = json.loads((tmp_path / "out" / "report" / "metrics.json").read_text())
    live = {name: figures["next_contact"]["live"] for name, figures in metrics["baselines"].items()}
    recalls = [figures["recall@10"] for name, figures in live.items() if name not in FITTED_BASELINES]
    assert metrics["tasks"]["next_contact"]["live"]["recall@10"] >= 0.9 * max(recalls)


ROLES = {"request": "history", "decline": "negative", "block": "exclude"}
IDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "text": lambda ids: np.array([f"Zoë {i} \"<&>',\n" for i in ids], object),
    "huge": lambda ids: np.where(ids % 2 == 0, np.iinfo(np.int64).max - ids, np.iinfo(np.int64).min + ids),
}


@pytest.fixture(scope="module", params=["text", pytest.param("huge", marks=pytest.mark.long)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every verb in turn, in this process, on a simulated network with declines and blocks and with profiles."""
    root, called = tmp_path_factory.mktemp("world"), IDS[request.param]
    network, rng = simulate(users=200, events=2500, seed=3), np.random.default_rng(0)
    actor, target, time = (network.interactions[name].to_numpy() for name in ("actor_id", "target_id", "timestamp"))
    action = np.array(network.interactions["action"].to_pylist())
    action[rng.random(len(action)) < 0.08] = "block"
    action[rng.random(len(action)) < 0.08] = "decline"
    log = {"from": called(actor), "to": called(target), "kind": action, "ms": time.astype("M8[ms]").astype(np.int64)}
    pq.write_table(pa.table(log), root / "log.parquet")
    users = network.users.set_column(0, "user_id", pa.array(called(network.users["user_id"].to_numpy())))
    pq.write_table(users, root / "users.parquet")
    data, run, embeddings, index_, recs = (str(root / part) for part in ("data", "run", "emb", "index", "recs"))
    prepare.main(
        prepare.PrepareOptions(
            interactions=str(root / "log.parquet"), users=str(root / "users.parquet"), out=data, time_unit="ms",
            columns="actor_id=from,target_id=to,action=kind,timestamp=ms", chunk_length=32,
            roles=",".join(f"{action}={role}" for action, role in ROLES.items()),
        )
    )  # fmt: skip
    train_run(Path(data), Path(run), "--epochs=2", "--workers=0")
    export.main(export.ExportOptions(run=run, data=data, out=embeddings))
    index.main(index.IndexOptions(embeddings=embeddings, out=index_))
    recommend.main(recommend.RecommendOptions(run=run, data=data, index=index_, k=1000, out=recs))
    evaluate.main(evaluate.EvaluateOptions(run=run, data=data, index=index_, baselines=True, out=str(root / "report")))
    return root


def events_of(root: Path) -> list[dict[str, Any]]:
    return sorted(pq.read_table(root / "log.parquet").to_pylist(), key=lambda event: event["ms"])


def test_recommended_are_all_strangers_and_nobody_else(world: Path) -> None:
    """Asked for more than there are, everybody gets every user of the train period but whom the log rules out."""
    log = events_of(world)
    counted = [event for event in log if event["kind"] != "block"]
    train_until = json.loads((world / "data" / "splits.json").read_text())["train_until"] // 1000
    candidates = {user for event in counted if event["ms"] < train_until for user in (event["from"], event["to"])}
    met: dict[Any, set[Any]] = {user: {user} for event in counted for user in (event["from"], event["to"])}
    for event in log:
        if event["kind"] != "block":
            met[event["from"]].add(event["to"])
        elif event["from"] in met and event["to"] in met:
            met[event["from"]].add(event["to"])
            met[event["to"]].add(event["from"])
    found: dict[Any, list[Any]] = {user: [] for user in met}
    ranks: dict[Any, list[int]] = {user: [] for user in met}
    for row in pq.read_table(world / "recs" / "part-0.parquet").to_pylist():
        found[row["user_id"]].append(row["candidate_id"])
        ranks[row["user_id"]].append(row["rank"])
    for user, known in met.items():
        assert len(found[user]) == len(set(found[user]))
        assert set(found[user]) == candidates - known
        assert ranks[user] == list(range(1, len(found[user]) + 1))


def test_counts_equal_the_log(world: Path) -> None:
    """Neither blocks nor requests nor declines are predicted; an event towards somebody blocked is not scored."""
    splits = json.loads((world / "data" / "splits.json").read_text())
    log, metrics = events_of(world), json.loads((world / "report" / "metrics.json").read_text())
    period = [e for e in log if splits["train_until"] <= e["ms"] * 1000 < splits["validation_until"]]
    asked = {(e["from"], e["to"], e["kind"], e["ms"]) for e in period if e["kind"] in ("message", "accept")}
    assert metrics["protocol"]["events"] == len(asked)
    train = [e for e in log if e["ms"] * 1000 < splits["train_until"] and e["kind"] != "block"]
    candidates = {user for event in train for user in (event["from"], event["to"])}
    blocked = {(e["from"], e["to"], e["ms"]) for e in log if e["kind"] == "block"}

    def hidden(u: Any, v: Any, ms: int) -> bool:
        return any({a, b} == {u, v} and t < ms for a, b, t in blocked)

    scored = [e for e in asked if e[1] in candidates and not hidden(e[0], e[1], e[3])]
    assert metrics["tasks"]["next_contact"]["events"] == len(scored) < len([e for e in asked if e[1] in candidates])
    contacts = {(e["from"], e["to"], e["ms"]) for e in log if e["kind"] != "block"}

    def before(u: Any, v: Any, ms: int) -> bool:
        return any((a, b) == (u, v) and t < ms for a, b, t in contacts)

    new = [e for e in scored if not before(e[0], e[1], e[3])]
    assert metrics["tasks"]["new_link"]["events"] == len(new)
    assert metrics["tasks"]["reply"]["events"] == sum(before(e[1], e[0], e[3]) for e in new)


@pytest.mark.parametrize("with_index", [True, False])
def test_evaluation_ranks_as_recommend_does(world: Path, with_index: bool) -> None:
    """What recommend puts in place r, evaluate gives rank r, for every user: one scorer behind both."""
    model = open_recommender(world / "run", world / "data", world / "index" if with_index else None)
    assert_ranked_as_recommended(model, world / "recs")


def assert_ranked_as_recommended(model: Recommender, recommendations: Path) -> None:
    """The first ten of every user."""
    row_of = {user: row for row, user in enumerate(model.data.user_ids.tolist())}
    table = pq.read_table(recommendations / "part-0.parquet")
    table = table.filter(pa.compute.less_equal(table["rank"], 10))
    actor, target = (
        np.array([row_of[user] for user in table[name].to_pylist()]) for name in ("user_id", "candidate_id")
    )
    assert len(np.unique(actor)) == len(row_of)
    everything = np.ones(len(actor), bool)
    as_of = np.full(len(actor), end_of_log(model.data))
    asked = Events(np.arange(len(actor)), actor, target, as_of, is_new=everything, is_reply=~everything)
    ranks = recommender_ranks(model.data, asked, model.exclusions, model, "live")[LEVEL["new_link"]]
    np.testing.assert_array_equal(ranks, table["rank"].to_numpy())


@pytest.fixture(scope="module")
def stu_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that `friendrec pipeline --preset stu` leaves, its jobs run in this process."""
    root = tmp_path_factory.mktemp("stu")
    pq.write_table(simulate(users=120, events=1500, seed=3).interactions, root / "log.parquet")
    alone = "--epochs=2 --workers=0"

    def run(stage: Stage, options: PipelineOptions, out: str) -> None:
        with joined():
            assert cli.main([stage.verb, *stage.args, "--out", stage.output]) == 0

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "_run", run)
        pipeline.main(
            PipelineOptions(
                interactions=str(root / "log.parquet"), out=str(root / "out"), preset="stu", nproc=1, evaluate_args="",
                base_args=" ".join((*SMALL, alone)), train_args=" ".join((*SMALL_STU, alone)),
                tokenize_args="--codebook-size=16", prepare_args="--chunk-length 32",
            )
        )  # fmt: skip
    return root / "out"


def test_friends_are_generated_from_a_log(stu_world: Path) -> None:
    """The whole chain of preset stu: codes of the base's embeddings, and both models and their fusion in one report."""
    for name in (*PUBLISHED, "base", "stu"):
        open_published(stu_world / name, verify=True)
    assert open_published(stu_world / "run")[1].extra["preset"] == "stu"
    metrics = json.loads((stu_world / "report" / "metrics.json").read_text())
    assert metrics["model"]["preset"] == "stu"
    assert metrics["beside"].keys() == {"two_tower_mlp", "fusion"}
    for task in TASKS:
        for state in STATES:
            figures = [metrics["tasks"][task][state], *(beside[task][state] for beside in metrics["beside"].values())]
            assert all(0 <= own["recall@10"] <= 1 for own in figures)


@pytest.mark.parametrize("with_index", [True, False])
def test_evaluation_ranks_generated_friends_as_recommend_does(stu_world: Path, with_index: bool) -> None:
    index_ = stu_world / "index" if with_index else None
    model = open_recommender(stu_world / "run", stu_world / "data", index_)
    assert_ranked_as_recommended(model, stu_world / "recommendations")


def test_the_python_api_generates_what_the_command_writes(stu_world: Path) -> None:
    run = friendrec.open_run(stu_world / "run", index=stu_world / "index")
    written = pq.read_table(stu_world / "recommendations" / "part-0.parquet")
    assert run.recommend(run.data.user_ids, k=100).equals(written)
    with pytest.raises(FriendrecError, match="has codes of users and no vectors: open the run whose embeddings"):
        run.embeddings(run.data.user_ids[:1])
    with pytest.raises(
        FriendrecError, match=r"holds codes, which a run writes: pass it to open_run\(RUN, index=INDEX\)"
    ):
        friendrec.open_index(stu_world / "index")


def test_an_index_of_other_weights_is_refused(world: Path, tmp_path: Path) -> None:
    """Same users, same width, another run: without a look at the vectors its scores would be nonsense."""
    train_run(world / "data", tmp_path / "run", "--epochs=1", "--workers=0", "--seed=1")
    with pytest.raises(FriendrecError, match="holds other vectors than the run gives"):
        open_recommender(tmp_path / "run", world / "data", world / "index")


def test_weights_that_are_not_finite_score_nothing(world: Path) -> None:
    """NaN is higher than nothing and lower than nothing: unnoticed, it would give every target the first rank."""
    model = open_recommender(world / "run", world / "data")
    with torch.no_grad():
        model.model.query_tower.skip.weight.fill_(torch.nan)
    with pytest.raises(FriendrecError, match="not finite"):
        model.recommend(np.arange(3), np.full(3, end_of_log(model.data)), k=10)
