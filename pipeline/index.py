"""Index exported embeddings, or tokenized users, so that friends can be searched for.

Every kind ranks by the metric trained, inner product or the probability of a code, hides exclusions inside the search
and scores the contacts that a query names exactly. The directory holds the index, the raw user ids in the same order,
and meta.json.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from friendrec.errors import FriendrecError
from friendrec.pipeline.publish import is_finished, open_published, publish, read_manifest
from friendrec.pipeline.together import say

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from friendrec.pipeline.retrieval.files import UserIds
    from friendrec.pipeline.retrieval.kinds import Index

EXAMPLES = """
friendrec index --embeddings embeddings --out index
friendrec index --embeddings s3://bucket/embeddings --kind hnsw --recall 0.95 --out index-hnsw
friendrec index --embeddings embeddings --kind clusters --out index-clusters
torchrun --nproc-per-node 2 --no-python -- friendrec index --embeddings embeddings --kind clusters --out index-clusters
friendrec index --tokens stu --kind stu --out index-stu
friendrec index --embeddings embeddings --kind milvus --uri http://milvus:19530 --collection friends --out index-milvus
"""

PARAMETERS = {
    "exact": (),
    "ivf": ("nlist", "nprobe", "recall"),
    "hnsw": ("m", "ef", "recall"),
    "clusters": ("nprobe", "recall", "copies", "dtype"),
    "milvus": ("uri", "collection", "milvus_index"),
    "stu": ("tokens", "beam_width"),
}
"""Options that a kind has of its own."""
RECALL = 0.98
SAMPLE = 500
"""Users whose queries calibrate an approximate index."""


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    embeddings: str | None = None
    """Directory or URL that `friendrec export` made; every kind but stu needs it."""
    tokens: str | None = None
    """stu: directory or URL that `friendrec tokenize` made, with which the run was trained."""
    kind: Literal["exact", "ivf", "hnsw", "clusters", "milvus", "stu"] = "exact"
    """exact: every user is scored, nothing is missed; time grows with their number, and 100,000 take about 0.2 ms a
    query in a batch, less than the others. ivf: a query looks at some of the lists that users are sorted into; quick to
    build. hnsw: it walks a graph of neighbours; slow to build. Both are for more users, whose vectors form groups.
    clusters: as ivf, by the clusters that the model was trained with; several processes build it, it is opened without
    being read, and `friendrec update` changes it where it lies.
    milvus: an embedded Milvus Lite file or, with --uri, a cluster, for more users than a machine holds. stu: a trie of
    the users' tokens, in which an STU run writes friends by beam search; time hardly grows with the number of users."""
    nlist: int | None = None
    """ivf: number of lists, by default 4 √users, and 39 users a list at least. More make each shorter, and building
    slower."""
    nprobe: int | None = None
    """ivf, clusters: lists that a query looks at, by default as many as --recall takes. Raise for recall, lower for
    speed."""
    m: int | None = None
    """hnsw: neighbours of a user in the graph, by default 32. 16 saves 130 bytes a user, 64 helps where the recall
    wanted takes a long queue."""
    ef: int | None = None
    """hnsw: users in the queue of a walk, by default as many as --recall takes. Raise for recall, lower for speed."""
    recall: float | None = None
    """ivf, hnsw, clusters: share of the exact 10 and of the exact 100 to be found, by default 0.98, measured on
    queries of 500 users when nprobe or ef is not given. In float16 and int8 the exact are those of the rounded vectors:
    what rounding loses is not counted. Lower for speed."""
    copies: int | None = None
    """clusters: lists that a user lies in, the nearest first, by default 1. With 2 it is found in either, but lists are
    twice as long: for the same work fewer are found."""
    dtype: Literal["float32", "float16", "int8"] | None = None
    """clusters: how vectors are stored, by default float32. float16 halves them, int8 takes a quarter, and no number
    moves by more than 0.4 % of its vector's largest."""
    uri: str | None = None
    """milvus: address of a server or cluster, as http://host:19530; a secret goes in the environment, as MILVUS_TOKEN.
    By default an embedded file in the index."""
    collection: str | None = None
    """milvus: name of the collection to create, by default friendrec. Name it where indices share a server."""
    milvus_index: Literal["FLAT", "AUTOINDEX"] | None = None
    """milvus: FLAT, the default, is exact. AUTOINDEX is approximate, as the server chooses: for a million users a
    server and more."""
    beam_width: int | None = None
    """stu: prefixes kept at each level, by default 100, and as many as friends are asked for at least. Raise to miss
    fewer of the best, lower for speed."""
    out: str
    """Directory or URL to create."""

    def __post_init__(self) -> None:
        _check(self)  # here, so that `friendrec pipeline --index-args` tells mistakes before its first stage


def main(options: IndexOptions) -> None:
    """Publish the index at `options.out`, or find it there already."""
    inputs = {name: path for name in ("embeddings", "tokens") if (path := getattr(options, name)) is not None}
    if is_finished(options.out, kind="index", options=options, inputs=inputs):
        updates = len(read_manifest(options.out, "index").extra.get("updates", []))
        since = f", updated {'once' if updates == 1 else f'{updates:,} times'} since" if updates else ""
        say(f"{options.out} is this index already{since}.")
        return
    if options.kind == "clusters":
        from friendrec.pipeline.build_clusters import publish_clusters

        publish_clusters(options, inputs)
        return
    with publish(options.out, kind="index", options=options, inputs=inputs) as attempt:
        index, said = _of_tokens(options) if options.kind == "stu" else _of_vectors(options)
        index.save(attempt)
    print(f"{options.out}: {len(index):,} users, {said}")


def _of_tokens(options: IndexOptions) -> "tuple[Index, str]":
    """The index, and what it is."""
    from friendrec.pipeline.retrieval.stu import BEAM_WIDTH, StuIndex
    from friendrec.pipeline.tokens import read_tokens

    assert options.tokens is not None
    table, _ = read_tokens(options.tokens)
    index = StuIndex.build(table.tokens, table.user_ids, table.sizes, options.beam_width or BEAM_WIDTH)
    size = index.trie.nbytes / max(len(index), 1)
    return index, f"{len(table.sizes)} levels, a trie of {size:.1f} bytes a user, beams of {index.beam_width}"


def _of_vectors(options: IndexOptions) -> "tuple[Index, str]":
    """The index, and what it is."""
    import numpy as np

    from friendrec.pipeline.embeddings import read_embeddings

    assert options.embeddings is not None
    directory, _ = open_published(options.embeddings, "embeddings")
    user_ids, vectors = read_embeddings(directory, "target")
    if not np.isfinite(vectors).all():
        raise FriendrecError(f"{options.embeddings} holds vectors that are not finite: train and export again")
    index = _build(options, user_ids, vectors, directory)
    return index, f"{vectors.shape[1]} dimensions, {_description(index)}"


def _check(options: IndexOptions) -> None:
    if options.kind == "stu" and (options.tokens is None or options.embeddings is not None):
        raise FriendrecError("an index of kind stu is made of tokens alone: pass --tokens STU, and no --embeddings")
    for kind, names in PARAMETERS.items():
        for name in names:
            value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
            if value is None:
                continue
            if name not in PARAMETERS[options.kind]:
                raise FriendrecError(
                    f"{flag} means nothing to an index of kind {options.kind}: leave it out, or pass --kind {kind}"
                )
            if isinstance(value, int | float) and value <= 0:
                raise FriendrecError(f"{flag} {value}: give a positive number")
    if options.kind != "stu" and options.embeddings is None:
        raise FriendrecError(
            f"an index of kind {options.kind} is made of embeddings: pass --embeddings, what `friendrec export` made"
        )
    effort = {"ivf": "nprobe", "hnsw": "ef", "clusters": "nprobe"}.get(options.kind)
    if effort and options.recall is not None and getattr(options, effort) is not None:
        raise FriendrecError(f"--{effort} decides the recall: leave out --recall, or let it choose --{effort}")
    if options.copies is not None and options.copies > 2:
        raise FriendrecError(f"--copies {options.copies}: a user lies in 1 list or in 2")
    if options.recall is not None and options.recall > 1:
        raise FriendrecError(f"--recall {options.recall}: give a share between 0 and 1")


def _build(options: IndexOptions, user_ids: "UserIds", vectors: "NDArray[np.float32]", embeddings: "Path") -> "Index":
    if options.kind == "exact":
        from friendrec.pipeline.retrieval.exact import ExactIndex

        return ExactIndex(vectors, user_ids)
    if options.kind == "milvus":
        from friendrec.pipeline.retrieval.milvus import MilvusIndex

        collection, index_type = options.collection or "friendrec", options.milvus_index or "FLAT"
        return MilvusIndex.build(vectors, user_ids, options.uri, collection, index_type)
    return _build_approximate(options, user_ids, vectors, embeddings)


def _build_approximate(
    options: IndexOptions, user_ids: "UserIds", vectors: "NDArray[np.float32]", embeddings: "Path"
) -> "Index":
    """With the effort given, or that which the recall takes on a sample of the queries exported."""
    import numpy as np

    from friendrec.pipeline.embeddings import read_embeddings
    from friendrec.pipeline.retrieval.approximate import ApproximateIndex, calibrate
    from friendrec.pipeline.retrieval.exact import ExactIndex

    if options.kind == "ivf":
        effort = options.nprobe
        index = ApproximateIndex.ivf(vectors, user_ids, options.nlist, effort or 1)
    else:
        effort = options.ef
        index = ApproximateIndex.hnsw(vectors, user_ids, options.m or 32, effort or 1)
    if effort is not None:
        return index
    queries = read_embeddings(embeddings, "query")[1]
    sample = np.random.default_rng(0).permutation(len(queries))[:SAMPLE]
    return calibrate(index, ExactIndex(vectors, user_ids), queries[sample], options.recall or RECALL)


def _description(index: "Index") -> str:
    """What the kind and its parameters are."""
    from friendrec.pipeline.retrieval.approximate import ApproximateIndex
    from friendrec.pipeline.retrieval.exact import ExactIndex

    if isinstance(index, ExactIndex):
        return "exact inner product"
    if not isinstance(index, ApproximateIndex):
        return "inner product in Milvus"
    found = f", which finds {index.recall:.3f} of the exact best" if index.recall is not None else ""
    return f"{index.kind}, {index.effort_name} {index.effort}{found}"
