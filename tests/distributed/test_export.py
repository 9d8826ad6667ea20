"""Export and recommend on several ranks: the same rows as on one, each user once, in the order of the vocabulary."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.datasets.prepared import load_prepared
from friendrec.pipeline import embeddings, inference
from friendrec.pipeline.embeddings import read_embeddings
from friendrec.pipeline.publish import open_published
from tests.training import DAY, export_run, index_embeddings, publish_data, recommend_run, train_run

from .harness import Workers, heights

Export = Callable[..., Path]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["int", "text"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("export") / "data", text=request.param)


@pytest.fixture(scope="module")
def run(workers: Workers, data: Path) -> Path:
    workers.run(2, train_run, data, data.parent / "run", "--epochs=1")
    return data.parent / "run"


@pytest.fixture(scope="module")
def export(workers: Workers, data: Path, run: Path) -> Export:
    """Export the run on a number of ranks; every variant once."""

    def exported(ranks: int, **options: Any) -> Path:
        out = data.parent / "-".join(["embeddings", str(ranks), *map(str, options.values())])
        workers.run(ranks, call_export, {"run": str(run), "data": str(data), "out": str(out), **options})
        return out

    return exported


def call_export(options: dict[str, Any]) -> None:
    export_run(**options)


def call_recommend(options: dict[str, Any]) -> None:
    recommend_run(**options)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_what_one_would(data: Path, export: Export, ranks: int) -> None:
    prepared = load_prepared(data)
    alone, together = export(1), export(ranks)
    assert {path.name for path in together.glob("part-*")} == {f"part-{rank}.parquet" for rank in range(ranks)}
    assert prepared.num_train_users < prepared.num_users
    for which in ("query", "target"):
        users, vectors = read_embeddings(together, which)  # type: ignore[arg-type]
        expected_users, expected = read_embeddings(alone, which)  # type: ignore[arg-type]
        assert users.tolist() == prepared.user_ids[: prepared.num_train_users].tolist()
        assert users.tolist() == expected_users.tolist()
        assert vectors.std() > 0.01
        np.testing.assert_allclose(vectors, expected, atol=1e-6)


def heights_while_exporting(options: dict[str, Any]) -> tuple[int, set[int]]:
    """Rows that this rank writes, and the heights of all tensors it holds as it does so."""
    seen: list[tuple[int, set[int]]] = []
    write = embeddings.write_part

    def noticed(path: Path, user_ids: np.ndarray, *rest: Any) -> None:
        seen.append((len(user_ids), heights()))
        write(path, user_ids, *rest)

    with patch.object(embeddings, "write_part", noticed), patch.object(inference, "BLOCK", 16):
        export_run(**options)
    return seen[0]


def test_no_rank_holds_a_tensor_as_tall_as_the_user_table(
    workers: Workers, data: Path, run: Path, tmp_path: Path
) -> None:
    users = load_prepared(data).num_train_users
    half = -(-(users + 1) // 2)
    options = {"run": str(run), "data": str(data), "out": str(tmp_path / "out")}
    by_rank = workers.run(2, heights_while_exporting, options)
    assert [rows for rows, _ in by_rank] == [half, users - half]
    ((_, alone),) = workers.run(1, heights_while_exporting, options | {"out": str(tmp_path / "alone")})
    assert users + 1 in alone
    for (_, held), rows in zip(by_rank, (half, users + 1 - half), strict=True):
        assert rows in held
        assert not {users, users + 1} & held


def test_queries_know_what_came_before_a_time_and_targets_do_not_care(data: Path, export: Export) -> None:
    early = export(2, as_of="1970-01-01T00:00:00Z")
    late = export(1)
    assert np.abs(read_embeddings(early, "query")[1] - read_embeddings(late, "query")[1]).max() > 0.01
    np.testing.assert_allclose(read_embeddings(early, "target")[1], read_embeddings(late, "target")[1], atol=1e-6)
    assert open_published(early, "embeddings")[1].extra["as_of"] == 0
    prepared = load_prepared(data)
    assert open_published(late, "embeddings")[1].extra["as_of"] == prepared.timestamp.max() + 1 > 400 * DAY


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("int8", 1 / 250)])
def test_smaller_types_keep_their_precision(export: Export, dtype: str, tolerance: float) -> None:
    exact, small = export(1), export(2, dtype=dtype)
    column = pq.read_table(small / "part-0.parquet").schema.field("target").type
    assert str(column.value_type).replace("halffloat", "float16") == dtype
    for which in ("query", "target"):
        _, vectors = read_embeddings(small, which)  # type: ignore[arg-type]
        _, expected = read_embeddings(exact, which)  # type: ignore[arg-type]
        largest = np.abs(expected).max(axis=1, keepdims=True)
        assert (np.abs(vectors - expected) <= tolerance * largest).all()


def read_recommendations(out: Path) -> list[dict[str, Any]]:
    parts = sorted(out.glob("part-*.parquet"), key=lambda path: int(path.stem.removeprefix("part-")))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_ranks_recommend_what_one_would(
    workers: Workers, data: Path, run: Path, export: Export, tmp_path: Path
) -> None:
    index = index_embeddings(export(2), tmp_path / "index")
    rows = {}
    for ranks in (1, 2):
        options = {"run": run, "data": data, "index": index, "out": tmp_path / str(ranks)}
        workers.run(ranks, call_recommend, {name: str(path) for name, path in options.items()} | {"k": 7})
        rows[ranks] = read_recommendations(tmp_path / str(ranks))
    assert len({row["user_id"] for row in rows[1]}) == load_prepared(data).num_users
    for name in ("user_id", "rank", "candidate_id"):
        assert [row[name] for row in rows[2]] == [row[name] for row in rows[1]]
    scores = [np.array([row["score"] for row in rows[ranks]]) for ranks in (1, 2)]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_more_ranks_than_users(workers: Workers, data: Path, run: Path, export: Export, tmp_path: Path) -> None:
    index = index_embeddings(export(2), tmp_path / "index")
    users = load_prepared(data).user_ids[:1]
    pq.write_table(pa.table({"user_id": users}), tmp_path / "users.parquet")
    options = {"run": run, "data": data, "index": index, "out": tmp_path / "out", "users": tmp_path / "users.parquet"}
    workers.run(3, call_recommend, {name: str(path) for name, path in options.items()} | {"k": 3})
    assert [row["rank"] for row in read_recommendations(tmp_path / "out")] == [1, 2, 3]


def export_onto(options: dict[str, Any]) -> str:
    try:
        export_run(**options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_all_ranks_hear_why_one_cannot_publish(workers: Workers, data: Path, run: Path) -> None:
    options = {"run": str(run), "data": str(data), "out": str(run)}
    for said in workers.run(2, export_onto, options):
        assert said.startswith("FriendrecError: ")
        assert "already holds a run: choose another --out" in said


def crash_on_one_rank(options: dict[str, Any]) -> None:
    crash = patch("friendrec.pipeline.embeddings.write_part", lambda *_: os._exit(1))
    with crash if os.environ["RANK"] == "1" else nullcontext():
        export_run(**options)


def test_a_rank_that_crashes_leaves_nothing_behind(workers: Workers, data: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 1"):
        workers.run(2, crash_on_one_rank, {"run": str(run), "data": str(data), "out": str(tmp_path / "out")})
    assert list(tmp_path.iterdir()) == []
