"""Tokens to an index of kind stu, and what `recommend` draws with it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.datasets.prepared import OUT, load_prepared
from friendrec.errors import FriendrecError
from friendrec.pipeline import index, train
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.inference import open_recommender
from friendrec.pipeline.publish import open_published, publish
from friendrec.pipeline.retrieval.kinds import load_index
from friendrec.pipeline.retrieval.stu import StuIndex
from friendrec.pipeline.tokens import TOKENS, write_tokens
from tests.models.codes import ragged_codes
from tests.training import SMALL, joined, publish_data, recommend_run

SIZES = (8, 8, 8)


def publish_tokens(out: Path, user_ids: np.ndarray, tokens: np.ndarray) -> Path:
    """What `friendrec tokenize` leaves, but for what makes more of them."""
    extra = {"sizes": list(SIZES), "num_codebooks": 2, "codebook_size": 8, "method": "random"}
    with publish(out, kind="stu", options=None, inputs={}, extra=extra) as attempt:
        write_tokens(attempt / TOKENS, user_ids, tokens)
    return out


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    users = np.array([f"user{row}" for row in range(100)], object)
    return publish_tokens(tmp_path / "stu", users, ragged_codes(0, 100, SIZES))


def test_the_index_holds_the_codes_in_the_order_of_the_table(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = IndexOptions(tokens=str(tokens), kind="stu", beam_width=40, out=str(tmp_path / "index"))
    index.main(options)
    index.main(options)
    said = capsys.readouterr().out
    assert "100 users, 3 levels, a trie of" in said and "is this index already" in said
    directory, manifest = open_published(tmp_path / "index", "index", verify=True)
    opened = load_index(directory)
    assert manifest.inputs.keys() == {"tokens"}
    assert isinstance(opened, StuIndex) and opened.beam_width == 40
    assert opened.user_ids.tolist() == [f"user{row}" for row in range(100)]
    assert np.array_equal(opened.codes_of(np.arange(100)), ragged_codes(0, 100, SIZES))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"kind": "stu"}, "kind stu is made of tokens alone: pass --tokens STU"),
        ({"kind": "stu", "tokens": "t", "embeddings": "e"}, "kind stu is made of tokens alone"),
        ({}, "an index of kind exact is made of embeddings: pass --embeddings"),
        ({"embeddings": "e", "tokens": "t"}, "--tokens means nothing to an index of kind exact: .* pass --kind stu"),
        ({"embeddings": "e", "kind": "ivf", "beam_width": 5}, "--beam-width means nothing to an index of kind ivf"),
        ({"kind": "stu", "tokens": "t", "beam_width": 0}, "--beam-width 0: give a positive number"),
        ({"kind": "stu", "tokens": "t", "nprobe": 3}, "--nprobe means nothing to an index of kind stu"),
        ({"kind": "stu", "tokens": "nowhere"}, "nowhere does not exist: pass --tokens"),
    ],
)
def test_mistakes_are_told(parameters: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FriendrecError, match=message):
        index.main(IndexOptions(out=str(tmp_path / "index"), **parameters))
    assert not (tmp_path / "index").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data, an STU run on it and its index, by the options that take them."""
    folder = tmp_path_factory.mktemp("drawn")
    data = load_prepared(publish_data(folder / "data"))
    codes = ragged_codes(1, data.num_train_users, SIZES)
    stu = publish_tokens(folder / "stu", data.user_ids[: data.num_train_users], codes)
    small = [flag for flag in SMALL if "negatives" not in flag]
    paths = f"--data={folder / 'data'}", f"--out={folder / 'run'}", f"--tokens={stu}"
    with joined():
        train.main(train.parse(["stu", *paths, *small, "--epochs=1", "--workers=0"]))
    index.main(IndexOptions(tokens=str(stu), kind="stu", out=str(folder / "index")))
    return {"data": str(folder / "data"), "run": str(folder / "run"), "index": str(folder / "index")}


def recommended(made: dict[str, str], out: Path, **options: Any) -> dict[int, list[int]]:
    """Friends of each user, in the order of their ranks."""
    recommend_run(**made, out=str(out), **options)
    table = pq.read_table(out / "part-0.parquet").to_pydict()
    rows: dict[int, list[int]] = {}
    for user, friend in zip(table["user_id"], table["candidate_id"], strict=True):
        rows.setdefault(user, []).append(friend)
    return rows


@pytest.mark.long
def test_friends_are_drawn_by_seed(made: dict[str, str], tmp_path: Path) -> None:
    best = recommended(made, tmp_path / "best", k=1000)
    drawn = recommended(made, tmp_path / "drawn", k=1000, temperature=1.5)
    assert {u: sorted(row) for u, row in drawn.items()} == {u: sorted(row) for u, row in best.items()}
    few = {
        name: recommended(made, tmp_path / name, k=5, seed=seed, nucleus=0.9) for name, seed in (("one", 1), ("two", 2))
    }
    assert sum(few["one"][user] != few["two"][user] for user in best) > 0.8 * len(best)
    some = list(best)[3:40:4]
    pq.write_table(pa.table({"user_id": some}), tmp_path / "users.parquet")
    alone = recommended(made, tmp_path / "alone", k=5, seed=1, nucleus=0.9, users=str(tmp_path / "users.parquet"))
    assert alone == {user: few["one"][user] for user in some}


@pytest.mark.long
def test_a_run_without_an_index_finds_the_same(made: dict[str, str]) -> None:
    recommender = open_recommender(made["run"], made["data"])
    indexed = open_recommender(made["run"], made["data"], made["index"])
    users, time = np.arange(30), np.full(30, recommender.data.train_until)
    assert np.array_equal(recommender.recommend(users, time, 10)[0], indexed.recommend(users, time, 10)[0])


@pytest.mark.long
def test_users_who_came_later_are_found_where_the_index_holds_them(made: dict[str, str], tmp_path: Path) -> None:
    """And are hidden from themselves and from whom has contacted them, as all others are."""
    data = load_prepared(Path(made["data"]))
    assert data.num_users > data.num_train_users
    known = open_recommender(made["run"], made["data"]).packer.codes
    assert known is not None
    taken = {tuple(code) for code in known.tokens.tolist()}
    free = [code for code in np.ndindex(*SIZES) if code not in taken and (*code[:2], -1) not in taken]
    codes = np.concatenate([known.tokens, np.array(free[: data.num_users - len(taken)], np.int32)])
    stu = publish_tokens(tmp_path / "stu", data.user_ids, codes)
    index.main(IndexOptions(tokens=str(stu), kind="stu", out=str(tmp_path / "index")))
    rows = recommended(made | {"index": str(tmp_path / "index")}, tmp_path / "out", k=1000)
    for row, user in enumerate(data.user_ids.tolist()):
        own = slice(*data.offsets[row : row + 2])
        partners = data.partner[own][data.direction[own] == OUT]
        assert user not in rows[user] and not set(rows[user]) & set(data.user_ids[partners].tolist())
    later = set(data.user_ids[data.num_train_users :].tolist())
    assert all(later & set(friends) for friends in rows.values())
    recommender = open_recommender(made["run"], made["data"], str(tmp_path / "index"))
    first = {row: int(data.timestamp[data.offsets[row]]) for row in range(data.num_train_users, data.num_users)}
    time = sorted(first.values())[len(first) // 2]  # of an event that is not known yet
    found, _ = recommender.recommend(np.arange(30), np.full(30, time), data.num_users)
    seen = {row for row in first if first[row] < time}
    assert seen and set(found.ravel().tolist()) & first.keys() == seen
