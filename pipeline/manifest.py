"""manifest.json: what a published directory is, how it was made, from what, and the checksum of every file in it."""

import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from friendrec import __version__
from friendrec.errors import FriendrecError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
LIBRARIES = ("duckdb", "faiss-cpu", "ibis-framework", "numpy", "pyarrow", "torch", "torchrec")


@dataclass(frozen=True)
class File:
    """One file of a published directory; `stored` is its path there where it is not the name it is known by."""

    bytes: int
    sha256: str
    stored: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The lineage of a published directory. `files` maps relative paths to sizes and checksums."""

    kind: str
    created: str
    command: list[str]
    options: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    versions: dict[str, str]
    files: dict[str, File]
    extra: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str, source: str) -> "Manifest":
        """Parse, or raise a FriendrecError that names `source`."""
        try:
            fields = json.loads(text)
            version = fields["schema_version"]
            if version == SCHEMA_VERSION:
                files = {name: File(**file) for name, file in fields.pop("files").items()}
                return Manifest(files=files, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FriendrecError(f"{source} has a damaged {MANIFEST}: remove it and make it again") from error
        raise FriendrecError(
            f"{source} has schema version {version}, this friendrec reads {SCHEMA_VERSION}: make it again"
        )

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes and checksums: equal for equal contents, whatever the time, place and command."""
        return combine((name, file.bytes, file.sha256) for name, file in self.files.items())


def describe(
    directory: Path,
    *,
    kind: str,
    options: object,
    inputs: Mapping[str, str | Path],
    extra: Mapping[str, Any],
    only: Collection[str] | None = None,
) -> Manifest:
    """The manifest of a directory as it is now: of all files below, or of those named alone."""
    found = files_below(directory)
    counted = found.keys() - {MANIFEST} if only is None else only
    return Manifest(
        kind=kind,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command(),
        options=plain(options),
        inputs={name: {"path": absolute(path), "fingerprint": fingerprint(path)} for name, path in inputs.items()},
        versions=versions(),
        files={name: checksum(found[name]) for name in sorted(counted)},
        extra=plain(extra),
    )


def write_manifest(
    directory: str | Path,
    *,
    kind: str,
    options: object,
    inputs: Mapping[str, str | Path],
    extra: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
) -> Manifest:
    """Finish a directory in place: checksum its files and write its manifest, whole or not at all.

    For stages that resume in their own output (train, compare); the others use `publish`. `only` these files count
    where others below have manifests of their own.
    """
    directory = Path(directory)
    manifest = describe(directory, kind=kind, options=options, inputs=inputs, extra=extra or {}, only=only)
    put_manifest(directory, manifest)
    return manifest


def put_manifest(directory: Path, manifest: Manifest) -> None:
    """Write it, in place of one that may be there, whole or not at all."""
    unfinished = directory / f"{MANIFEST}.unfinished"
    unfinished.write_text(manifest.to_json())
    sync(unfinished)
    unfinished.replace(directory / MANIFEST)
    sync(directory)


def fingerprint(path: str | Path) -> str:
    """Hash of an input's contents: from the manifest where there is one, else by reading every file of it."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(str(path))
    if not fs.exists(root):
        raise FriendrecError(f"{path} does not exist: check the path")
    manifest = f"{root}/{MANIFEST}"
    if fs.isfile(manifest):
        return Manifest.from_json(fs.cat_file(manifest).decode(errors="replace"), str(path)).fingerprint
    rows = []
    for name in fs.find(root):
        with fs.open(name) as stream:
            relative = name.removeprefix(root).lstrip("/") or name.rpartition("/")[2]
            rows.append((relative, fs.size(name), hashlib.file_digest(stream, "sha256").hexdigest()))
    return combine(rows)


def combine(rows: Any) -> str:
    """One hash of (name, bytes, sha256) rows in any order."""
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def checksum(path: Path) -> File:
    with path.open("rb") as stream:
        return File(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def files_below(directory: Path) -> dict[str, Path]:
    """Every file under a directory by its relative POSIX path."""
    return {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}


def plain(value: object) -> dict[str, Any]:
    """Options (dataclass or mapping) as what JSON gives back; paths become strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    result: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return result


def command() -> list[str]:
    """The words that this process was called with."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def absolute(path: str | Path) -> str:
    return str(path) if "://" in str(path) else os.path.abspath(path)


def versions() -> dict[str, str]:
    found = {"friendrec": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def sync(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
