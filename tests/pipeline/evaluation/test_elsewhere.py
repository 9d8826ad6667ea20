"""Vectors and lists made elsewhere: mapped by raw id, ranked as the protocol says, what is lacking told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.datasets.prepared import PreparedData, load_prepared
from friendrec.errors import FriendrecError
from friendrec.pipeline import evaluate
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.evaluation.elsewhere import list_ranks, read_lists, read_vectors
from friendrec.pipeline.evaluation.scoring import recommender_ranks
from friendrec.pipeline.evaluation.tasks import LEVELS, Exclusions, scored_events
from friendrec.pipeline.publish import publish
from tests.pipeline.evaluation import null
from tests.synthetic import prepared_from_events


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/data of users named by strings, who come and go."""
    root = tmp_path_factory.mktemp("elsewhere")
    actor, target, action, time = null.random_log(0, users=60, events=500, moments=200)
    names = np.array([f"user {k}" for k in range(60)])
    with publish(root / "data", kind="data", options=None, inputs={}) as attempt:
        prepared_from_events(names[actor], names[target], action, time, path=attempt)
    return root


@pytest.fixture(scope="module")
def data(root: Path) -> PreparedData:
    return load_prepared(root / "data")


def write_vectors(path: Path, ids: Any, query: Any, target: Any) -> str:
    columns = {"user_id": ids, "query": list(query), "target": list(target)}
    pq.write_table(pa.table(columns), path)
    return str(path)


def write_lists(path: Path, rows: list[tuple[str, int, str]]) -> str:
    columns = dict(zip(("user_id", "rank", "candidate_id"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_vectors_rank_as_their_products_say(data: PreparedData, tmp_path: Path) -> None:
    """Every third user lacks vectors, and a stranger has some."""
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(np.arange(data.num_users) % 3)
    query, target = (rng.integers(-3, 4, (data.num_users, 5)).astype(np.float32) for _ in range(2))
    given = rng.permutation(rows)
    ids = [*data.user_ids[given], "stranger"]
    path = write_vectors(tmp_path / "e.parquet", ids, [*query[given], query[0]], [*target[given], target[0]])
    vectors, counts = read_vectors(path, data)
    lacking = np.arange(data.num_train_users) % 3 == 0
    assert counts == {
        "dimensions": 5, "users": len(ids), "unknown_users": 1, "candidates_without_vector": lacking.sum(),
    }  # fmt: skip
    scores = query @ target[: data.num_train_users].T
    scores[np.arange(data.num_users) % 3 == 0] = 0
    scores[:, lacking] = -np.inf
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "test", exclusions)
    ranks = recommender_ranks(data, events, exclusions, vectors, "frozen")
    for level in range(LEVELS):
        for e in np.flatnonzero(events.at_level(level)):
            one = events.take(np.array([e]))
            hidden = exclusions.at(level, one.actor, one.timestamp)[1]
            others = np.setdiff1d(np.arange(data.num_train_users), [*hidden, one.target[0]])
            row = scores[one.actor[0]]
            mine = row[one.target[0]]
            assert ranks[level, e] == 1 + (row[others] > mine).sum() + (row[others] == mine).sum() / 2


def test_lists_rank_by_place_among_the_allowed(data: PreparedData, tmp_path: Path) -> None:
    """Lists of 12 out of order, with strangers and a repeat, for half of the users."""
    rng = np.random.default_rng(1)
    lists, rows = {}, []
    for user in range(0, data.num_users, 2):
        chosen = rng.choice(data.num_users, 11, replace=False)
        listed = [*data.user_ids[chosen], data.user_ids[chosen[0]]]
        listed.insert(3, "stranger")
        rows += [(data.user_ids[user], place + 1, candidate) for place, candidate in enumerate(listed)]
        lists[user] = [v for v in chosen.tolist() if v < data.num_train_users]
    path = write_lists(tmp_path / "r.parquet", [rows[k] for k in rng.permutation(len(rows))])
    read, counts = read_lists(path, data)
    assert counts["length"] == 13
    assert counts["users"] == len(lists)
    assert counts["unknown_users"] == 0
    for user, expected in lists.items():
        assert read.candidate[read.offsets[user] : read.offsets[user + 1]].tolist() == expected
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "test", exclusions)
    ranks = list_ranks(events, exclusions, read)
    for level in range(LEVELS):
        assert np.isnan(ranks[level, ~events.at_level(level)]).all()
        for e in np.flatnonzero(events.at_level(level)):
            one = events.take(np.array([e]))
            hidden = exclusions.at(level, one.actor, one.timestamp)[1]
            allowed = [v for v in lists.get(int(one.actor[0]), []) if v not in hidden or v == one.target[0]]
            place = 1 + allowed.index(one.target[0]) if one.target[0] in allowed else np.inf
            assert ranks[level, e] == place


def test_reports_are_frozen_and_go_as_far_as_the_lists(root: Path, data: PreparedData, tmp_path: Path) -> None:
    rows = [(user, place + 1, f"user {place}") for user in data.user_ids for place in range(20)]
    lists = write_lists(tmp_path / "r.parquet", rows)
    vectors = write_vectors(tmp_path / "e.parquet", data.user_ids, *(np.eye(data.num_users, dtype=np.float32),) * 2)
    full = {"recall@10", "recall@50", "recall@100", "ndcg@10", "mrr", "mean_rank", "recall@10_ci", "best_baseline"}
    for option, path, expected in (
        ("recommendations", lists, {"recall@10", "ndcg@10", "recall@10_ci", "best_baseline"}),
        ("embeddings", vectors, full),
    ):
        out = tmp_path / option
        evaluate.main(EvaluateOptions(data=str(root / "data"), out=str(out), baselines=True, **{option: path}))
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["model"]["source"] == option
        assert metrics["tasks"]["new_link"]["frozen"].keys() == expected
        assert metrics["tasks"]["new_link"]["live"].keys() == {"best_baseline"}
        page = (out / "report.html").read_text()
        assert f"<h1>{option}, validation period</h1>" in page
        assert "Recall@10, frozen" in page


@pytest.mark.parametrize(
    ("option", "columns", "message"),
    [
        ("embeddings", {"user_id": ["user 1"], "query": [[1.0]]}, "target"),
        ("embeddings", {"user_id": ["user 1"] * 2, "query": [[1.0]] * 2, "target": [[1.0]] * 2}, "two vectors"),
        ("embeddings", {"user_id": ["user 1"], "query": [[1.0]], "target": [[1.0, 2.0]]}, "differ in length"),
        ("embeddings", {"user_id": ["a", "b"], "query": [[1.0], [1.0, 2.0, 3.0]], "target": [[1.0]] * 2}, "one length"),
        ("embeddings", {"user_id": ["a"], "query": [1.0], "target": [[1.0]]}, "one length"),
        ("embeddings", {"user_id": ["user 1"], "query": [[np.nan]], "target": [[1.0]]}, "not finite"),
        ("recommendations", {"user_id": ["user 1"], "rank": [1], "candidate_id": ["user 2"]}, "no list has 10"),
    ],
)
def test_mistakes_are_told(root: Path, tmp_path: Path, option: str, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "given.parquet")
    given = {option: str(tmp_path / "given.parquet")}
    with pytest.raises(FriendrecError, match=message):
        evaluate.main(EvaluateOptions(data=str(root / "data"), out=str(tmp_path / "out"), **given))
    assert not (tmp_path / "out").exists()


def test_what_knows_the_answers_is_refused(root: Path, data: PreparedData, tmp_path: Path) -> None:
    """What friendrec itself publishes says as of when: by default the end of the log, which is too late."""
    rows = [(user, place + 1, f"user {place}") for user in data.user_ids for place in range(20)]
    for name, as_of in (("late", data.train_until + 1), ("right", data.train_until)):
        with publish(
            tmp_path / name, kind="recommendations", options=None, inputs={}, extra={"as_of": as_of}
        ) as attempt:
            write_lists(attempt / "part-0.parquet", rows)
    options = {"data": str(root / "data"), "out": str(tmp_path / "report")}
    late = EvaluateOptions(**options, recommendations=str(tmp_path / "late"))
    with pytest.raises(FriendrecError, match="make it again with --as-of 1970-"):
        evaluate.main(late)
    evaluate.main(EvaluateOptions(**options, recommendations=str(tmp_path / "right")))


def test_one_thing_is_scored_at_a_time(root: Path, tmp_path: Path) -> None:
    both = EvaluateOptions(data=str(root / "data"), out=str(tmp_path / "out"), embeddings="e", recommendations="r")
    with pytest.raises(FriendrecError, match="one at a time"):
        evaluate.main(both)
