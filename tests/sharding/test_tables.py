"""Table configs and their first rows."""

import hashlib

import pytest
import torch

from friendrec.errors import FriendrecError
from friendrec.sharding.tables import Table, embedding_bag_collection, initial_rows


def splitmix64(z: int) -> int:
    """The definition, in Python's own integers."""
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_rows_are_splitmix64_of_their_place() -> None:
    rows = initial_rows(3, "user", range(4), 8)
    key = int.from_bytes(hashlib.blake2b(b"3/user", digest_size=8).digest(), "little")
    for place, value in enumerate(rows.flatten().tolist()):
        bits = splitmix64((key + place * 0x9E3779B97F4A7C15) % 2**64) >> 40
        assert value == pytest.approx(((bits + 0.5) / 2**24 - 0.5) * (12 / 8) ** 0.5, abs=1e-6)


def test_a_row_depends_on_seed_table_and_row_only() -> None:
    whole = initial_rows(0, "user", range(1000), 16)
    assert torch.equal(whole[300:450], initial_rows(0, "user", range(300, 450), 16))
    assert initial_rows(0, "user", range(0), 16).shape == (0, 16)
    for other in (initial_rows(1, "user", range(1000), 16), initial_rows(0, "action", range(1000), 16)):
        assert not (whole == other).all(dim=1).any()


def test_rows_are_centred_with_unit_norm() -> None:
    rows = initial_rows(0, "user", range(20_000), 64)
    assert rows.dtype == torch.float32
    assert float(rows.mean()) == pytest.approx(0, abs=1e-3)
    assert float(rows.square().sum(1).mean()) == pytest.approx(1, abs=1e-2)
    assert float((rows[:-1] * rows[1:]).sum(1).mean()) == pytest.approx(0, abs=1e-2)


def test_the_collection_is_on_meta_with_every_feature() -> None:
    tables = (Table("user", 10**12, 8, ("history", "target")), Table("action", 3, 8, ("action",)))
    collection = embedding_bag_collection(tables)
    assert all(p.is_meta for p in collection.parameters())
    assert [c.feature_names for c in collection.embedding_bag_configs()] == [["history", "target"], ["action"]]


@pytest.mark.parametrize(("rows", "dim"), [(0, 8), (5, 0), (5, 6)])
def test_impossible_tables_are_refused(rows: int, dim: int) -> None:
    with pytest.raises(FriendrecError, match="'user'"):
        Table("user", rows, dim, ("user",))
