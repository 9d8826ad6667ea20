"""Generating friends: cached contexts and the trie against doing without, time by number of users, bytes of the trie.

python benchmarks/decoding.py [--users 2000 --events 20000] [--most 10000000]

The decoder and the encoder are those of the preset `stu`, untrained, with queries of a simulated log; candidates have
random distinct codes of 3 tokens out of 256. A query excludes 40 candidates.
"""

import friendrec  # isort: skip  # noqa: F401  # before torch: it says how threads wait

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import arguments, in_turns, medians, ratio, report, simulated, table, workplace
from numpy.typing import NDArray
from torch import Tensor

from friendrec.datasets.batch import Context
from friendrec.datasets.packing import Codes, Packer
from friendrec.datasets.packing import Queries as PackedQueries
from friendrec.datasets.prepared import load_prepared
from friendrec.models.decoding import Decoder
from friendrec.models.sampling import Sampling
from friendrec.models.stu import Stu, Writer
from friendrec.models.trie import Trie
from friendrec.pipeline import config
from friendrec.pipeline.build import build_model
from friendrec.pipeline.inference import writer
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.stu import StuIndex

SIZES = (256, 256, 256)
QUERIES, BEAMS, EXCLUDED = 256, 10, 40
GROWTH = (10_000, 100_000, 1_000_000)
Tokens = NDArray[np.int32]


def distinct_codes(num: int) -> Tokens:
    """Random codes `[num, 3]`, no two the same."""
    cells = np.random.default_rng(0).permutation(np.prod(SIZES))[:num]
    return np.stack(np.unravel_index(cells, SIZES), axis=1).astype(np.int32)


@dataclass
class Asker:
    """Queries of a simulated log, and what encodes them and writes codes."""

    model: Stu
    packer: Packer
    users: NDArray[np.int64]  # [Q]

    @classmethod
    def of(cls, data_path: Path) -> "Asker":
        data, preset = load_prepared(data_path), config.stu()
        rng = np.random.default_rng(1)
        packer = Packer(data, preset.context, Codes(distinct_codes(data.num_train_users), SIZES))
        model = build_model(preset, packer.tables)
        assert isinstance(model, Stu)
        model.lookup.to_empty(device="cpu")
        for weight in model.lookup.parameters():
            torch.nn.init.normal_(weight)
        return cls(model.eval(), packer, rng.choice(data.num_train_users, QUERIES, replace=False))

    def pack(self, row: NDArray[np.int64]) -> Context:
        """The histories of some of the queries, each by itself even where two are of one user."""
        users, times = self.users[row], np.full(len(row), self.packer.data.train_until)
        queries = PackedQueries(users, times, groups=np.arange(len(row)), conditions=np.zeros_like(row), actors=users)
        context, _ = self.packer.pack(queries, self.packer.state.contacts(users, times, self.packer.config.contacts))
        return context

    @torch.no_grad()
    def encode(self, context: Context) -> Tensor:
        encoded: Tensor = self.model.encode_queries(context, self.model.lookup(context.ids)).vector
        return encoded


@dataclass
class Uncached:
    """A decoder that encodes the context of every beam again at every level; what it packs for that is kept."""

    inner: Writer
    asker: Asker
    packed: dict[bytes, Context]

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.inner.sizes

    def cache(self, context: Tensor) -> None:
        return None

    def log_probabilities(self, cache: None, row: Tensor, prefix: Tensor) -> Tensor:
        key = row.numpy().tobytes()
        if key not in self.packed:
            self.packed[key] = self.asker.pack(row.numpy())
        again = self.inner.cache(self.asker.encode(self.packed[key]))
        return self.inner.log_probabilities(again, torch.arange(len(row)), prefix)


@torch.inference_mode()
def search_by_scan(decoder: Any, context: Tensor, codes: Tokens, excluded: NDArray[np.int64]) -> NDArray[np.int64]:
    """Beam search that asks the whole corpus which tokens are legal, beam by beam: ids `[Q, BEAMS]`."""
    cache, columns = decoder.cache(context), codes.T.copy()
    row, prefix, scores = np.arange(QUERIES), np.empty((QUERIES, 0), np.int64), np.zeros(QUERIES, np.float32)
    for level in range(len(SIZES)):
        log_p = decoder.log_probabilities(cache, torch.from_numpy(row), torch.from_numpy(prefix)).numpy()
        illegal = np.ones(log_p.shape, bool)
        for beam, tokens in enumerate(prefix):
            there = np.ones(len(codes), bool)
            for before, token in enumerate(tokens):
                there &= columns[before] == token
            there[excluded[row[beam]]] = False
            illegal[beam, columns[level, there]] = False
        longer = np.where(illegal, -np.inf, scores[:, None] + log_p)
        chosen = [
            mine[np.lexsort((mine[:, 1], mine[:, 0], -longer[mine[:, 0], mine[:, 1]]))][:BEAMS]
            for mine in (np.argwhere((row == q)[:, None] & ~illegal) for q in range(QUERIES))
        ]
        beam, token = np.concatenate(chosen).T
        row, scores = row[beam], longer[beam, token]
        prefix = np.column_stack([prefix[beam], token])
    user = {tuple(code): v for v, code in enumerate(codes.tolist())}
    return np.array([user[tuple(code)] for code in prefix.tolist()]).reshape(QUERIES, BEAMS)


def queries_of(context: Tensor, num: int) -> Queries:
    """Queries that exclude EXCLUDED of so many candidates each."""
    rng = np.random.default_rng(2)
    excluded = np.stack([rng.choice(num, EXCLUDED, replace=False) for _ in range(QUERIES)])
    return Queries.dense(context.numpy()).excluding(np.arange(QUERIES + 1) * EXCLUDED, excluded.ravel())


def against_doing_without(asker: Asker, num: int, repeats: int) -> str:
    """With both savings, each alone and neither; the encoder's work is part of all."""
    codes, cached = distinct_codes(num), writer(asker.model, asker.packer)
    uncached, packed = Uncached(cached, asker, {}), asker.pack(np.arange(QUERIES))
    index = StuIndex.build(codes, np.arange(num), SIZES, beam_width=BEAMS)
    hidden = queries_of(torch.zeros(QUERIES, 1), num)
    excluded = hidden.exclude_ids.reshape(QUERIES, EXCLUDED)
    found: dict[str, NDArray[np.int64]] = {}

    def by_trie(name: str, decoder: Decoder) -> None:
        queries = replace(hidden, vector=asker.encode(packed).numpy())
        found[name] = replace(index, decoder=decoder).search(queries, BEAMS)[0]

    def by_scan(name: str, decoder: Decoder) -> None:
        found[name] = search_by_scan(decoder, asker.encode(packed), codes, excluded)

    ways: dict[str, Callable[[], None]] = {
        "cached, trie": lambda: by_trie("cached, trie", cached),
        "encoded again, trie": lambda: by_trie("encoded again, trie", uncached),
        "cached, scan": lambda: by_scan("cached, scan", cached),
        "encoded again, scan": lambda: by_scan("encoded again, scan", uncached),
    }
    seconds = in_turns(ways, repeats)
    for name in ways:
        if (found[name] == found["cached, trie"]).mean() < 0.999:
            raise SystemExit(f"{name} finds others: the comparison is void")
    ours = seconds["cached, trie"]
    rows = [[name, f"{statistics.median(taken) * 1e3:,.0f} ms", ratio(taken, ours)] for name, taken in seconds.items()]
    return table(["context, legality", f"{QUERIES} users", "to the first"], rows)


def growth(asker: Asker, repeats: int) -> str:
    """Search time, encoding apart, by number of users; the widths and sizes take turns."""
    context = asker.encode(asker.pack(np.arange(QUERIES)))
    decoder = writer(asker.model, asker.packer)
    ways: dict[str, Callable[[], object]] = {}
    for num in GROWTH:
        index = replace(StuIndex.build(distinct_codes(num), np.arange(num), SIZES), decoder=decoder)
        queries = queries_of(context, num)
        for name, of_kind, k in (
            (f"beams {BEAMS}", replace(index, beam_width=BEAMS), BEAMS),
            ("beams 100", index, 100),
            (f"{BEAMS} drawn", replace(index, sampling=Sampling()), BEAMS),
        ):
            ways[f"{num} {name}"] = lambda index=of_kind, k=k, queries=queries: index.search(queries, k)  # type: ignore[misc]
    seconds = in_turns(ways, repeats)
    rows = []
    for name in dict.fromkeys(way.partition(" ")[2] for way in ways):
        taken = [seconds[f"{num} {name}"] for num in GROWTH]
        cells = [f"{statistics.median(times) / QUERIES * 1e3:.2f} ms" for times in taken]
        rows.append([name, *cells, *(ratio(times, taken[0]) for times in taken[1:])])
    logarithms = [f"{np.log(num) / np.log(GROWTH[0]):.2f}" for num in GROWTH[1:]]
    rows.append(["logarithm of the users", "", "", "", *logarithms])
    header = ["a query", *(f"{num:,} users" for num in GROWTH), *(f"{num:,} to 10,000" for num in GROWTH[1:])]
    return table(header, rows)


@dataclass(frozen=True)
class Ready:
    """A decoder that has computed everything: what is left is the search."""

    rows: Tensor  # [R, 256]
    sizes: tuple[int, ...] = SIZES

    def cache(self, context: Tensor) -> None:
        return None

    def log_probabilities(self, cache: None, row: Tensor, prefix: Tensor) -> Tensor:
        return self.rows[: len(row)]


def search_alone(num: int, repeats: int) -> str:
    """The search without any decoder's work."""
    logits = 2 * torch.randn(QUERIES * 100, SIZES[0], generator=torch.Generator().manual_seed(0))
    index = StuIndex.build(distinct_codes(num), np.arange(num), SIZES)
    queries = queries_of(torch.zeros(QUERIES, 1), num)
    ways: dict[str, Callable[[], object]] = {}
    for width in (BEAMS, 100):
        ready = replace(index, decoder=Ready(logits.log_softmax(1)), beam_width=width)
        ways[f"beams {width}"] = lambda ready=ready, width=width: ready.search(queries, width)  # type: ignore[misc]
    rows = [[name, f"{taken / QUERIES * 1e3:.2f} ms"] for name, taken in medians(ways, 2 * repeats).items()]
    return table(["without the decoder", "a query"], rows)


def with_disambiguation(num: int) -> tuple[Tokens, tuple[int, ...]]:
    """Random codes, of which many meet: a fourth token tells those apart, the others end before."""
    codes = np.random.default_rng(0).integers(0, 256, (num, 3)).astype(np.int32)
    cell = np.ravel_multi_index(tuple(codes.T), SIZES)
    order = np.argsort(cell, kind="stable")
    first = np.searchsorted(cell[order], cell[order])
    fourth = np.empty(num, np.int32)
    fourth[order] = np.arange(num) - first
    alone = np.bincount(cell, minlength=np.prod(SIZES))[cell] == 1
    fourth[alone] = -1
    return np.column_stack([codes, fourth]), (*SIZES, int(fourth.max()) + 1)


def memory(num: int) -> str:
    """Bytes of the trie, and seconds that it takes to build."""
    rows = []
    for name, codes, sizes in (
        ("3 × 256, distinct", distinct_codes(num), SIZES),
        ("3 × 256, a fourth where codes meet", *with_disambiguation(num)),
    ):
        start = time.perf_counter()
        trie = Trie.build(codes, sizes)
        seconds = time.perf_counter() - start
        ends = f"{(codes[:, -1] < 0).mean():.0%}"
        size = [f"{trie.nbytes / num:.1f}", f"{trie.nbytes / 2**20:,.0f} MiB", f"{codes.nbytes / 2**20:,.0f} MiB"]
        rows.append([name, ends, *size, f"{seconds:.1f} s"])
    header = ["codes", "end before the last level", "bytes a user", "trie", "the codes as int32", "built in"]
    return table(header, rows)


def run() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--candidates", type=int, default=100_000, help="where savings are compared with doing without")
    parser.add_argument("--most", type=int, default=10_000_000, help="users of the trie that is weighed")
    options = parser.parse_args()
    with workplace() as folder:
        asker = Asker.of(simulated(folder, options.users, options.events))
        parts = [
            f"## Best {BEAMS} by {BEAMS} beams, {options.candidates:,} candidates, encoding included",
            against_doing_without(asker, options.candidates, options.repeats),
            f"## Time by number of users, {QUERIES} queries together, encoding apart",
            growth(asker, 3 * options.repeats),
            "## The search alone, 19,218 users",
            search_alone(19_218, options.repeats),
        ]
    parts += [f"## The trie of {options.most:,} users", memory(options.most)]
    report("decoding", "\n\n".join(parts), options.write)


if __name__ == "__main__":
    run()
