"""Recommendations: nobody who may not be suggested, as many as there are, and the same scorer as evaluate."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.datasets.prepared import OUT, PreparedData, load_prepared
from friendrec.errors import FriendrecError
from friendrec.pipeline import evaluate, index, inference, update
from friendrec.pipeline.embeddings import write_centroids, write_part
from friendrec.pipeline.evaluate import EvaluateOptions
from friendrec.pipeline.evaluation.scoring import recommender_ranks
from friendrec.pipeline.evaluation.tasks import LEVEL, Events
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.inference import open_recommender
from friendrec.pipeline.publish import publish, read_manifest, write_manifest
from friendrec.pipeline.recommend import chosen_users
from friendrec.pipeline.retrieval.centroids import hierarchical_k_means
from friendrec.pipeline.times import format_time
from friendrec.pipeline.update import UpdateOptions
from tests.training import export_run, index_embeddings, publish_data, recommend_run, train_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data, a run on it and its index, by the options that take them."""
    folder = tmp_path_factory.mktemp("recommend")
    data = publish_data(folder / "data", users=260, events=2400)
    train_run(data, folder / "run", "--epochs=1", "--workers=0")
    export_run(run=str(folder / "run"), data=str(data), out=str(folder / "embeddings"))
    indexed = index_embeddings(folder / "embeddings", folder / "index")
    return {"run": str(folder / "run"), "data": str(data), "index": str(indexed)}


@pytest.fixture(scope="module")
def data(made: dict[str, str]) -> PreparedData:
    return load_prepared(Path(made["data"]))


def recommended(made: dict[str, str], out: Path, **options: Any) -> dict[Any, list[dict[str, Any]]]:
    """Rows by user."""
    recommend_run(**made, out=str(out), **options)
    rows: dict[Any, list[dict[str, Any]]] = {}
    for row in pq.read_table(out / "part-0.parquet").to_pylist():
        rows.setdefault(row["user_id"], []).append(row)
    return rows


def hidden_from(data: PreparedData, user: int, time: int) -> set[int]:
    """Self, contacted and blocked (either way) strictly before a time; dense rows."""
    own = slice(*data.offsets[user : user + 2])
    seen = (data.timestamp[own] < time) & (data.direction[own] == OUT)
    blocks = [b for b in pq.read_table(data.path / "exclusions").to_pylist() if b["timestamp"] < time]
    blocked = {b["target"] for b in blocks if b["actor"] == user} | {b["actor"] for b in blocks if b["target"] == user}
    return {user} | set(data.partner[own][seen].tolist()) | blocked


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_everybody_gets_k_allowed_users(made: dict[str, str], data: PreparedData, tmp_path: Path, share: float) -> None:
    time = int(data.timestamp.min() + share * (data.timestamp.max() + 1 - data.timestamp.min()))
    rows = recommended(made, tmp_path / "out", k=1000, as_of=format_time(time))
    candidates = set(data.user_ids[: data.num_train_users].tolist())
    blocked = 0
    for user, raw in enumerate(data.user_ids.tolist()):
        hidden = hidden_from(data, user, time)
        blocked += len(hidden)
        assert {row["candidate_id"] for row in rows[raw]} == candidates - set(data.user_ids[sorted(hidden)].tolist())
        assert [row["rank"] for row in rows[raw]] == list(range(1, len(rows[raw]) + 1))
        scores = [row["score"] for row in rows[raw]]
        assert scores == sorted(scores, reverse=True)
    assert blocked > 2 * data.num_users


def test_fewer_are_the_first_of_more(made: dict[str, str], data: PreparedData, tmp_path: Path) -> None:
    few, many = recommended(made, tmp_path / "few", k=5), recommended(made, tmp_path / "many", k=20)
    assert list(few) == data.user_ids.tolist()
    for user, rows in few.items():
        assert [row["candidate_id"] for row in rows] == [row["candidate_id"] for row in many[user][:5]]


@pytest.mark.parametrize("indexed", [True, False])
def test_evaluate_ranks_the_ten_recommended_one_to_ten(
    made: dict[str, str], data: PreparedData, tmp_path: Path, indexed: bool
) -> None:
    time = data.train_until
    rows = recommended(made, tmp_path / "out", k=10, as_of=format_time(time))
    row_of = {raw: row for row, raw in enumerate(data.user_ids.tolist())}
    users = data.user_ids[:200].tolist()
    actor = np.repeat([row_of[user] for user in users], 10)
    target = np.array([row_of[row["candidate_id"]] for user in users for row in rows[user]])
    yes = np.ones(2000, bool)
    events = Events(np.arange(2000), actor, target, np.full(2000, time), yes, ~yes)
    recommender = open_recommender(made["run"], made["data"], made["index"] if indexed else None)
    for state in ("live", "frozen"):
        ranks = recommender_ranks(data, events, recommender.exclusions, recommender, state)[LEVEL["new_link"]]
        assert ranks.reshape(200, 10).tolist() == [list(range(1, 11))] * 200


@pytest.mark.parametrize("option", ["temperature", "top_k_tokens", "nucleus", "seed"])
def test_a_run_of_vectors_draws_nobody(made: dict[str, str], tmp_path: Path, option: str) -> None:
    with pytest.raises(FriendrecError, match="draw tokens, which only an STU run writes: leave them out"):
        recommended(made, tmp_path / "out", **{option: 1})
    assert not (tmp_path / "out").exists()


def test_a_file_names_the_users(made: dict[str, str], data: PreparedData, tmp_path: Path) -> None:
    wanted = data.user_ids[[250, 3, 17]]
    pq.write_table(pa.table({"user_id": wanted, "cohort": ["a", "b", "c"]}), tmp_path / "users.parquet")
    rows = recommended(made, tmp_path / "out", k=2, users=str(tmp_path / "users.parquet"))
    assert list(rows) == wanted.tolist()
    everyone = recommended(made, tmp_path / "all", k=2)
    for user, own in rows.items():
        assert [row["candidate_id"] for row in own] == [row["candidate_id"] for row in everyone[user]]


@pytest.mark.parametrize(
    ("column", "values", "line"),
    [
        ("user_id", [1000, 5, 6], "2 users are not in the prepared data, the first is 5"),
        ("user_id", [1000, None], "1 users are not in the prepared data, the first is None"),
        ("user_id", ["1000", "anna"], "give a Parquet file with a column user_id"),
        ("id", [1000], "give a Parquet file with a column user_id"),
    ],
)
def test_a_file_that_names_nobody_known(
    data: PreparedData, tmp_path: Path, column: str, values: list[Any], line: str
) -> None:
    pq.write_table(pa.table({column: values}), tmp_path / "users.parquet")
    with pytest.raises(FriendrecError) as caught:
        chosen_users(str(tmp_path / "users.parquet"), data)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"PAR1 of nothing"])
def test_a_file_that_is_none(data: PreparedData, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "users.parquet"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FriendrecError, match="give a Parquet file with a column user_id") as caught:
        chosen_users(str(file), data)
    assert "\n" not in str(caught.value)


def index_of(made: dict[str, str], vectors: np.ndarray | None, out: Path, kind: Any) -> str:
    """An index of the run's target vectors, or of others in their place, with centroids where the kind has lists."""
    part = pq.read_table(Path(made["index"]).parent / "embeddings" / "part-0.parquet")
    targets = np.stack(part["target"].to_numpy()) if vectors is None else vectors
    with publish(out.with_name(f"{out.name}-embeddings"), kind="embeddings", options=None, inputs={}) as attempt:
        write_part(attempt / "part-0.parquet", part["user_id"].to_numpy(), targets, targets, "float32")
        write_centroids(attempt, hierarchical_k_means(targets, 6, 2))
    embeddings = str(out.with_name(f"{out.name}-embeddings"))
    nprobe = {"nprobe": 6} if kind == "clusters" else {}
    index.main(IndexOptions(embeddings=embeddings, kind=kind, out=str(out), **nprobe))
    return str(out)


@pytest.mark.parametrize("kind", ["exact", "clusters"])
def test_vectors_of_zeros_are_not_those_of_the_run(
    made: dict[str, str], data: PreparedData, tmp_path: Path, kind: Any
) -> None:
    width = pq.read_schema(Path(made["index"]).parent / "embeddings" / "part-0.parquet").field("target").type.list_size
    zeros = np.zeros((data.num_train_users, width), np.float32)
    nothing = index_of(made, zeros, tmp_path / "index", kind)
    with pytest.raises(FriendrecError, match="holds other vectors than the run gives"):
        open_recommender(made["run"], made["data"], nothing)


def test_an_index_that_changes_meanwhile_gives_nothing(
    made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened first of all, and updated then."""
    built = shutil.copytree(made["index"], tmp_path / "index")

    def opened(*paths: Any) -> Any:
        recommender = open_recommender(*paths)
        (built / "more").touch()
        write_manifest(built, kind="index", options=read_manifest(built).options, inputs={})
        return recommender

    monkeypatch.setattr(inference, "open_recommender", opened)
    with pytest.raises(FriendrecError, match=r"index changed while it was read: run again$"):
        recommended(made | {"index": str(built)}, tmp_path / "out", k=5)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_index_with_deleted_users_recommends_and_is_not_evaluated(
    made: dict[str, str], data: PreparedData, tmp_path: Path
) -> None:
    """They are found no more, all others as before; figures would count them as missed."""
    built = index_of(made, None, tmp_path / "index", "clusters")
    users, actors = data.user_ids[: data.num_train_users], np.arange(20)
    times, everybody = np.full(20, data.timestamp.max() + 1), len(users)
    before, _ = open_recommender(made["run"], made["data"], built).recommend(actors, times, everybody)
    pq.write_table(pa.table({"user_id": users[::2]}), tmp_path / "leaving.parquet")
    update.main(UpdateOptions(index=built, delete=str(tmp_path / "leaving.parquet")))
    after, _ = open_recommender(made["run"], made["data"], built).recommend(actors, times, everybody)
    for row, old in zip(after, before, strict=True):
        assert row[row >= 0].tolist() == [user for user in old.tolist() if user >= 0 and user % 2]
    words = {"data": made["data"], "run": made["run"], "index": built, "out": str(tmp_path / "report")}
    with pytest.raises(FriendrecError, match=rf"{len(users[::2])} users of .* were deleted since.*as it was built"):
        evaluate.main(EvaluateOptions(**words))
    pq.write_table(pa.table({"user_id": users}), tmp_path / "leaving.parquet")
    update.main(UpdateOptions(index=built, delete=str(tmp_path / "leaving.parquet")))
    with pytest.raises(FriendrecError, match=r"all users of .* were deleted: `friendrec update --restore`"):
        open_recommender(made["run"], made["data"], built)
