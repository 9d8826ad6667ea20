"""A trained run, opened to answer queries: the one scorer behind evaluate, recommend and serve."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from friendrec.datasets.batch import Context
from friendrec.datasets.packing import Codes, Packer, Rows, ranges
from friendrec.datasets.packing import Queries as PackedQueries
from friendrec.datasets.prepared import PreparedData, load_prepared
from friendrec.errors import FriendrecError
from friendrec.hashing import GOLDEN
from friendrec.models.backoff import BackOff, stand_ins
from friendrec.models.config import StuConfig
from friendrec.models.decoding import Decoder
from friendrec.models.stu import Stu, Writer
from friendrec.models.two_tower import TwoTower
from friendrec.pipeline.build import build_model
from friendrec.pipeline.config import RunConfig
from friendrec.pipeline.evaluation.seen import SeenOnly
from friendrec.pipeline.evaluation.tasks import LEVEL, Exclusions
from friendrec.pipeline.publish import fingerprint, open_published
from friendrec.pipeline.retrieval.centroids import Centroids
from friendrec.pipeline.retrieval.clusters import ClusterIndex
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.kinds import Index, VectorIndex, load_index
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.stu import StuIndex
from friendrec.pipeline.tokens import codes_of, tokens_of_run
from friendrec.sharding.checkpoint import load_whole

BLOCK = 2048
"""Queries, or users, encoded at a time."""
SPREAD = GOLDEN.astype(np.int64)
"""An odd number, so that times and users hardly meet in the key of a query."""


@dataclass(frozen=True)
class Recommender:
    """A model with the data it reads and the index it searches."""

    data: PreparedData
    config: RunConfig
    packer: Packer
    model: TwoTower | Stu
    retriever: Index
    exclusions: Exclusions

    def queries(self, actors: Rows, as_of: NDArray[np.int64]) -> Queries:
        """Queries of dense user rows `[Q]`, knowing what lies strictly before `as_of` (µs) `[Q]`; no exclusions."""
        queries = encode_queries(self.model, self.packer, actors, as_of, num_candidates=len(self.retriever))
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
    codes = codes_of(tokens_of_run(run), prepared, run) if isinstance(config.model, StuConfig) else None
    packer = Packer(prepared, config.context, codes, config.model.clusters_of(prepared.num_train_users))
    model = build_model(config, packer.tables)
    load_whole(weights, model)
    model.eval()
    if isinstance(model, Stu):
        trie = _stu_index(index, run, model, packer)
        retriever: Index = trie
        packer = _knowing(packer, trie)
    elif index is not None:
        retriever = _open_index(index, prepared, model, packer)
    else:
        vectors = encode_targets(model, packer, np.arange(prepared.num_train_users))
        if not np.isfinite(vectors).all():
            raise FriendrecError(f"{run} gives vectors that are not finite, so nothing can be ranked: make it again")
        retriever = ExactIndex(vectors, prepared.user_ids[: prepared.num_train_users])
    exclusions = Exclusions.of(prepared)
    if len(retriever) > prepared.num_train_users:  # tokens of users who came later, each from its first event on
        exclusions = SeenOnly.among(prepared, exclusions, 0, len(retriever))
    return Recommender(prepared, config, packer, model, retriever, exclusions)


def _stu_index(index: str | Path | None, run: str | Path, model: Stu, packer: Packer) -> StuIndex:
    """The trie of an index, or of the run's own tokens, train users only, with the run's decoder."""
    assert packer.codes is not None
    data = packer.data
    tokens = packer.codes.tokens[: data.num_train_users]
    if index is None:
        built = StuIndex.build(tokens, data.user_ids[: data.num_train_users], packer.codes.sizes)
        return dataclasses.replace(built, decoder=writer(model, packer))
    opened = load_index(open_published(index, "index")[0])
    if not isinstance(opened, StuIndex):
        raise FriendrecError(f"{index} holds vectors, and {run} writes tokens: index the tokens with --kind stu")
    if len(opened) < len(tokens) or not np.array_equal(opened.user_ids, data.user_ids[: len(opened)]):
        raise FriendrecError(f"{index} holds other users than the prepared data: index tokens that were made for it")
    if not np.array_equal(opened.codes_of(np.arange(len(tokens))), tokens):
        raise FriendrecError(f"{index} holds other codes than the run was trained with: index those with --kind stu")
    decoder: Decoder = writer(model, packer)
    if len(opened) > len(tokens):  # it holds users who came after, whose codes the run has never written
        decoder = BackOff.of(decoder, tokens)
    return dataclasses.replace(opened, decoder=decoder)


def _knowing(packer: Packer, index: StuIndex) -> Packer:
    """The packer with the codes of the newcomers whom the index holds, and the run does not."""
    assert packer.codes is not None
    if len(index) <= len(packer.codes.tokens):
        return packer
    codes = Codes(index.codes_of(np.arange(len(index))), packer.codes.sizes)
    return Packer(packer.data, packer.config, codes, packer.tables.rows.get("cluster", 0))


@torch.no_grad()
def writer(model: Stu, packer: Packer) -> Writer:
    """The decoder of a model, which writes the codes of users; ranks of a sharded model call this together."""
    return Writer(model, model.lookup(packer.ids(np.empty(0, np.int64)).to(_device(model))).codebooks)


def _open_index(index: str | Path, data: PreparedData, model: TwoTower, packer: Packer) -> Index:
    """An index whose positions are the rows of the data's train users, and whose vectors are the model's.

    Another run's index has the same users and often the same width: only the vectors tell, up to their precision.
    """
    opened = load_index(open_published(index, "index")[0])
    if not isinstance(opened, VectorIndex):
        raise FriendrecError(f"{index} holds codes, and the run gives vectors: export the run and index its embeddings")
    if not np.array_equal(opened.user_ids, data.user_ids[: data.num_train_users]):
        raise FriendrecError(f"{index} holds other users than the prepared data: build it from this data's embeddings")
    there = np.arange(len(opened))
    if isinstance(opened, ClusterIndex):
        there = there[opened.is_live(there)]
        if not len(there):
            raise FriendrecError(f"all users of {index} were deleted: `friendrec update --restore` brings them back")
    sample = there[np.linspace(0, len(there) - 1, min(len(there), 100)).astype(np.int64)]
    expected, found = encode_targets(model, packer, sample), opened.vectors_of(sample)
    if not np.isfinite(found).all():
        raise FriendrecError(f"{index} holds vectors that are not finite, so nothing can be ranked: make it again")
    if expected.shape != found.shape or np.abs(expected - found).max() > 0.02 * np.abs(expected).max():
        raise FriendrecError(f"{index} holds other vectors than the run gives: export this run and index that")
    return opened


@torch.no_grad()
def encode_queries(
    model: TwoTower | Stu,
    packer: Packer,
    actors: Rows,
    as_of: NDArray[np.int64],
    blocks: int = 0,
    num_candidates: int | None = None,
) -> Queries:
    """Vectors of the queries and the bonus of the contacts that each names, in blocks of bounded memory.

    Named are candidates alone: the users of the first rows, by default those of the train period.
    Ranks of a sharded model call this together and give the same number of `blocks`, for every block is a collective.
    """
    order = np.lexsort((as_of, actors))
    num = packer.data.num_train_users if num_candidates is None else num_candidates
    parts = [
        _encode_block(model, packer, actors[block], as_of[block], num)
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
        keys=as_of * SPREAD + actors,  # wraps; the number of users may not enter, for it is not known at the time
    )


def _encode_block(
    model: TwoTower | Stu, packer: Packer, users: Rows, times: NDArray[np.int64], num_candidates: int
) -> tuple[np.ndarray, ...]:
    """Vectors `[Q, D + 1]`, named candidates `[T]`, their bonus `[T]`, how many each query names `[Q]`."""
    contacts = packer.state.contacts(users, times, packer.config.contacts)
    queries = PackedQueries(users, times, groups=users, conditions=np.zeros_like(users), actors=users)
    context, _ = packer.pack(queries, contacts)
    if packer.codes is not None and num_candidates > packer.data.num_train_users:
        context = _with_newcomers(context, contacts.partner, packer)
    context = context.to(_device(model))
    encoded = model.encode_queries(context, model.lookup(context.ids))
    named = (contacts.partner < num_candidates) & (model.copy_term is not None)
    query = np.repeat(np.arange(len(users)), np.diff(contacts.offsets))
    counts = np.bincount(query[named], minlength=len(users))
    return encoded.vector.cpu().numpy(), contacts.partner[named], encoded.bonus.cpu().numpy()[named], counts


def _with_newcomers(context: Context, partner: Rows, packer: Packer) -> Context:
    """Contacts `[T]` who came after training are named by the code of somebody beside them: as likely, see BackOff."""
    assert packer.codes is not None
    tokens, train = packer.codes.tokens, packer.data.num_train_users
    new = np.flatnonzero((partner >= train) & (partner < len(tokens)))
    named = stand_ins(tokens[:train], tokens[partner[new]], packer.codes.sizes)
    codes = context.codes.clone()
    codes[context.contact_user[new]] = torch.from_numpy(named).to(codes)
    return dataclasses.replace(context, codes=codes)


@torch.no_grad()
def encode_targets(model: TwoTower, packer: Packer, users: Rows, blocks: int = 0) -> NDArray[np.float32]:
    """Target vectors of dense user rows, float32 `[len(users), D + 1]`; `blocks` as for `encode_queries`."""
    vectors = [
        model.encode_targets(model.lookup(packer.ids(block).to(_device(model)))).cpu().numpy()[: len(block)]
        for block in np.array_split(users, blocks or num_blocks(len(users)))
    ]
    return np.concatenate(vectors)


@torch.no_grad()
def centroids_of(model: TwoTower, packer: Packer) -> Centroids | None:
    """The lists of a model with clusters, as training left them; ranks of a sharded model call this together.

    None where it has none, or was stopped before they were placed.
    """
    clustering = model.clustering
    if clustering is None or not clustering.ready:
        return None
    table = model.lookup(packer.ids(np.empty(0, np.int64)).to(_device(model))).clusters
    assert table is not None
    return Centroids(clustering.centroids(table[: len(clustering.load)]).cpu().numpy(), clustering.cells)


def _device(model: TwoTower | Stu) -> torch.device:
    """Where the towers are, and the tables with them."""
    return next(model.query_tower.parameters()).device


def num_blocks(rows: int) -> int:
    """Blocks in which so many queries or users are encoded; at least one."""
    return max(1, -(-rows // BLOCK))
