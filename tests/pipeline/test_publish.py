"""Publishing is all or nothing, and readers refuse what is not as the manifest says."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from friendrec.errors import FriendrecError
from friendrec.pipeline.publish import fingerprint, is_finished, open_published, publish, write_manifest


@dataclass(frozen=True)
class Options:
    out: Path
    interactions: Path
    seed: int = 0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.mkdir()
    (path / "a.parquet").write_bytes(b"events")
    return path


def make(out: str | Path, log: Path, text: str = "rows", **options: int) -> Options:
    made_with = Options(out=Path(out), interactions=log, **options)
    with publish(out, kind="data", options=made_with, inputs={"interactions": log}, extra={"rows": 3}) as attempt:
        (attempt / "sub").mkdir()
        (attempt / "sub" / "part-0.parquet").write_text(text)
    return made_with


@pytest.fixture(params=["local", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An output on a local file system and on an object store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "local":
        yield str(tmp_path / "deep" / "out")
        return
    yield f"memory://{tmp_path.name}/out"
    fsspec.filesystem("memory").store.clear()


def test_round_trip(out: str, log: Path) -> None:
    make(out, log)
    directory, manifest = open_published(out, "data", verify=True)
    assert (directory / "sub" / "part-0.parquet").read_text() == "rows"
    assert manifest.inputs["interactions"] == {"path": str(log), "fingerprint": fingerprint(log)}
    assert manifest.options["seed"] == 0
    assert manifest.extra == {"rows": 3}
    assert manifest.files["sub/part-0.parquet"].bytes == 4
    assert {"friendrec", "python", "torch"} <= set(manifest.versions)


def test_failure_leaves_nothing(out: str, log: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), publish(out, kind="data", options={}, inputs={}) as attempt:
        (attempt / "half").mkdir(exist_ok=bool((attempt / "half").mkdir()))
    with pytest.raises(FriendrecError, match="does not exist"):
        open_published(out)
    assert not list(tmp_path.rglob("half"))


@pytest.mark.parametrize("published", [True, False])
def test_an_input_that_changes_meanwhile_stops_it(out: str, log: Path, tmp_path: Path, published: bool) -> None:
    """Of one with a manifest that is told by the manifest, of another by its bytes; then nothing is left behind."""

    def change(text: str) -> None:
        (log / "a.parquet").write_text(text)
        if published:
            write_manifest(log, kind="index", options={}, inputs={})

    change("events")
    with pytest.raises(FriendrecError) as stopped, publish(out, kind="report", options={}, inputs={"index": log}):
        change("others")
    assert str(stopped.value) == f"{log} changed while it was read: run again"
    with pytest.raises(FriendrecError, match="does not exist"):
        open_published(out)
    assert not list(tmp_path.rglob("*attempt*"))
    with publish(out, kind="report", options={}, inputs={"index": log}):
        change("others")  # the same again
    assert open_published(out)[1].inputs["index"]["fingerprint"] == fingerprint(log)


def test_never_overwrites(out: str, log: Path) -> None:
    make(out, log)
    with pytest.raises(FriendrecError, match="already holds a prepared data set: choose another --out"):
        make(out, log, "other")


def test_repeat_is_recognised_by_content(out: str, log: Path, tmp_path: Path) -> None:
    arguments = {"kind": "data", "inputs": {"interactions": log}}
    assert not is_finished(out, options=Options(Path(out), log), **arguments)
    options = make(out, log)
    assert is_finished(out, options=options, **arguments)
    assert not is_finished(out, options=Options(Path(out), log, seed=1), **arguments)
    assert not is_finished(out, options=options, kind="run", inputs={"interactions": log})
    moved = log.rename(tmp_path / "moved")
    assert is_finished(out, options=Options(tmp_path, moved), kind="data", inputs={"interactions": moved})
    (moved / "a.parquet").write_bytes(b"Events")
    assert not is_finished(out, options=options, kind="data", inputs={"interactions": moved})


def test_someone_elses_directory_is_kept(tmp_path: Path, log: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FriendrecError, match="not published by friendrec"):
        make(tmp_path / "mine", log)
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", log)


def test_race_has_one_winner(tmp_path: Path, log: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FriendrecError, match="meanwhile"), publish(out, kind="data", options={}, inputs={}):
        make(out, log)
    assert open_published(out)[1].extra == {"rows": 3}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "sub/part-0.parquet").write_text("ro"), "part-0.parquet is damaged"),
        (lambda d: (d / "sub/part-0.parquet").write_text("Rows"), "part-0.parquet is damaged"),
        (lambda d: (d / "sub/part-0.parquet").unlink(), "lacks sub/part-0.parquet"),
        (lambda d: (d / "manifest.json").write_text("{"), "damaged manifest.json"),
        (lambda d: (d / "manifest.json").write_text("[]"), "damaged manifest.json"),
        (lambda d: (d / "manifest.json").unlink(), "unfinished or not made by friendrec: pass --data"),
        (lambda d: set_schema_version(d / "manifest.json", 99), "schema version 99, this friendrec reads 1"),
    ],
)
def test_refuses_damage(tmp_path: Path, log: Path, damage: object, message: str) -> None:
    make(tmp_path / "out", log)
    damage(tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(FriendrecError, match=message):
        open_published(tmp_path / "out", "data", verify=True)


def set_schema_version(path: Path, version: int) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))


def test_refuses_another_kind(tmp_path: Path, log: Path) -> None:
    make(tmp_path / "out", log)
    expected = "is a prepared data set, expected a run: pass --run what `friendrec train` made"
    with pytest.raises(FriendrecError, match=re.escape(expected)):
        open_published(tmp_path / "out", "run")


def test_manifest_in_place(tmp_path: Path, log: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    written = write_manifest(run, kind="run", options={"preset": "two_tower_mlp"}, inputs={"data": log})
    assert open_published(run, "run", verify=True)[1] == written
    assert fingerprint(run) == written.fingerprint


def test_missing_input(tmp_path: Path) -> None:
    gone = tmp_path / "nowhere.parquet"
    with pytest.raises(FriendrecError, match=r"nowhere\.parquet does not exist"):
        fingerprint(gone)
    with (
        pytest.raises(FriendrecError, match="whoever opens it says this"),
        publish(tmp_path / "out", kind="data", options={}, inputs={"interactions": gone}),
    ):
        raise FriendrecError("whoever opens it says this")
    with (
        pytest.raises(FriendrecError, match=r"nowhere\.parquet does not exist: check the path"),
        publish(tmp_path / "out", kind="data", options={}, inputs={"interactions": gone}),
    ):
        pass
