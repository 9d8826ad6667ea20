"""Publishing: a stage's output appears whole with its manifest, or not at all.

On a local file system the files are written to a sibling directory that is renamed into place. An object store has
no rename: there the files go under a prefix of their own and the manifest, which maps them, is written last.
"""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from friendrec.errors import FriendrecError
from friendrec.pipeline.manifest import (
    MANIFEST,
    File,
    Manifest,
    checksum,
    describe,
    files_below,
    fingerprint,
    plain,
    sync,
    write_manifest,
)

__all__ = [
    "KINDS",
    "File",
    "Manifest",
    "exists",
    "filesystem",
    "fingerprint",
    "is_finished",
    "noun",
    "open_published",
    "publish",
    "read_manifest",
    "write_manifest",
]

KINDS = {
    "log": ("a log", "simulate", "--interactions"),
    "data": ("a prepared data set", "prepare", "--data"),
    "run": ("a run", "train", "--run"),
    "embeddings": ("embeddings", "export", "--embeddings"),
    "stu": ("a table of tokenized users", "tokenize", "--tokens"),
    "index": ("an index", "index", "--index"),
    "comparison": ("a comparison", "compare", "--out"),
    "frontier": ("a frontier", "frontier", "--out"),
    "insight": ("an insight test", "insight", "--out"),
    "report": ("a report", "evaluate", "--out"),
    "recommendations": ("recommendations", "recommend", "--recommendations"),
}
"""Each kind of directory: how errors name it, the verb that makes it, the option that takes it."""


@contextmanager
def publish(
    out: str | Path,
    *,
    kind: str,
    options: object,
    inputs: Mapping[str, str | Path],
    extra: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """Give a directory to write to; make it `out` when the block ends well, remove it when the block raises.

    `extra` is read at the end, so the block may fill it. An `out` that exists is never overwritten. Inputs are
    recorded as they are when the block begins; where they are others when it ends, it may have read a mixture, and
    FriendrecError is raised.

        with publish("data", kind="data", options=options, inputs={"interactions": log}) as attempt:
            write_files(attempt)
    """
    _refuse_existing(out)
    before = {name: _fingerprint_if_readable(path) for name, path in inputs.items()}
    attempt = _attempt_directory(out)
    try:
        yield attempt
        manifest = describe(attempt, kind=kind, options=options, inputs=inputs, extra=extra or {})
        for name, source in manifest.inputs.items():
            if source["fingerprint"] != before[name]:
                raise FriendrecError(f"{inputs[name]} changed while it was read: run again")
        if _is_url(out):
            _upload(attempt, str(out), manifest)
        else:
            _rename_into_place(attempt, _local(out), manifest)
    finally:
        shutil.rmtree(attempt, ignore_errors=True)


def is_finished(out: str | Path, *, kind: str, options: object, inputs: Mapping[str, str | Path]) -> bool:
    """Whether `out` was published with these options from these inputs, so that repeating the stage may be skipped.

    Inputs are compared by content: neither their paths nor that of `out` matter.
    """
    if not exists(out, MANIFEST):
        return False
    manifest = _read_manifest(out)
    if manifest.kind != kind or _settings(manifest.options, inputs) != _settings(plain(options), inputs):
        return False
    made_from = {name: source["fingerprint"] for name, source in manifest.inputs.items()}
    return made_from == {name: fingerprint(path) for name, path in inputs.items()}


def open_published(path: str | Path, kind: str | None = None, verify: bool = False) -> tuple[Path, Manifest]:
    """The local directory and manifest of something published; a URL is fetched into the cache first.

    Sizes are always checked, checksums when `verify` is true.
    """
    while True:
        manifest = read_manifest(path, kind)
        directory = _fetch(str(path), manifest) if _is_url(path) else _local(path)
        try:
            _check_files(directory, manifest, verify)
        except FriendrecError:
            if read_manifest(path, kind) == manifest:  # else an update has replaced it and the files
                raise
        else:
            return directory, manifest


def read_manifest(path: str | Path, kind: str | None = None) -> Manifest:
    """The manifest of something published; its files are neither fetched nor looked at."""
    if not exists(path):
        raise FriendrecError(f"{path} does not exist: {_remedy(kind)}")
    if not exists(path, MANIFEST):
        raise FriendrecError(f"{path} has no {MANIFEST}, so it is unfinished or not made by friendrec: {_remedy(kind)}")
    manifest = _read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise FriendrecError(f"{path} is {noun(manifest.kind)}, expected {noun(kind)}: {_remedy(kind)}")
    return manifest


def noun(kind: str) -> str:
    """How a kind of directory is named."""
    return KINDS[kind][0] if kind in KINDS else f"of kind {kind!r}"


def _remedy(kind: str | None) -> str:
    if kind is None:
        return "check the path"
    _, verb, option = KINDS[kind]
    return f"pass {option} what `friendrec {verb}` made"


def _settings(options: dict[str, Any], inputs: Mapping[str, str | Path]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "out" and name not in inputs}


def _check_files(directory: Path, manifest: Manifest, verify: bool) -> None:
    for name, file in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise FriendrecError(f"{directory} lacks {name}: make it again")
        if path.stat().st_size != file.bytes or (verify and checksum(path).sha256 != file.sha256):
            raise FriendrecError(f"{path} is damaged (not what {MANIFEST} says): make {directory} again")


def _refuse_existing(out: str | Path) -> None:
    if exists(out, MANIFEST):
        made = noun(_read_manifest(out).kind)
        raise FriendrecError(f"{out} already holds {made}: choose another --out, or remove it")
    if not _is_url(out) and _local(out).exists() and not _is_empty_directory(_local(out)):
        raise FriendrecError(f"{out} exists and was not published by friendrec: choose another --out")


def _fingerprint_if_readable(path: str | Path) -> str | None:
    """None where there is nothing to read: whoever opens it says better what is amiss."""
    try:
        return fingerprint(path)
    except (FriendrecError, OSError):
        return None


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _attempt_directory(out: str | Path) -> Path:
    if _is_url(out):
        return Path(tempfile.mkdtemp(prefix="friendrec-"))
    target = _local(out)
    attempt = target.with_name(f".{target.name}.attempt-{uuid.uuid4().hex[:8]}")
    try:
        attempt.mkdir(parents=True)
    except OSError as error:
        raise FriendrecError(f"cannot write {out} ({error.strerror}): choose another --out") from error
    return attempt


def _rename_into_place(attempt: Path, target: Path, manifest: Manifest) -> None:
    (attempt / MANIFEST).write_text(manifest.to_json())
    for path in attempt.rglob("*"):
        sync(path)
    sync(attempt)
    try:
        attempt.rename(target)
    except OSError as error:
        raise FriendrecError(f"{target} was made by someone else meanwhile: choose another --out") from error
    sync(target.parent)


def _upload(attempt: Path, url: str, manifest: Manifest) -> None:
    fs, root = filesystem(url)
    prefix = f"attempt-{uuid.uuid4().hex}"
    for name, path in files_below(attempt).items():
        stored = f"{root}/{prefix}/{name}"
        fs.makedirs(stored.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(path), stored)
    files = {name: replace(file, stored=f"{prefix}/{name}") for name, file in manifest.files.items()}
    fs.pipe_file(f"{root}/{MANIFEST}", replace(manifest, files=files).to_json().encode())


def _fetch(url: str, manifest: Manifest) -> Path:
    """The files of a URL under their proper names in the cache, which is keyed by their content."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "friendrec"
    directory = cache / manifest.fingerprint
    if directory.exists():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    fs, root = filesystem(url)
    attempt = Path(tempfile.mkdtemp(dir=cache))
    try:
        for name, file in manifest.files.items():
            (attempt / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{root}/{file.stored or name}", str(attempt / name))
        _check_files(attempt, manifest, verify=True)
        (attempt / MANIFEST).write_text(manifest.to_json())
        if not directory.exists():
            attempt.rename(directory)
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    return directory


def _read_manifest(path: str | Path) -> Manifest:
    fs, root = filesystem(path)
    return Manifest.from_json(fs.cat_file(f"{root}/{MANIFEST}").decode(errors="replace"), str(path))


def exists(path: str | Path, name: str = "") -> bool:
    """Whether there is anything at a path or URL, or of that name in it."""
    fs, root = filesystem(path)
    found: bool = fs.exists(f"{root}/{name}" if name else root)
    return found


def filesystem(path: str | Path) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path there."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(str(path))
    return fs, root.rstrip("/")


def _is_url(path: str | Path) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")


def _local(path: str | Path) -> Path:
    return Path(str(path).removeprefix("file://")).absolute()
