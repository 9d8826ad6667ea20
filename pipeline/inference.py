"""A trained run, opened to answer queries: the one scorer behind evaluate, recommend and serve."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from friendrec.datasets.packing import Packer, Rows, ranges
from friendrec.datasets.packing import Queries as PackedQueries
from friendrec.datasets.prepared import PreparedData, load_prepared
from friendrec.errors import FriendrecError
from friendrec.models.two_tower import TwoTower
from friendrec.pipeline.build import build_model
from friendrec.pipeline.config import RunConfig
from friendrec.pipeline.evaluation.tasks import LEVEL, Exclusions
from friendrec.pipeline.publish import fingerprint, open_published
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.kinds import Index, load_index
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.sharding.checkpoint import load_whole

BLOCK = 2048
"""Queries, or users, encoded at a time."""


@dataclass(frozen=True)
class Recommender:
    """A model with the data it reads and the index it searches."""

    data: PreparedData
    config: RunConfig
    packer: Packer
    model: TwoTower
    retriever: Index
    exclusions: Exclusions

    def queries(self, actors: Rows, as_of: NDArray[np.int64]) -> Queries:
        """Queries of dense user rows `[Q]`, knowing what lies strictly before `as_of` (µs) `[Q]`; no exclusions."""
        queries = encode_queries(self.model, self.packer, actors, as_of)
        if not (np.isfinite(queries.vector).all() and np.isfinite(queries.sparse_bonus).all()):
            raise FriendrecError("the run's query vectors are not finite, so nothing can be ranked: train it again")
        return queries

    def recommend(
        self, actors: Rows, as_of: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """New friends for each actor: candidate rows and scores `[Q, k]`, best first; -1 and -inf where none is left.

        Left out are the actor, whom the actor has contacted, and who is blocked either way, as of that time.
        """
        hidden = self.exclusions.at(LEVEL["new_link"], actors, as_of)
        return self.retriever.search(self.queries(actors, as_of).excluding(*hidden), k)


def open_run(run: str | Path, data: str | Path) -> tuple[RunConfig, PreparedData, Path]:
    """A finished run's config, the data it was trained on, and its best checkpoint."""
    data_path, _ = open_published(data, "data")
    run_path, manifest = open_published(run, "run")
    if manifest.inputs["data"]["fingerprint"] != fingerprint(data_path):
        raise FriendrecError(
            f"{run} was trained on data with another vocabulary than {data}: "
            f"pass --data {manifest.inputs['data']['path']}, or train on {data}"
        )
    return RunConfig.load(run_path), load_prepared(data_path), run_path / manifest.extra["checkpoint"]


def open_recommender(run: str | Path, data: str | Path, index: str | Path | None = None) -> Recommender:
    """Open a finished run on its prepared data; without an index, one over the run's own target vectors."""
    config, prepared, weights = open_run(run, data)
    packer = Packer(prepared, config.context)
    model = build_model(config, packer.tables)
    load_whole(weights, model)
    model.eval()
    candidates = np.arange(prepared.num_train_users)
    if index is not None:
        retriever: Index = _open_index(index, prepared, model, packer)
    else:
        vectors = encode_targets(model, packer, candidates)
        if not np.isfinite(vectors).all():
            raise FriendrecError(f"{run} gives vectors that are not finite, so nothing can be ranked: make it again")
        retriever = ExactIndex(vectors, prepared.user_ids[candidates])
    return Recommender(prepared, config, packer, model, retriever, Exclusions.of(prepared))


def _open_index(index: str | Path, data: PreparedData, model: TwoTower, packer: Packer) -> Index:
    """An index whose positions are the rows of the data's train users, and whose vectors are the model's.

    Another run's index has the same users and often the same width: only the vectors tell, up to their precision.
    """
    opened = load_index(open_published(index, "index")[0])
    if not np.array_equal(opened.user_ids, data.user_ids[: data.num_train_users]):
        raise FriendrecError(f"{index} holds other users than the prepared data: build it from this data's embeddings")
    sample = np.linspace(0, len(opened) - 1, min(len(opened), 100)).astype(np.int64)
    expected, found = encode_targets(model, packer, sample), opened.vectors_of(sample)
    if not np.isfinite(found).all():
        raise FriendrecError(f"{index} holds vectors that are not finite, so nothing can be ranked: make it again")
    if expected.shape != found.shape or np.abs(expected - found).max() > 0.02 * np.abs(expected).max():
        raise FriendrecError(f"{index} holds other vectors than the run gives: export this run and index that")
    return opened


@torch.no_grad()
def encode_queries(model: TwoTower, packer: Packer, actors: Rows, as_of: NDArray[np.int64], blocks: int = 0) -> Queries:
    """Vectors of the queries and the bonus of the contacts that each names, in blocks of bounded memory.

    Ranks of a sharded model call this together and give the same number of `blocks`, for every block is a collective.
    """
    order = np.lexsort((as_of, actors))
    parts = [
        _encode_block(model, packer, actors[block], as_of[block])
        for block in np.array_split(order, blocks or num_blocks(len(order)))
    ]
    vectors, ids, bonuses, counts = (np.concatenate(part) for part in zip(*parts, strict=True))
    place = np.argsort(order)  # of each query among the sorted ones
    chosen = ranges((np.cumsum(counts) - counts)[place], counts[place])
    nothing = np.zeros(len(actors) + 1, np.int64)
    return Queries(
        vector=vectors[place],
        sparse_offsets=np.concatenate([[0], np.cumsum(counts[place])]),
        sparse_ids=ids[chosen],
        sparse_bonus=bonuses[chosen],
        exclude_offsets=nothing,
        exclude_ids=nothing[:0],
    )


def _encode_block(model: TwoTower, packer: Packer, users: Rows, times: NDArray[np.int64]) -> tuple[np.ndarray, ...]:
    """Vectors `[Q, D + 1]`, named candidates `[T]`, their bonus `[T]`, how many each query names `[Q]`."""
    contacts = packer.state.contacts(users, times, packer.config.contacts)
    queries = PackedQueries(users, times, groups=users, conditions=np.zeros_like(users), actors=users)
    context, _ = packer.pack(queries, contacts)
    context = context.to(_device(model))
    encoded = model.encode_queries(context, model.lookup(context.ids))
    named = (contacts.partner < packer.data.num_train_users) & (model.copy_term is not None)
    query = np.repeat(np.arange(len(users)), np.diff(contacts.offsets))
    counts = np.bincount(query[named], minlength=len(users))
    return encoded.vector.cpu().numpy(), contacts.partner[named], encoded.bonus.cpu().numpy()[named], counts


@torch.no_grad()
def encode_targets(model: TwoTower, packer: Packer, users: Rows, blocks: int = 0) -> NDArray[np.float32]:
    """Target vectors of dense user rows, float32 `[len(users), D + 1]`; `blocks` as for `encode_queries`."""
    vectors = [
        model.encode_targets(model.lookup(packer.ids(block).to(_device(model)))).cpu().numpy()[: len(block)]
        for block in np.array_split(users, blocks or num_blocks(len(users)))
    ]
    return np.concatenate(vectors)


def _device(model: TwoTower) -> torch.device:
    """Where the towers are, and the tables with them."""
    return next(model.target_tower.parameters()).device


def num_blocks(rows: int) -> int:
    """Blocks in which so many queries or users are encoded; at least one."""
    return max(1, -(-rows // BLOCK))
