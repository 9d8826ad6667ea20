"""The index of kind clusters, built by ranks: each reads, assigns and writes its own share of the users.

A list holds the users of rank 0 first, then those of rank 1, and so on: with the counts of all ranks in each list every
rank knows the places of its rows in the shared files, which come out the same for any number of ranks. No rank holds
more than a block of vectors; of users there are the numbers of their lists, and on rank 0 the raw ids.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from friendrec.errors import FriendrecError
from friendrec.pipeline.clustering import spread
from friendrec.pipeline.embedding_parts import EmbeddingParts
from friendrec.pipeline.embeddings import read_centroids
from friendrec.pipeline.index import RECALL, SAMPLE, IndexOptions
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.retrieval.approximate import least_effort
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.clusters import ClusterIndex
from friendrec.pipeline.retrieval.segments import Dtype, stored
from friendrec.pipeline.retrieval.store import create_segment, open_index, segment_path, write_constants, write_user_ids
from friendrec.pipeline.together import is_rank_zero, publish_together, say
from friendrec.sharding.parallel import process_group

Lists = NDArray[np.int32]
"""The lists of each user `[n, copies]`, the nearest first."""
Advance = Callable[[int], object]


def publish_clusters(options: IndexOptions, inputs: Mapping[str, str | Path]) -> None:
    """Build the index by all ranks of torchrun, and say what it is."""
    assert options.embeddings is not None
    directory, _ = open_published(options.embeddings, "embeddings")
    parts = EmbeddingParts.of(directory)
    if not len(parts):
        raise FriendrecError(f"{options.embeddings} holds no users: there is nothing to index")
    centroids = _centroids(directory, options.embeddings, parts.dimensions)
    copies, dtype = min(options.copies or 1, len(centroids)), options.dtype or "float32"
    with (
        process_group(),
        publish_together(options.out, kind="index", options=options, inputs=inputs, extra={}) as place,
    ):
        with Progress(console=Console(stderr=True), transient=True, disable=not is_rank_zero()) as bar:
            task = bar.add_task("users", total=2 * len(parts) // dist.get_world_size())
            load = build(place, parts, centroids, copies, dtype, lambda users: bar.advance(task, users))
        if is_rank_zero():
            nprobe, recall = _effort(place, parts, options)
            parameters = {"dtype": dtype, "copies": copies, "nprobe": nprobe, "recall": recall}
            write_constants(place, centroids, len(parts), **parameters)
            best = "the exact best" if dtype == "float32" else "what its rows can find"
            found = f", which finds {recall:.3f} of {best}" if recall is not None else ""
            even = spread(load)
            said = f"{parts.dimensions} dimensions, clusters, nprobe {nprobe}{found}; {len(centroids):,} lists, "
            said += f"the fullest {even['fullest']:.1f} times the mean, {even['empty']:,.0f} empty"
    if is_rank_zero():
        say(f"{options.out}: {len(parts):,} users, {said}")


def _centroids(directory: Path, source: str, dimensions: int) -> Centroids:
    centroids = read_centroids(directory)
    if centroids is None:
        raise FriendrecError(
            f"{source} holds no clusters, for its run was trained without: "
            "train with --clusters residual and export again, or pass --kind ivf"
        )
    width = centroids.vectors.shape[1]
    if width != dimensions:
        raise FriendrecError(
            f"{source} holds vectors of {dimensions} dimensions and centroids of {width}: export again"
        )
    return centroids


def build(
    attempt: Path, parts: EmbeddingParts, centroids: Centroids, copies: int, dtype: Dtype, advance: Advance
) -> NDArray[np.int64]:
    """Write an index of effort 1 into `attempt`; ranks of the default process group call it together.

    Returns users by their first list, `[C]`. `advance` hears of every block, each user twice.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    start, stop = (int(bound) for bound in np.linspace(0, len(parts), ranks + 1).astype(np.int64)[rank : rank + 2])
    with _shared_failures():
        lists = _assign(parts, centroids, copies, start, stop, advance)
    counts = torch.zeros((ranks, 2, len(centroids)), dtype=torch.int64)
    for row, assigned in zip(counts[rank], (lists, lists[:, 0]), strict=True):
        row[:] = torch.from_numpy(np.bincount(assigned.ravel(), minlength=len(centroids)))
    dist.all_reduce(counts)
    in_list, first = counts.sum(dim=0).numpy()
    offsets = np.concatenate([[0], np.cumsum(in_list)])
    place = segment_path(attempt, 0)
    with _shared_failures():
        if rank == 0:
            write_user_ids(attempt, 0, parts.user_ids())
            write_constants(attempt, centroids, len(parts), nprobe=1, recall=None)
            create_segment(place, offsets, parts.dimensions, dtype)
    with _shared_failures():
        _write(place, parts, lists, start, offsets[:-1] + counts[:rank, 0].sum(dim=0).numpy(), dtype, advance)
    users_in: NDArray[np.int64] = first
    return users_in


def _assign(parts: EmbeddingParts, centroids: Centroids, copies: int, start: int, stop: int, advance: Advance) -> Lists:
    lists = np.empty((stop - start, copies), np.int32)
    for first, vectors in parts.blocks("target", start, stop):
        lists[first - start : first - start + len(vectors)] = centroids.assign(vectors, copies)
        advance(len(vectors))
    return lists


def _write(
    place: Path,
    parts: EmbeddingParts,
    lists: Lists,
    start: int,
    cursor: NDArray[np.int64],
    dtype: Dtype,
    advance: Advance,
) -> None:
    """Rows of the users from `start` on, in each list from the place `cursor` `[C]` on."""
    files = {name: np.load(place / f"{name}.npy", mmap_mode="r+") for name in ("ids", "primary", "rows", "scale")}
    for first, vectors in parts.blocks("target", start, start + len(lists)):
        mine = lists[first - start : first - start + len(vectors)]
        order = np.argsort(mine.ravel(), kind="stable")  # by list, then by user
        owners, listed = order // mine.shape[1], mine.ravel()[order]
        at = cursor[listed] + np.arange(len(listed)) - np.searchsorted(listed, listed)
        cursor = cursor + np.bincount(listed, minlength=len(cursor))
        rows, scale = stored(vectors, dtype)
        files["ids"][at] = first + owners
        files["primary"][at] = mine[owners, 0]
        files["rows"][at] = rows[owners]
        if len(scale):
            files["scale"][at] = scale[owners]
        advance(len(vectors))
    for file in files.values():
        file.flush()


def _effort(place: Path, parts: EmbeddingParts, options: IndexOptions) -> tuple[int, float | None]:
    """Lists to look at: as told, or as the recall takes on a sample of the queries exported, with what they find."""
    opened = open_index(place)
    index = ClusterIndex(opened.centroids, opened.segments, opened.user_ids, effort=1)
    if options.nprobe is not None:
        return min(options.nprobe, index.most_effort), None
    sample = np.sort(np.random.default_rng(0).permutation(len(parts))[:SAMPLE])
    every = replace(index, effort=index.most_effort)  # what finds the exact best of the stored vectors
    chosen, found = least_effort(index, every, parts.rows("query", sample), options.recall or RECALL, first=1)
    return chosen.effort, found


@contextmanager
def _shared_failures() -> Iterator[None]:
    """What stops one rank in the block stops all after it, with what was said first."""
    said: str | None = None
    try:
        yield
    except FriendrecError as error:
        said = str(error)
    heard: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, said)
    if first := next((text for text in heard if text), None):
        raise FriendrecError(first)
