"""Search of every index against bare FAISS: exact at the same work, approximate at 0.98 of the exact best.

python benchmarks/search.py --users 100000 --embeddings EMBEDDINGS

Vectors are simulated around centres, as users in communities are, unless exported ones are given. A query names 20
candidates with a bonus and excludes 20, as a friend recommendation does; bare FAISS knows neither.
"""

import argparse
import time
from functools import partial

import numpy as np
from measuring import medians, report, table
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.pipeline.embeddings import read_embeddings
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.retrieval.approximate import ApproximateIndex, calibrate, recall_of
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.kinds import Index
from friendrec.pipeline.retrieval.milvus import MilvusIndex
from friendrec.pipeline.retrieval.protocol import Queries

Vectors = NDArray[np.float32]
K = 100
SLOW = 50
"""Queries that are enough of a kind that takes long."""


def simulated(users: int, queries: int, dimensions: int) -> tuple[Vectors, Vectors]:
    """Targets and queries around the same centres, one for every 500 users."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, users // 500), dimensions))
    around = lambda num: centres[rng.integers(0, len(centres), num)] + 0.7 * rng.standard_normal((num, dimensions))  # noqa: E731
    return around(users).astype(np.float32), around(queries).astype(np.float32)


def exported(path: str, queries: int) -> tuple[Vectors, Vectors]:
    """Targets of all users, and the queries of some."""
    directory, _ = open_published(path, "embeddings")
    asked = read_embeddings(directory, "query")[1]
    return read_embeddings(directory, "target")[1], asked[np.random.default_rng(0).permutation(len(asked))[:queries]]


def as_asked(vectors: Vectors, num_candidates: int, named: int = 20, excluded: int = 20) -> Queries:
    """Queries with a bonus for some candidates, and with others excluded."""
    rng = np.random.default_rng(1)
    drawn = np.stack([rng.choice(num_candidates, named + excluded, replace=False) for _ in vectors])
    bonus = rng.standard_normal((len(vectors), named)).astype(np.float32)
    rows = np.arange(len(vectors) + 1)
    return Queries(
        vectors, rows * named, drawn[:, :named].ravel(), bonus.ravel(), rows * excluded, drawn[:, named:].ravel()
    )


def exact_table(targets: Vectors, asked: Vectors, repeats: int) -> str:
    """Milliseconds of whole batches, and their ratio to bare FAISS."""
    import faiss  # after friendrec, which says how threads wait

    bare, ours = faiss.IndexFlatIP(targets.shape[1]), ExactIndex(targets, np.arange(len(targets)))
    bare.add(targets)
    rows = []
    for num in (1, 32, 1024, len(asked)):
        dense, whole = Queries.dense(asked[:num]), as_asked(asked[:num], len(targets))
        ways = {
            "bare FAISS": lambda num=num: bare.search(asked[:num], K),  # type: ignore[misc]
            "vectors alone": lambda dense=dense: ours.search(dense, K),  # type: ignore[misc]
            "as asked": lambda whole=whole: ours.search(whole, K),  # type: ignore[misc]
        }
        taken = medians(ways, 2 * repeats)
        ratios = [f"{taken[way] * 1e3:.2f} ms, {taken[way] / taken['bare FAISS']:.2f}×" for way in list(ways)[1:]]
        rows.append([f"{num:,}", f"{taken['bare FAISS'] * 1e3:.2f} ms", *ratios])
    return table(["queries", "bare FAISS", "vectors alone", "with 20 named and 20 excluded"], rows)


def kinds_table(targets: Vectors, asked: Vectors, recall: float, m: int, repeats: int, with_milvus: bool) -> str:
    """Each kind on the same queries, one at a time as a server has them and together."""
    exact = ExactIndex(targets, np.arange(len(targets)))
    sample, rest = np.split(asked, [len(asked) // 2])
    queries = as_asked(rest, len(targets))
    rows = []
    for kind in ("exact", "ivf", "hnsw", *(["milvus"] if with_milvus else [])):
        start = time.perf_counter()
        index = built(kind, targets, m)
        seconds = time.perf_counter() - start
        if isinstance(index, ApproximateIndex):
            try:
                index = calibrate(index, exact, sample, recall)
            except FriendrecError as error:
                rows.append([kind, f"{seconds:.1f} s", str(error).partition(", before")[0], "", "", ""])
                continue
            kind += f", {f'm {m}, ' if kind == 'hnsw' else ''}{index.effort_name} {index.effort}"
        some = queries.take(np.arange(min(len(rest), SLOW if isinstance(index, MilvusIndex) else len(rest))))
        rows.append([kind, f"{seconds:.1f} s", *searched(index, exact, some, repeats)])
    header = ["kind", "built in", "of the exact 10", f"of the exact {K}", "one query", "queries/s together"]
    return table(header, rows)


def built(kind: str, targets: Vectors, m: int) -> Index:
    users = np.arange(len(targets))
    build = {
        "exact": ExactIndex,
        "ivf": ApproximateIndex.ivf,
        "hnsw": partial(ApproximateIndex.hnsw, m=m),
        "milvus": MilvusIndex.build,
    }
    index: Index = build[kind](targets, users)  # type: ignore[operator]
    return index


def searched(index: Index, exact: ExactIndex, queries: Queries, repeats: int) -> list[str]:
    """Recall of the best 10 and 100, milliseconds of one query, and queries/s of all."""
    expected, one = exact.search(queries, K)[0], queries.take(np.arange(1))
    taken = medians({"one": lambda: index.search(one, K), "all": lambda: index.search(queries, K)}, repeats)
    recalls = [f"{recall_of(index, queries, expected[:, :k]):.3f}" for k in (10, K)]
    return [*recalls, f"{taken['one'] * 1e3:.2f} ms", f"{len(queries) / taken['all']:,.0f}"]


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000, help="simulated users")
    parser.add_argument("--dimensions", type=int, default=65, help="of the simulated vectors")
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--embeddings", help="what `friendrec export` made, measured as well")
    parser.add_argument("--recall", type=float, default=0.98)
    parser.add_argument("--m", type=int, default=32, help="neighbours in the graph of hnsw")
    parser.add_argument("--milvus", action="store_true", help="Milvus Lite as well: slow")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write results/search.md")
    options = parser.parse_args()
    sources = {"simulated": simulated(options.users, options.queries, options.dimensions)}
    if options.embeddings:
        sources["exported"] = exported(options.embeddings, options.queries)
    parts = []
    for name, (targets, asked) in sources.items():
        about = f"## {len(targets):,} {name} vectors of {targets.shape[1]} dimensions, best {K}"
        exact = exact_table(targets, asked, options.repeats)
        kinds = kinds_table(targets, asked, options.recall, options.m, options.repeats, options.milvus)
        parts += [about, "Exact against bare FAISS `IndexFlatIP`:", exact]
        parts += [
            f"Every kind, 20 named and 20 excluded a query, approximate ones calibrated to {options.recall}:",
            kinds,
        ]
    report("search", "\n\n".join(parts), options.write)


if __name__ == "__main__":
    run()
