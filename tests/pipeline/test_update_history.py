"""Updates and searches in any order, against a dict of vectors and brute force."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from friendrec.pipeline import index, update
from friendrec.pipeline.index import IndexOptions
from friendrec.pipeline.retrieval.clusters import ClusterIndex
from friendrec.pipeline.retrieval.kinds import load_index
from friendrec.pipeline.update import UpdateOptions

from .retrieval.contract import brute_force, make_queries
from .updates import DIM, publish_embeddings, users_file


class AnyHistory(RuleBasedStateMachine):
    """Updates in any order on a real directory, against a dict and brute force."""

    numbers = st.integers(-2, 2)
    people = st.integers(0, 11)

    def __init__(self) -> None:
        super().__init__()
        self.place = TemporaryDirectory()
        self.root, self.made = Path(self.place.name), 0
        self.order: list[int] = []  # raw ids by place
        self.vectors: dict[int, list[int]] = {}

    def teardown(self) -> None:
        self.place.cleanup()

    def fresh(self) -> Path:
        self.made += 1
        return self.root / str(self.made)

    @initialize(
        first=st.dictionaries(people, st.lists(numbers, min_size=DIM, max_size=DIM), min_size=1),
        dtype=st.sampled_from(["float32", "float16"]),
        copies=st.integers(1, 2),
    )
    def build(self, first: dict[int, list[int]], dtype: Any, copies: int) -> None:
        self.index = str(self.fresh())
        embeddings = publish_embeddings(self.fresh(), first)
        index.main(
            IndexOptions(embeddings=embeddings, kind="clusters", out=self.index, nprobe=6, dtype=dtype, copies=copies)
        )
        self.vectors, self.order = dict(first), list(first)

    @rule(
        changes=st.dictionaries(people, st.lists(numbers, min_size=DIM, max_size=DIM), min_size=1, max_size=6),
        restore=st.booleans(),
    )
    def upsert(self, changes: dict[int, list[int]], restore: bool) -> None:
        embeddings = publish_embeddings(self.fresh(), changes)
        update.main(UpdateOptions(index=self.index, embeddings=embeddings, restore=restore))
        deleted = {user for user in self.order if user not in self.vectors}
        self.order += [user for user in changes if user not in self.order]
        self.vectors |= {user: vector for user, vector in changes.items() if restore or user not in deleted}

    @rule(leaving=st.sets(people, max_size=6))
    def delete(self, leaving: set[int]) -> None:
        file = users_file(self.fresh(), list(leaving))
        update.main(UpdateOptions(index=self.index, delete=file))
        self.vectors = {user: vector for user, vector in self.vectors.items() if user not in leaving}

    @rule()
    def compact(self) -> None:
        update.main(UpdateOptions(index=self.index, compact=True))

    @rule(seed=st.integers(0, 2**16), k=st.integers(1, 14))
    def search(self, seed: int, k: int) -> None:
        opened = load_index(Path(self.index))
        assert isinstance(opened, ClusterIndex)
        assert opened.user_ids.tolist() == self.order
        num, rng = len(self.order), np.random.default_rng(seed)
        gone = [place for place, user in enumerate(self.order) if user not in self.vectors]
        some = lambda: rng.permutation(num)[: rng.integers(0, num + 1)].tolist()  # noqa: E731
        vector = rng.integers(-2, 3, (3, DIM)).astype(np.float32)
        named = [{place: float(rng.integers(-9, 10)) for place in some()} for _ in vector]
        excluded = [some() for _ in vector]
        table = np.array([self.vectors.get(user, [0] * DIM) for user in self.order], np.float32)
        expected = brute_force(table, make_queries(vector, named, [[*{*row, *gone}] for row in excluded]), k)
        for found, right in zip(opened.search(make_queries(vector, named, excluded), k), expected, strict=True):
            assert np.array_equal(found, right)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=6, stateful_step_count=8, deadline=None)
