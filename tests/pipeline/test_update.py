"""The `update` verb: vectors are replaced, users come, go and return, and nothing else changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline import index, update
from friendrec.pipeline.embedding_parts import EmbeddingParts
from friendrec.pipeline.embeddings import write_part
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.publish import open_published, publish
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.kinds import load_index
from friendrec.pipeline.retrieval.store import open_index, writing
from friendrec.pipeline.update import UpdateOptions

from .retrieval.contract import make_queries
from .updates import (
    AFTER,
    BEFORE,
    CENTROIDS,
    CHANGES,
    DIM,
    LEAVING,
    build,
    contents,
    options_of,
    publish_embeddings,
    users_file,
)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return build(tmp_path)


def test_an_update_replaces_adds_and_deletes(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert contents(built) == BEFORE
    update.main(options_of(built))
    assert contents(built) == AFTER
    said = "11 users (1 added, 1 replaced, 1 unchanged, 2 deleted, 2 to delete were not there)"
    assert said in capsys.readouterr().out
    assert open_index(built).user_ids.tolist() == [*BEFORE, 30]
    _, manifest = open_published(built, "index", verify=True)
    (told,) = manifest.extra["updates"]
    assert told.items() >= {"appended": 1, "replaced": 1, "deleted": 2}.items()
    assert told["inputs"].keys() == {"embeddings", "delete"} and told["command"] and told["created"]
    assert manifest.extra["candidates"] == 13 and manifest.extra["deleted"] == 2
    assert manifest.inputs.keys() == {"embeddings"}


def test_the_same_update_again_changes_nothing(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of(built)
    update.main(options)
    manifest = (built / "manifest.json").read_bytes()
    update.main(options)
    assert "nothing to change (0 added, 0 replaced, 3 unchanged, 0 deleted, 4 to delete" in capsys.readouterr().out
    assert (built / "manifest.json").read_bytes() == manifest


def test_an_updated_index_is_still_the_one_that_was_built(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    update.main(options_of(built))
    embeddings = str(built.parent / "embeddings")
    index.main(IndexOptions(embeddings=embeddings, kind="clusters", copies=2, out=str(built)))
    assert "is this index already, updated once since." in capsys.readouterr().out
    assert contents(built) == AFTER
    update.main(UpdateOptions(index=str(built), compact=True))
    index.main(IndexOptions(embeddings=embeddings, kind="clusters", copies=2, out=str(built)))
    assert "is this index already, updated 2 times since." in capsys.readouterr().out


def test_compaction_removes_what_is_dead_and_changes_no_answer(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    update.main(options_of(built))
    queries = make_queries(np.random.default_rng(0).integers(-2, 3, (6, DIM)).astype(np.float32))
    before = load_index(built).search(queries, 20)
    update.main(UpdateOptions(index=str(built), compact=True))
    for found, expected in zip(load_index(built).search(queries, 20), before, strict=True):
        assert np.array_equal(found, expected)
    opened = open_index(built)
    assert contents(built) == AFTER and opened.user_ids.tolist() == [*BEFORE, 30]
    assert [len(segment.ids) for segment in opened.segments] == [2 * len(AFTER)]
    assert len(list((built / "segments").iterdir())) == 1
    update.main(UpdateOptions(index=str(built), compact=True))
    assert "compact already" in capsys.readouterr().out
    open_published(built, "index", verify=True)


def test_who_was_deleted_stays_so_and_when_restored_gets_the_old_place(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    update.main(options_of(built))
    same_old = str(built.parent / "embeddings")
    update.main(UpdateOptions(index=str(built), embeddings=same_old))
    said = "11 users (0 added, 1 replaced, 9 unchanged, 2 stay deleted: pass --restore to bring them back)"
    assert said in capsys.readouterr().out
    assert contents(built) == {user: v for user, v in BEFORE.items() if user not in LEAVING} | {30: [1, 1, 1]}
    update.main(options_of(built))
    back = publish_embeddings(built.parent / "back", {15: [1, 2, 1]})
    update.main(UpdateOptions(index=str(built), embeddings=back, compact=True))
    assert "0 unchanged, 1 stay deleted: pass" in capsys.readouterr().out
    assert contents(built) == AFTER, "also where their rows are gone"
    update.main(UpdateOptions(index=str(built), embeddings=back, restore=True))
    assert "0 added, 0 replaced, 0 unchanged, 1 returned)" in capsys.readouterr().out
    assert contents(built) == {**AFTER, 15: [1, 2, 1]}
    assert open_index(built).user_ids.tolist() == [*BEFORE, 30]
    assert open_published(built)[1].extra["deleted"] == 1


def test_everybody_may_leave_and_somebody_come(built: Path) -> None:
    file = users_file(built.parent / "all.parquet", list(BEFORE))
    update.main(UpdateOptions(index=str(built), delete=file, compact=True))
    assert contents(built) == {}
    ids, _ = load_index(built).search(make_queries(np.ones((2, DIM), np.float32)), 3)
    assert (ids == -1).all()
    update.main(UpdateOptions(index=str(built), embeddings=publish_embeddings(built.parent / "new", {7: [1, 1, 1]})))
    ids, _ = load_index(built).search(make_queries(np.ones((2, DIM), np.float32)), 3)
    assert ids.tolist() == [[len(BEFORE), -1, -1]] * 2


def test_users_named_by_strings(tmp_path: Path) -> None:
    embeddings = publish_embeddings(tmp_path / "embeddings", {f"u{user}": v for user, v in BEFORE.items()})
    built = tmp_path / "index"
    index.main(IndexOptions(embeddings=embeddings, kind="clusters", out=str(built), copies=1, dtype="int8"))
    changes = publish_embeddings(tmp_path / "changes", {f"u{user}": v for user, v in CHANGES.items()})
    leaving = users_file(tmp_path / "leaving.parquet", [f"u{user}" for user in LEAVING])
    update.main(UpdateOptions(index=str(built), embeddings=changes, delete=leaving))
    found = contents(built)
    assert found.keys() == {f"u{user}" for user in AFTER}
    for user, vector in AFTER.items():
        np.testing.assert_allclose(found[f"u{user}"], vector, atol=0.02)
    assert {len(segment.ids) for segment in open_index(built).segments} == {len(BEFORE), 2}


@pytest.mark.parametrize(
    ("vectors", "centroids", "message"),
    [
        ({10: [1, 2]}, None, "holds vectors of 2 dimensions, the index of 3: export the run"),
        ({10: [1, 2, np.nan]}, None, "holds vectors that are not finite"),
        ({10: [1, 2, 3]}, Centroids(CENTROIDS.vectors + 1, 2), "was exported from another run"),
        ({"ten": [1, 2, 3]}, None, "names users as string, the index as int64"),
        ({"12": [1, 2, 3], "012": [1, 2, 3]}, None, "names users as string, the index as int64: give its ids"),
    ],
)
def test_embeddings_of_something_else_are_refused(
    vectors: Any, centroids: Centroids | None, message: str, built: Path
) -> None:
    manifest = (built / "manifest.json").read_bytes()
    embeddings = publish_embeddings(built.parent / "others", vectors, centroids)
    with pytest.raises(FriendrecError, match=message):
        update.main(UpdateOptions(index=str(built), embeddings=embeddings))
    assert (built / "manifest.json").read_bytes() == manifest and contents(built) == BEFORE


def test_a_user_twice_is_refused(built: Path) -> None:
    with publish(built.parent / "twice", kind="embeddings", options=None, inputs={}) as attempt:
        for part in range(2):
            vectors = np.full((1, DIM), part, np.float32)
            write_part(attempt / f"part-{part}.parquet", np.array([10]), vectors, vectors, "float32")
    with pytest.raises(FriendrecError, match="holds two vectors of a user: export again"):
        update.main(UpdateOptions(index=str(built), embeddings=str(built.parent / "twice")))


@pytest.mark.parametrize(
    ("kind", "users", "refused"),
    [
        (pa.int16(), [14, 15], False),
        (pa.uint64(), [14, 15], False),
        (pa.null(), [], False),
        (pa.uint64(), [2**64 - 1], True),
        (pa.string(), ["14", "014"], True),
        (pa.bool_(), [True], True),
        (pa.timestamp("us"), [14], True),
        (pa.float64(), [14.0], True),
    ],
)
def test_ids_are_of_the_type_that_the_index_has(
    kind: pa.DataType, users: list[Any], refused: bool, built: Path
) -> None:
    pq.write_table(pa.table({"user_id": pa.array(users, kind)}), built.parent / "leaving.parquet")
    options = UpdateOptions(index=str(built), delete=str(built.parent / "leaving.parquet"))
    if refused:
        with pytest.raises(FriendrecError, match=r"--delete names users as .*, the index as int64: give its ids"):
            update.main(options)
    else:
        update.main(options)
    assert contents(built).keys() == BEFORE.keys() - (set() if refused else set(users))


def test_numbers_do_not_name_users_of_strings(tmp_path: Path) -> None:
    names = {f"{user}": vector for user, vector in BEFORE.items()}
    embeddings, built = publish_embeddings(tmp_path / "embeddings", names), tmp_path / "index"
    index.main(IndexOptions(embeddings=embeddings, kind="clusters", out=str(built), nprobe=1))
    leaving = pa.array(["14", "15"]).dictionary_encode()
    pq.write_table(pa.table({"user_id": leaving}), tmp_path / "leaving.parquet")
    update.main(UpdateOptions(index=str(built), delete=str(tmp_path / "leaving.parquet")))
    assert contents(built).keys() == names.keys() - {"14", "15"}
    with pytest.raises(FriendrecError, match="names users as int64, the index as string"):
        update.main(UpdateOptions(index=str(built), delete=users_file(tmp_path / "numbers.parquet", [16])))


def test_damaged_parts_are_told(built: Path) -> None:
    whole = (built / "manifest.json").read_bytes()
    changes = Path(str(options_of(built).embeddings))
    part = changes / "part-0.parquet"
    content = bytearray(part.read_bytes())
    pages = len(content) - 12 - int.from_bytes(content[-8:-4], "little")  # the footer stays as it was
    content[4 : 4 + pages] = b"x" * pages
    part.write_bytes(content)
    with pytest.raises(FriendrecError, match="changes has a damaged part: export again"):
        update.main(UpdateOptions(index=str(built), embeddings=str(changes)))
    part.rename(changes / "part-x.parquet")
    with pytest.raises(FriendrecError, match="holds no users with target vectors of one length: export again"):
        EmbeddingParts.of(changes)
    assert (built / "manifest.json").read_bytes() == whole


@pytest.mark.parametrize("name", ["dtype", "copies"])
def test_a_description_that_lacks_something_is_told(built: Path, name: str) -> None:
    text = (built / "meta.json").read_text()
    (built / "meta.json").write_text(text.replace(f'"{name}"', f'"{name[::-1]}"'))  # of the same size
    with pytest.raises(FriendrecError, match=f"meta.json lacks {name}"):
        update.main(UpdateOptions(index=str(built), compact=True))


def test_mistakes_are_told(built: Path, tmp_path: Path) -> None:
    with pytest.raises(FriendrecError, match="nothing to update: pass --embeddings, --delete or --compact"):
        update.main(UpdateOptions(index=str(built)))
    with pytest.raises(FriendrecError, match="--restore brings back users whom --embeddings names"):
        update.main(UpdateOptions(index=str(built), compact=True, restore=True))
    with pytest.raises(FriendrecError, match="is a URL, where an update could not take effect at once"):
        update.main(UpdateOptions(index="s3://bucket/index", compact=True))
    with pytest.raises(FriendrecError, match=r"nobody\.parquet: no such file; give a Parquet file"):
        update.main(UpdateOptions(index=str(built), delete=str(tmp_path / "nobody.parquet")))
    pq.write_table(pa.table({"name": [1]}), tmp_path / "names.parquet")
    with pytest.raises(FriendrecError, match="give a Parquet file with a column user_id"):
        update.main(UpdateOptions(index=str(built), delete=str(tmp_path / "names.parquet")))
    index.main(IndexOptions(embeddings=str(built.parent / "embeddings"), out=str(tmp_path / "exact")))
    with pytest.raises(FriendrecError, match="of a kind that has no updates"):
        update.main(UpdateOptions(index=str(tmp_path / "exact"), compact=True))
    with writing(built), pytest.raises(FriendrecError, match="being updated by another process"):
        update.main(UpdateOptions(index=str(built), compact=True))


def test_nobody_known_is_deleted_and_no_embeddings_are_no_change(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    update.main(UpdateOptions(index=str(built), delete=users_file(built.parent / "none.parquet", [1, 2])))
    assert "nothing to change (0 deleted, 2 to delete were not there)" in capsys.readouterr().out
    for name, vectors, unchanged in (("same", {10: BEFORE[10]}, 1), ("empty", {}, 0)):
        embeddings = publish_embeddings(built.parent / name, vectors)
        update.main(UpdateOptions(index=str(built), embeddings=embeddings))
        assert f"nothing to change (0 added, 0 replaced, {unchanged} unchanged)" in capsys.readouterr().out
    with pytest.raises(FriendrecError, match="holds no users: there is nothing to index"):
        index.main(IndexOptions(embeddings=embeddings, kind="clusters", out=str(built.parent / "nobody")))
    assert contents(built) == BEFORE
