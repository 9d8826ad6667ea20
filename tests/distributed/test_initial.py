"""--init-from: the given vectors stand in the given users' rows, whoever owns them; all other rows are untouched."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from friendrec.datasets.prepared import PreparedData, load_prepared
from friendrec.errors import FriendrecError
from friendrec.pipeline import initial
from friendrec.pipeline.embeddings import read_embeddings
from friendrec.pipeline.initial import Given, open_given, start_from
from friendrec.pipeline.publish import open_published
from friendrec.sharding.config import Sharding, ShardingConfig
from friendrec.sharding.parallel import shard
from friendrec.sharding.plan import make_plan
from friendrec.sharding.tables import initial_rows
from tests.training import export_run, losses, publish_data, train_run

from .harness import Workers
from .toy import SEED, Parts, Table, Toy, all_parts, assembled, embedding_bag_collection

DIM = 8
read = Given._vectors


@pytest.fixture(scope="module", params=[False, True], ids=["int", "text"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("initial") / "data", text=request.param)


def write_vectors(folder: Path, data: PreparedData, column: str = "vector") -> dict[int, np.ndarray]:
    """Every second user, in a shuffled order, strangers and later users among them; the vectors of the train users."""
    rng = np.random.default_rng(1)
    rows = rng.permutation(np.arange(0, data.num_users, 2))
    vectors = rng.normal(size=(len(rows), DIM)).astype(np.float32)
    stranger = "nobody" if data.user_ids.dtype == object else -5
    ids = [*data.user_ids[rows].tolist(), stranger]
    table = pa.table({"user_id": ids, "ignored": ids, column: [*vectors.tolist(), [0.0] * DIM]})
    folder.mkdir()
    for part, piece in enumerate((table[:20], table[20:])):
        pq.write_table(piece, folder / f"made-{part}.parquet", row_group_size=9)
    return {int(row): vector for row, vector in zip(rows, vectors, strict=True) if row < data.num_train_users}


def start(data_path: Path, vectors: Path, sharding: Sharding) -> Parts:
    data = load_prepared(data_path)
    tables = (Table("user", data.num_train_users + 1, DIM, ("user",)),)
    model = Toy(embedding_bag_collection(tables))
    plan = make_plan(model, dist.get_world_size(), ShardingConfig(sharding=sharding), group=dist.group.WORLD)
    dmp = shard(model, plan, torch.device("cpu"), SEED)
    with patch.object(initial, "_CHUNK", 8):
        start_from(open_given(str(vectors), data, DIM), dmp)
    return all_parts(dmp, tables)


@pytest.mark.parametrize(
    ("world_size", "sharding"),
    [(1, "row_wise"), (2, "row_wise"), (2, "table_wise"), (2, "column_wise"), (2, "data_parallel")],
)
def test_given_rows_are_the_given_vectors_and_the_others_untouched(
    workers: Workers, data: Path, tmp_path: Path, world_size: int, sharding: Sharding
) -> None:
    prepared = load_prepared(data)
    given = write_vectors(tmp_path / "vectors", prepared)
    expected = initial_rows(SEED, "user", range(prepared.num_train_users + 1), DIM)
    assert 0 < len(given) < len(expected) - 1
    for row, vector in given.items():
        expected[row] = torch.from_numpy(vector)
    parts = workers.run(world_size, start, data, tmp_path / "vectors", sharding)
    assert torch.equal(assembled(parts, "user", tuple(expected.shape)), expected)


def test_only_wanted_vectors_are_read_and_few_at_a_time(data: Path, tmp_path: Path) -> None:
    prepared = load_prepared(data)
    expected = write_vectors(tmp_path / "vectors", prepared, column="target")
    given = open_given(str(tmp_path / "vectors"), prepared, DIM)
    wanted = range(30, 70)
    with patch.object(initial, "_CHUNK", 4), patch.object(Given, "_vectors", autospec=True, side_effect=read) as reads:
        blocks = list(given.blocks(wanted))
    read_rows = np.concatenate([rows for rows, _ in blocks]).tolist()
    assert sorted(read_rows) == sorted(set(expected) & set(wanted))
    for row, vector in zip(read_rows, np.concatenate([vectors for _, vectors in blocks]), strict=True):
        np.testing.assert_array_equal(vector, expected[row])
    assert max(len(call.args[1]) for call in reads.call_args_list) == 4
    assert list(given.blocks(range(prepared.num_train_users, prepared.num_train_users + 1))) == []


def train_from(data: Path, out: Path, *args: str) -> None:
    train_run(data, out, "--epochs=1", "--workers=0", *args)


def test_a_run_starts_from_an_exported_one(workers: Workers, data: Path, tmp_path: Path) -> None:
    workers.run(1, train_from, data, tmp_path / "before")
    for dtype, out in (("float32", tmp_path / "embeddings"), ("int8", tmp_path / "small")):
        export_run(run=str(tmp_path / "before"), data=str(data), out=str(out), dtype=dtype)
        _, exported = read_embeddings(out, "target")
        rows, vectors = next(open_given(str(out), load_prepared(data), DIM).blocks(range(len(exported))))
        np.testing.assert_array_equal(vectors, exported[rows, :DIM])  # without the bias
        assert len(rows) == len(exported)
    given = f"--init-from={tmp_path / 'embeddings'}"
    for world_size in (1, 2):
        workers.run(world_size, train_from, data, tmp_path / str(world_size), given)
    fresh, alone, together = (losses(tmp_path / name) for name in ("before", "1", "2"))
    assert alone == pytest.approx(together, abs=1e-4)
    assert alone[1] != pytest.approx(fresh[1], abs=1e-3)
    _, manifest = open_published(tmp_path / "1", "run")
    assert set(manifest.inputs) == {"data", "init_from"}
    with pytest.raises(FriendrecError, match="already holds a run, of other config or data"):
        train_from(data, tmp_path / "1")
    train_from(data, tmp_path / "1", given)  # up to date


GOOD: dict[str, Any] = {"user_id": [1000, 1007], "target": [[0.5] * DIM] * 2}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"user_id": [1000]}, "no column target"),
        ({"target": GOOD["target"]}, "no column user_id"),
        ({**GOOD, "target": [[0.5] * 12] * 2}, "12 dimensions and the tables 8; pass --dim 12"),
        ({**GOOD, "target": [[0.5] * DIM, [0.5] * 9]}, "different lengths"),
        ({**GOOD, "target": [[0.5] * DIM, None]}, "different lengths"),
        ({**GOOD, "target": [[0.5] * DIM, [0.5] * 7 + [np.inf]]}, "not finite"),
        ({**GOOD, "target": [[0.5] * DIM, [0.5] * 7 + [None]]}, "not finite"),
        ({**GOOD, "target": [0.5, 0.5]}, "give Parquet with user_id and a list column"),
        ({**GOOD, "user_id": [1000, 1000]}, "a user has two vectors"),
        ({**GOOD, "user_id": ["a", "b"]}, "user ids of the prepared data are int64"),
        ({**GOOD, "user_id": [-1, -2]}, "none of its user ids"),
    ],
)
def test_what_is_no_vectors_is_refused_in_one_line(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    data = load_prepared(publish_data(tmp_path / "data"))
    pq.write_table(pa.table(columns), tmp_path / "vectors.parquet")
    with pytest.raises(FriendrecError, match=says) as caught:
        list(open_given(str(tmp_path / "vectors.parquet"), data, DIM).blocks(range(data.num_train_users)))
    assert "\n" not in str(caught.value)
    assert "--init-from" in str(caught.value)


def test_files_that_are_not_there_are_refused_in_one_line(tmp_path: Path) -> None:
    data = load_prepared(publish_data(tmp_path / "data"))
    for path in (tmp_path, tmp_path / "absent.parquet"):
        with pytest.raises(FriendrecError, match=f"--init-from {path}"):
            open_given(str(path / "x"), data, DIM)
