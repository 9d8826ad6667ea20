"""The Python API answers what the command line writes, and tells a mistake in one line."""

import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import friendrec
from friendrec.errors import FriendrecError
from friendrec.pipeline.api import Run
from tests.training import export_run, index_embeddings, publish_data, recommend_run, train_run

MADE = ("data", "run", "embeddings", "index", "recommendations")


@pytest.fixture(scope="module", params=[False, True], ids=["integers", "text"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the stages make, in one folder; ids of the users are integers or text."""
    folder = tmp_path_factory.mktemp("api")
    data, run, embeddings, index, recommendations = (str(folder / name) for name in MADE)
    publish_data(Path(data), text=request.param)
    train_run(Path(data), Path(run), "--epochs=1", "--workers=0")
    export_run(run=run, data=data, out=embeddings)
    index_embeddings(Path(embeddings), Path(index))
    recommend_run(run=run, data=data, index=index, k=7, out=recommendations)
    return folder


@pytest.fixture(scope="module")
def run(made: Path) -> Run:
    return friendrec.open_run(made / "run")


@pytest.mark.parametrize("with_index", [False, True])
def test_recommend_gives_what_the_command_writes(made: Path, with_index: bool) -> None:
    run = friendrec.open_run(str(made / "run"), index=made / "index" if with_index else None)
    assert run.recommend(run.data.user_ids, k=7).equals(pq.read_table(made / "recommendations/part-0.parquet"))


def test_some_users_in_any_order(made: Path, run: Run) -> None:
    chosen = run.data.user_ids[[40, 3, 11]].tolist()
    rows = pq.read_table(made / "recommendations/part-0.parquet").to_pylist()
    expected = [row for user in chosen for row in rows if row["user_id"] == user and row["rank"] <= 2]
    for asked in (chosen, tuple(chosen), np.array(chosen), iter(chosen)):
        assert run.recommend(asked, k=2).to_pylist() == expected


def test_a_time_is_text_or_datetime(run: Run) -> None:
    early = int(run.data.timestamp.min()) + 40 * 86_400_000_000
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=early)
    users = run.data.user_ids[:20]
    then = run.recommend(users, as_of=moment)
    assert then.equals(run.recommend(users, as_of=moment.isoformat()))
    assert not then.equals(run.recommend(users))


def test_embeddings_are_those_exported(made: Path, run: Run) -> None:
    exported = {row["user_id"]: row for row in pq.read_table(made / "embeddings/part-0.parquet").to_pylist()}
    chosen = run.data.user_ids[[40, 3, 11]].tolist()
    found = run.embeddings(chosen)
    assert found["user_id"].to_pylist() == chosen
    for row in found.to_pylist():
        for name in ("query", "target"):
            assert row[name] == pytest.approx(exported[row["user_id"]][name], abs=1e-5)


def test_an_index_finds_the_highest_products(made: Path) -> None:
    index = friendrec.open_index(made / "index")
    exported = pq.read_table(made / "embeddings/part-0.parquet")
    queries, targets = (np.stack(exported[name].to_numpy()) for name in ("query", "target"))
    assert list(index.user_ids) == exported["user_id"].to_pylist()
    assert len(index) == len(exported)
    products = queries[:5].astype(np.float64) @ targets.T.astype(np.float64)
    found = index.search(queries[:5], k=3)
    assert found["query"].to_pylist() == np.repeat(range(5), 3).tolist()
    assert found["rank"].to_pylist() == [1, 2, 3] * 5
    best = -np.sort(-products, axis=1)[:, :3]
    assert found["score"].to_numpy() == pytest.approx(best.ravel(), abs=1e-4)
    named = [index.user_ids[column] for row in np.argsort(-products, axis=1)[:, :1] for column in row]
    assert found["candidate_id"].to_pylist()[::3] == named


def test_open_data_maps_the_arrays(made: Path, run: Run) -> None:
    data = friendrec.open_data(made / "data")
    assert data.num_events == run.data.num_events == 2 * len(data.event_entry) // 2
    assert isinstance(data.partner, np.memmap)


def test_what_has_moved_together_is_found(made: Path, tmp_path: Path) -> None:
    for name in ("data", "run"):
        shutil.copytree(made / name, tmp_path / name)
    (tmp_path / "run" / "manifest.json").write_text(
        (tmp_path / "run" / "manifest.json").read_text().replace(str(made / "data"), "/nowhere/data")
    )
    assert friendrec.open_run(tmp_path / "run").data.path == tmp_path / "data"
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(FriendrecError, match="was made from /nowhere/data, which is gone: pass where its data is"):
        friendrec.open_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda run, made: run.recommend([None]), "user_ids: 1 users are not in the prepared data, the first is None"),
        (lambda run, made: run.recommend([]), "user_ids is empty: name at least one user"),
        (lambda run, made: run.recommend([{}]), "user_ids must be a list of "),
        (lambda run, made: run.recommend(run.data.user_ids, k=0), "k is 0: ask for at least 1 recommendation"),
        (lambda run, made: run.recommend(run.data.user_ids, as_of="soon"), "as_of soon is no ISO 8601 time"),
        (lambda run, made: run.embeddings(run.data.user_ids[-2:]), "2 users came after the train period"),
        (lambda run, made: friendrec.open_run(made / "data"), "is a prepared data set, expected a run"),
        (lambda run, made: friendrec.open_run(made / "no"), "no does not exist"),
        (lambda run, made: friendrec.open_index(made / "run"), "is a run, expected an index"),
        (lambda run, made: friendrec.open_data(made / "run"), "is a run, expected a prepared data set"),
        (lambda run, made: friendrec.open_index(made / "index").search([[1.0]]), "the index takes [queries, 9]"),
    ],
)
def test_mistakes_are_one_line(made: Path, run: Run, call: Any, line: str) -> None:
    with pytest.raises(FriendrecError, match=re.escape(line)) as caught:
        call(run, made)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_the_example_runs(made: Path, run: Run, repository: Path) -> None:
    users = run.data.user_ids[:2].tolist()
    command = [sys.executable, "-P", str(repository / "examples/recommend.py"), str(made / "run"), *map(str, users)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = run.recommend(users, k=5).to_pylist()
    expected = [f"{row['user_id']} -> {row['candidate_id']}  score {row['score']:.2f}" for row in rows]
    assert done.stdout.splitlines()[:10] == expected


def test_importing_loads_nothing_heavy() -> None:
    code = "import friendrec, sys; print(*sorted({'torch', 'pyarrow', 'numpy', 'ibis', 'tyro'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
