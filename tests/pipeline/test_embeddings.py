"""Embeddings on disk: what comes back is what was written, within the precision asked for."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from friendrec.pipeline.embeddings import Dtype, read_embeddings, write_part


def vectors(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, 5)) * 10.0 ** rng.integers(-2, 3, (rows, 1))).astype(np.float32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 2**-11), ("int8", 0.501 / 127)])
def test_round_trip(tmp_path: Path, dtype: Dtype, tolerance: float) -> None:
    query, target = vectors(20, 1), vectors(20, 2)
    write_part(tmp_path / "part-0.parquet", np.arange(20) * 3, query, target, dtype)
    for name, written in (("query", query), ("target", target)):
        users, read = read_embeddings(tmp_path, name)  # type: ignore[arg-type]
        assert users.tolist() == list(range(0, 60, 3))
        assert read.dtype == np.float32
        assert (np.abs(read - written) <= tolerance * np.abs(written).max(axis=1, keepdims=True)).all()
    assert pq.read_schema(tmp_path / "part-0.parquet").field("query").type.list_size == 5


def test_parts_are_read_in_the_order_of_ranks(tmp_path: Path) -> None:
    whole = vectors(12, 0)
    for rank in range(12):
        write_part(
            tmp_path / f"part-{rank}.parquet", np.array([f"u{rank}"], object), *[whole[rank : rank + 1]] * 2, "float32"
        )
    users, read = read_embeddings(tmp_path, "target")
    assert users.tolist() == [f"u{rank}" for rank in range(12)]
    np.testing.assert_array_equal(read, whole)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("users", [np.array([7]), np.array(["u7"], object)])
def test_a_rank_without_users_and_a_vector_of_zeros(tmp_path: Path, dtype: Dtype, users: np.ndarray) -> None:
    write_part(tmp_path / "part-0.parquet", users, *[np.zeros((1, 4), np.float32)] * 2, dtype)
    write_part(tmp_path / "part-1.parquet", users[:0], *[np.empty((0, 4), np.float32)] * 2, dtype)
    known, read = read_embeddings(tmp_path, "query")
    assert known.tolist() == users.tolist()
    assert read.tolist() == [[0, 0, 0, 0]]
