"""The STU retriever: the shared contract, on a decoder whose log P(code) is an inner product."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from friendrec.errors import FriendrecError
from friendrec.models.sampling import Sampling
from friendrec.pipeline.retrieval import stu
from friendrec.pipeline.retrieval.kinds import load_index
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.stu import StuIndex
from tests.pipeline.retrieval.contract import RetrieverContract, brute_force, make_queries, random_problem

SIZES = (4, 4, 4, 3)


def ragged_codes(num: int) -> NDArray[np.int32]:
    """Of up to 192 candidates in the order of their codes: three tokens, and a fourth where three are shared."""
    place, fork = np.arange(num) // 4, np.arange(num) % 4
    last = np.where(fork == 0, 0, np.where(fork == 1, 1, np.maximum(fork, 2)))
    codes = np.stack([place // 4 % 4, place % 4, np.minimum(last, 2), fork - 2], axis=1)
    codes[fork < 2, 3] = -1
    return codes.astype(np.int32)


@dataclass(frozen=True)
class Telescope:
    """A step's score is the best inner product beneath the prefix, minus its parent's: a code's sum is its own product.

    So the best prefixes hold the best candidates, and beams no wider than k find them.
    """

    codes: NDArray[np.int32]  # [N, L]
    vectors: NDArray[np.float32]  # [N, D]
    sizes: tuple[int, ...] = SIZES

    def cache(self, context: Tensor) -> Tensor:
        return context @ torch.from_numpy(self.vectors).T  # [Q, N]

    def log_probabilities(self, cache: Tensor, row: Tensor, prefix: Tensor) -> Tensor:
        level = prefix.shape[1]
        codes = torch.from_numpy(self.codes).long()
        beneath = (codes[None, :, :level] == prefix[:, None]).all(dim=2)  # [R, N]
        products = torch.where(beneath, cache[row], -torch.inf)
        parent = products.amax(dim=1, keepdim=True) if level else torch.zeros(len(row), 1)
        token = [torch.where(codes[:, level] == t, products, -torch.inf).amax(dim=1) for t in range(self.sizes[level])]
        return torch.stack(token, dim=1) - parent


class TestStu(RetrieverContract):
    """Beams as wide as the candidates are many."""

    beam_width = 100

    def build(self, vectors: NDArray[np.float32]) -> StuIndex:
        codes = ragged_codes(len(vectors))
        index = StuIndex.build(codes, np.arange(len(vectors)) * 10, SIZES, self.beam_width)
        return replace(index, decoder=Telescope(codes, vectors))

    def save(self, retriever: StuIndex, directory: Path) -> None:  # type: ignore[override]
        retriever.save(directory)
        np.save(directory / "vectors.npy", retriever.decoder.vectors)  # type: ignore[union-attr]

    def load(self, directory: Path) -> StuIndex:
        index = load_index(directory)
        assert isinstance(index, StuIndex)
        codes = index.codes_of(np.arange(len(index)))
        return replace(index, decoder=Telescope(codes, np.load(directory / "vectors.npy")))


class TestStuInSmallBlocks(TestStu):
    """A query a block, and its named a few at a time."""

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stu, "BLOCK", 10)


class TestNarrowBeams(TestStu):
    """Half as wide as the third level. A prefix whose best is hidden keeps its score, and takes the room of others.

    Of tied prefixes the first is kept, beneath which another may tie than the one of the lowest id.
    """

    beam_width = 16
    agreement = 0.0
    cuts_ties_by_id = False

    def test_nobody_is_missed_where_nobody_is_hidden(self) -> None:
        for seed in range(20):
            vectors, queries = random_problem(seed)
            dense = Queries.dense(queries.vector)
            index = replace(self.build(vectors), beam_width=1)  # 3, then, as many as asked for
            _, scores = index.search(dense, 3)
            np.testing.assert_allclose(scores, brute_force(vectors, dense, 3)[1], atol=1e-5)


def built(vectors: NDArray[np.float32]) -> StuIndex:
    return TestStu().build(vectors)


def test_wide_contexts_are_searched_in_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = random_problem(3, num_queries=9)
    index = built(vectors)
    assert isinstance(index.decoder, Telescope)
    held: list[int] = []

    class Watched(Telescope):
        def cache(self, context: Tensor) -> Tensor:
            held.append(context.numel())
            return super().cache(context[:, :5])

    wide = replace(queries, vector=np.pad(queries.vector, ((0, 0), (0, 3000))))
    monkeypatch.setattr(stu, "BLOCK", 10_000)
    watched = replace(index, decoder=Watched(index.decoder.codes, vectors))
    assert np.array_equal(watched.search(wide, 5)[0], index.search(queries, 5)[0])
    assert max(held) <= 10_000 and sum(held) == 9 * 3005


def test_an_index_without_candidates_finds_nobody() -> None:
    index = built(np.empty((0, 5), np.float32))
    ids, scores = index.search(make_queries(np.ones((2, 5), np.float32)), 3)
    assert ids.tolist() == [[-1] * 3] * 2 and np.isneginf(scores).all()


@pytest.mark.parametrize("seed", range(5))
def test_drawn_friends_are_distinct_allowed_and_k(seed: int) -> None:
    vectors, queries = random_problem(seed, num_queries=20)
    index = replace(built(vectors), sampling=Sampling(seed=seed, top_k=2, nucleus=0.9))
    ids, scores = index.search(queries, 8)
    for q in range(20):
        excluded = queries.exclude_ids[queries.exclude_offsets[q] : queries.exclude_offsets[q + 1]]
        kept = ids[q][ids[q] >= 0]
        assert len(np.unique(kept)) == len(kept) == min(8, 40 - len(excluded))
        assert not np.isin(kept, excluded).any()
        assert (np.diff(scores[q][: len(kept)]) <= 0).all()


def test_a_key_draws_the_same_in_any_company() -> None:
    vectors, queries = random_problem(4, num_queries=12)
    index = replace(built(vectors), sampling=Sampling())
    keyed = replace(queries, keys=np.arange(12) * 31)
    together = index.search(keyed, 6)
    rows = np.array([7, 2, 7])
    for some, all_of_them in zip(index.search(keyed.take(rows), 6), together, strict=True):
        np.testing.assert_array_equal(some, all_of_them[rows])
    joined = Queries.concatenate([keyed.take(rows[:1]), keyed.take(rows[1:])])
    assert np.array_equal(index.search(joined, 6)[0], together[0][rows])


def test_the_named_run_with_their_bonus() -> None:
    """One candidate of bonus log 3 against all others, who run at 1 in all: it is first in 3 p of 3 p + 1 draws."""
    vectors = np.zeros((16, 1), np.float32)  # a telescope of zeros: a named code has probability 1
    queries = make_queries(np.ones((8000, 1), np.float32), named=[{5: float(np.log(3))}] * 8000)
    first = replace(built(vectors), sampling=Sampling()).search(queries, 1)[0][:, 0]
    assert abs((first == 5).mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 8000)
    others = np.bincount(first[first != 5], minlength=16)
    assert (others > 0).sum() == 15


def test_codes_that_the_run_does_not_write_are_told() -> None:
    index = built(np.ones((4, 2), np.float32))
    with pytest.raises(FriendrecError, match="searched by the decoder of its run"):
        replace(index, decoder=None).search(make_queries(np.ones((1, 2), np.float32)), 1)
    with pytest.raises(FriendrecError, match=r"holds codes of \[4, 4, 4, 3\] tokens a level, the run writes \[4, 4\]"):
        replace(index, decoder=replace(index.decoder, sizes=(4, 4)))  # type: ignore[arg-type]
