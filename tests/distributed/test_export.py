"""What leaves a run: the same rows from any number of ranks, and recommendations of strangers only."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.datasets.prepared import load_prepared
from friendrec.pipeline.embeddings import read_embeddings
from friendrec.pipeline.evaluation.tasks import Exclusions
from friendrec.pipeline.times import end_of_log
from tests.training import export_run, index_embeddings, publish_data, recommend_run, train_run

from .harness import Workers


@pytest.fixture(scope="module")
def made(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, run, embeddings-1 and -2 (by ranks), index, recommendations-1 and -2."""
    root = tmp_path_factory.mktemp("export")
    data, run = publish_data(root / "data"), root / "run"
    train_run(data, run, "--epochs=1", "--workers=0")
    for ranks in (1, 2):
        workers.run(ranks, run_export, run, data, root / f"embeddings-{ranks}")
    index_embeddings(root / "embeddings-2", root / "index")
    for ranks in (1, 2):
        workers.run(ranks, run_recommend, root, root / f"recommendations-{ranks}")
    return root


def run_export(run: Path, data: Path, out: Path) -> None:
    export_run(run=str(run), data=str(data), out=str(out))


def run_recommend(root: Path, out: Path) -> None:
    inputs = {"run": root / "run", "data": root / "data", "index": root / "index"}
    recommend_run(**{name: str(path) for name, path in inputs.items()}, out=str(out), k=10)


@pytest.mark.parametrize("which", ["query", "target"])
def test_two_ranks_export_what_one_does(made: Path, which: str) -> None:
    data = load_prepared(made / "data")
    (ids, alone), (ids_of_two, together) = (read_embeddings(made / f"embeddings-{n}", which) for n in (1, 2))  # type: ignore[arg-type]
    assert ids.tolist() == ids_of_two.tolist() == data.user_ids[: data.num_train_users].tolist()
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(np.unique(alone, axis=0)) > len(alone) / 2


def test_each_rank_wrote_the_rows_it_owns(made: Path) -> None:
    rows = load_prepared(made / "data").num_train_users
    half = -(-(rows + 1) // 2)
    counts = [pq.read_metadata(made / "embeddings-2" / f"part-{rank}.parquet").num_rows for rank in range(2)]
    assert counts == [half, rows - half]


def recommendations(directory: Path) -> pa.Table:
    parts = [pq.read_table(part) for part in sorted(directory.glob("part-*.parquet"))]
    return pa.concat_tables(parts).sort_by([("user_id", "ascending"), ("rank", "ascending")])


def test_two_ranks_recommend_what_one_does(made: Path) -> None:
    alone, together = (recommendations(made / f"recommendations-{n}") for n in (1, 2))
    np.testing.assert_allclose(together["score"].to_numpy(), alone["score"].to_numpy(), atol=1e-5)
    agree = alone["candidate_id"].to_numpy() == together["candidate_id"].to_numpy()
    assert agree.mean() > 0.99  # a near tie may fall either way


def test_every_user_gets_k_strangers_best_first(made: Path) -> None:
    data = load_prepared(made / "data")
    users = np.arange(data.num_users)
    hidden = Exclusions.of(data).at(1, users, np.full(len(users), end_of_log(data)))
    table = recommendations(made / "recommendations-1")
    rows = {user: row for row, user in enumerate(data.user_ids.tolist())}
    given: dict[int, list[int]] = {}
    for user, candidate in zip(table["user_id"].to_pylist(), table["candidate_id"].to_pylist(), strict=True):
        given.setdefault(rows[user], []).append(rows[candidate])
    for user in users:
        allowed = set(range(data.num_train_users)) - set(hidden[1][hidden[0][user] : hidden[0][user + 1]].tolist())
        assert len(given[user]) == len(set(given[user])) == min(10, len(allowed))
        assert set(given[user]) <= allowed - {user}
    for user in rows:
        scores = table.filter(pa.compute.field("user_id") == user)["score"].to_numpy()
        assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize(("dtype", "precision"), [("float16", 1e-3), ("int8", 1 / 127)])
def test_less_precise_vectors_come_close(made: Path, tmp_path: Path, dtype: str, precision: float) -> None:
    export_run(run=str(made / "run"), data=str(made / "data"), out=str(tmp_path / "e"), dtype=dtype)
    for which in ("query", "target"):
        _, exact = read_embeddings(made / "embeddings-1", which)  # type: ignore[arg-type]
        _, rounded = read_embeddings(tmp_path / "e", which)  # type: ignore[arg-type]
        largest = np.abs(exact).max(axis=1, keepdims=True)
        assert (np.abs(rounded - exact) <= precision * largest).all()
        assert not np.array_equal(rounded, exact)


def test_as_of_an_earlier_time_queries_differ_and_targets_do_not(made: Path, tmp_path: Path) -> None:
    export_run(run=str(made / "run"), data=str(made / "data"), out=str(tmp_path / "e"), as_of="1971-03-01")
    now, then = (
        {which: read_embeddings(path, which)[1] for which in ("query", "target")}  # type: ignore[arg-type]
        for path in (made / "embeddings-1", tmp_path / "e")
    )
    np.testing.assert_array_equal(now["target"], then["target"])
    assert (np.abs(now["query"] - then["query"]).max(axis=1) > 1e-4).mean() > 0.9
