"""What a published directory holds and was made from, as its manifest tells it; of a URL nothing is fetched whole."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from friendrec.errors import FriendrecError
from friendrec.pipeline.manifest import MANIFEST, File, Manifest, absolute, combine, fingerprint
from friendrec.pipeline.publish import exists, filesystem, read_manifest

State = Literal["unchanged", "changed", "gone", "not checked"]


@dataclass(frozen=True)
class Published:
    """A published directory or URL and its manifest."""

    place: str
    manifest: Manifest

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.manifest.files.values())

    def open(self, name: str) -> Any:
        """One of its files, as a binary stream."""
        found, stored = self._stored(name, self.manifest.files[name])
        return found.open(stored)

    def text(self, name: str) -> str:
        """One of its files, as text."""
        with self.open(name) as stream:
            content: bytes = stream.read()
        return content.decode()

    def damage(self, verify: bool) -> str | None:
        """The first file that is not what the manifest says, by its size or, with `verify`, its checksum."""
        for name, file in self.manifest.files.items():
            found, stored = self._stored(name, file)
            if not found.exists(stored):
                return f"{name} is missing"
            if found.size(stored) != file.bytes:
                return f"{name} has another size"
            if verify:
                with found.open(stored) as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                        return f"{name} has another checksum"
        return None

    def _stored(self, name: str, file: File) -> tuple[Any, str]:
        """The file system and the path there."""
        found, root = filesystem(self.place)
        return found, f"{root}/{file.stored or name}"


@dataclass(frozen=True)
class Source:
    """One input of something published. `published` is what lies there now, where that is friendrec's."""

    name: str
    path: str
    state: State
    published: Published | None = None


def look(place: str) -> Published:
    """What is published there, or a FriendrecError."""
    place = absolute(place).rstrip("/")
    return Published(place, read_manifest(place))


def sources(published: Published, verify: bool = False) -> Iterator[Source]:
    """The inputs, where they were or, when everything has moved together, beside it.

    What is not friendrec's (a raw log) is read and compared only with `verify`.
    """
    for name, source in published.manifest.inputs.items():
        yield _find(name, source["path"], source["fingerprint"], published.place, verify)


def input_path(place: str, name: str) -> str:
    """Where an input of something published is now, with the contents it had; FriendrecError where it is not."""
    source = next((source for source in sources(look(place)) if source.name == name), None)
    if source is None:
        raise FriendrecError(f"{place} was made from no {name}: pass --{name}")
    if source.state != "unchanged":
        happened = "is gone" if source.state == "gone" else "holds something else now"
        raise FriendrecError(f"{place} was made from {source.path}, which {happened}: pass where its {name} is")
    return source.path


def _find(name: str, path: str, wanted: str, place: str, verify: bool) -> Source:
    moved = f"{place.rpartition('/')[0]}/{path.rpartition('/')[2]}"
    there = [candidate for candidate in (path, moved) if exists(candidate)]
    for candidate in there:
        published = _published(candidate)
        if published is not None and _fingerprint(candidate, published) == wanted:
            return Source(name, candidate, "unchanged", published)
    if path not in there:
        return Source(name, path, "gone")
    if _published(path) is not None:
        return Source(name, path, "changed", _published(path))
    if not verify:
        return Source(name, path, "not checked")
    return Source(name, path, "unchanged" if fingerprint(path) == wanted else "changed")


def _published(path: str) -> Published | None:
    """What is published at a path or, for a folder of it, around it."""
    around, _, folder = path.rpartition("/")
    for place in (path, around):
        if not exists(place, MANIFEST):
            continue
        try:
            published = look(place)
        except FriendrecError:
            continue  # damaged, or of another version: nothing is known of it
        if place == path or any(name.startswith(f"{folder}/") for name in published.manifest.files):
            return published
    return None


def _fingerprint(path: str, published: Published) -> str:
    """The fingerprint of a published directory or of a folder of it, from the manifest alone."""
    if absolute(path).rstrip("/") == published.place:
        return published.manifest.fingerprint
    folder = f"{PurePosixPath(path).name}/"
    files = published.manifest.files.items()
    inside = [(name.removeprefix(folder), f.bytes, f.sha256) for name, f in files if name.startswith(folder)]
    return combine(inside)
