"""Agreement with the exact list by loops; knees, shares and differences by hand; the sweep; one thread."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from friendrec.pipeline.evaluation.frontier import ENOUGH, REPEATS, K, Race, Row, agreement, dense, swept, timed
from friendrec.pipeline.evaluation.frontier_page import write_frontier
from friendrec.pipeline.evaluation.frontier_summary import COMPARED_SHARES, between, knee, least_share, summary
from friendrec.pipeline.evaluation.threads import POOLS, one_thread
from friendrec.pipeline.frontier import _show
from friendrec.pipeline.retrieval.parts import Found
from friendrec.pipeline.retrieval.protocol import Queries


def test_agreement_is_the_share_of_each_exact_list() -> None:
    rng = np.random.default_rng(0)
    right = np.stack([rng.permutation(50)[:8] for _ in range(20)])
    found = np.stack([rng.permutation(50)[:8] for _ in range(20)])
    best = -np.sort(-rng.random((20, 8)).astype(np.float32))
    mine = rng.random((20, 8)).astype(np.float32) + 2  # higher than all: no wrong one counts for its own score
    right[3, 5:], found[4, 2:] = -1, -1  # five exist; two were found
    best[3, 5:], mine[4, 2:] = -np.inf, -np.inf
    expected = [
        len({*found[q].tolist()} & {*right[q].tolist()} - {-1}) / len({*right[q].tolist()} - {-1}) for q in range(20)
    ]
    assert agreement((found, mine), (right, best)) == pytest.approx(np.mean(expected))


def test_who_ties_with_the_last_is_as_good() -> None:
    right, best = np.array([[4, 7, 9]]), np.array([[3.0, 2.0, 1.0]], np.float32)
    for ids, scores, expected in (
        ([4, 7, 2], [3.0, 2.0, 1.0], 1),
        ([4, 7, 2], [3.0, 2.0, 1.000001], 1),
        ([4, 7, 2], [3.0, 2.0, 0.99], 2 / 3),
        ([2, 1, 9], [1.0, 1.0, 1.0], 1),
        ([-1, -1, -1], [-np.inf] * 3, 0),
    ):
        assert agreement((np.array([ids]), np.array([scores], np.float32)), (right, best)) == pytest.approx(expected)


def test_between_two_rows_recall_is_linear_in_log_share() -> None:
    share = np.array([0.1, 0.001, 0.01])  # in any order
    assert between(share, 0.0009) is None
    for wanted, weights in (
        (0.001, [0, 1, 0]),
        (0.01, [0, 0, 1]),
        (10**-2.5, [0, 0.5, 0.5]),
        (10**-1.25, [0.75, 0, 0.25]),
        (0.7, [1, 0, 0]),
    ):
        found = between(share, wanted)
        assert found is not None
        np.testing.assert_allclose(found, weights, atol=1e-12)


def test_the_knee_is_farthest_above_the_chord() -> None:
    share, recall = 10.0 ** np.arange(-4, 1), np.array([0.0, 0.3, 0.9, 1.0, 1.0])
    assert knee(share, recall) == 2  # .9 − 1/2
    assert knee(share, np.array([0.0, 0.1, 0.2, 0.3, 1.0])) is None  # below it
    assert knee(share[:2], recall[:2]) is None
    assert knee(share, np.full(5, 0.5)) is None


def test_the_least_share_for_a_recall() -> None:
    share, recall = np.array([0.001, 0.01, 0.1]), np.array([0.2, 0.6, 0.8])
    assert least_share(share, recall, 0.4) == pytest.approx(10**-2.5)
    assert least_share(share, recall, 0.1) == pytest.approx(0.001)
    assert least_share(share, recall, 0.8) == pytest.approx(0.1)
    assert least_share(share, recall, 0.81) is None


@dataclass
class Steady:
    """Finds the first `effort` candidates, and says that it compared a tenth of its effort."""

    asked: list[int | None] = field(default_factory=list)
    hides: list[bool] = field(default_factory=list)
    efforts: tuple[int | None, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 17)

    def search(self, queries: Queries, k: int, effort: int | None) -> Found:
        self.asked.append(effort)
        self.hides.append(len(queries.exclude_ids) > 0 and len(queries.sparse_ids) > 0)
        ids = np.tile(np.arange(k), (len(queries), 1))
        return np.where(ids < (effort or 0), ids, -1), np.where(ids < (effort or 0), -ids, -np.inf).astype(np.float32)

    def compared(self, queries: Queries, k: int, effort: int | None) -> float:
        return (effort or 0) / 10


def steady(num: int = 30) -> tuple[Race, np.ndarray]:
    queries = Queries.dense(np.zeros((num, 2), np.float32))
    contender = Steady()
    expected = Steady().search(queries, K, 8)
    return Race("ivf", contender, queries, np.arange(num), expected), np.arange(num) % 10


def test_a_sweep_steps_faster_beyond_what_is_enough_and_ends_at_the_end() -> None:
    race, targets = steady()
    rows = swept(race, targets, num=4)
    assert [row.parameter for row in rows] == [1, 2, 3, 4, 6, 12, 17]
    assert [row.share for row in rows] == pytest.approx([0.025 * row.parameter for row in rows if row.parameter])
    assert rows[3].share < ENOUGH < rows[4].share
    for row in rows:
        assert row.parameter is not None
        assert row.task_recall == pytest.approx(np.mean(targets < row.parameter))
        assert row.neighbours == pytest.approx(min(1, row.parameter / 8))


def test_speeds_are_taken_of_every_row() -> None:
    race, targets = steady()
    rows = timed([race], swept(race, targets, num=10))
    assert all(row.queries_per_second > 0 and row.queries_per_second_dense > 0 for row in rows)


def test_the_same_queries_are_timed_with_those_hidden_and_without() -> None:
    race, targets = steady()
    everyone = np.arange(len(race.queries) + 1), np.zeros(len(race.queries), np.int64)
    hiding = replace(
        race.queries.excluding(*everyone),
        sparse_offsets=everyone[0],
        sparse_ids=everyone[1],
        sparse_bonus=np.ones(len(everyone[1]), np.float32),
        keys=np.arange(len(race.queries)),
    )
    without = dense(hiding)
    assert not len(without.exclude_ids) and not len(without.sparse_ids)
    assert np.array_equal(without.vector, hiding.vector) and np.array_equal(without.keys, hiding.keys)  # type: ignore[arg-type]
    contender = Steady()
    timed([replace(race, queries=hiding, contender=contender)], [Row("ivf", 3, 0.1, targets < 3, 0.5)])
    assert contender.hides == [True] * 2 + [False] * 2 + [True, False] * REPEATS  # warm-up, a guess, then in turns


def test_differences_are_those_of_the_recalls_at_equal_shares() -> None:
    rng = np.random.default_rng(0)
    actors = rng.integers(0, 15, 60)
    hits = lambda p: rng.random(60) < p  # noqa: E731
    rows = [Row("exact", None, 1.0, hits(0.9), 1.0, 10.0, 20.0)]
    for name, lift in (("ivf", 0.0), ("clusters", 0.1)):
        rows += [
            Row(name, place, share, hits(lift + 0.15 * place), 0.2 * place, 100.0 / place, 300.0 / place)
            for place, share in enumerate((0.005, 0.01, 0.02, 0.03, 0.05, 0.1), start=1)
        ]
    found = summary(rows, actors)
    by_share = {(row.index, row.share): row.task_recall for row in rows}
    assert list(found["clusters_minus_ivf"]) == [f"{share:.1%}" for share in COMPARED_SHARES]
    for share in COMPARED_SHARES:
        entry, kind = (
            found["clusters_minus_ivf"][f"{share:.1%}"],
            found["kinds"]["clusters"]["at_share"][f"{share:.1%}"],
        )
        ours, theirs = by_share["clusters", share], by_share["ivf", share]
        assert entry["difference"] == pytest.approx(ours - theirs)
        assert entry["difference_ci"][0] <= entry["difference"] <= entry["difference_ci"][1]
        assert kind["task_recall"] == pytest.approx(ours)
        assert kind["of_exact"] == pytest.approx(ours / rows[0].task_recall)
    assert "0.1%" not in found["kinds"]["ivf"]["at_share"]
    speeds = found["kinds"]["ivf"]["speed_at_neighbour_recall"]
    assert speeds["80%"] == pytest.approx(25) and speeds["90%"] == pytest.approx(1 / 0.045)
    plain = found["kinds"]["ivf"]["speed_at_neighbour_recall_dense"]
    assert plain == {part: pytest.approx(3 * speed) for part, speed in speeds.items()}
    assert found["exact"]["queries_per_second_dense"] == 20
    assert found["kinds"]["ivf"]["queries_per_second_dense"] == {str(place): 300 / place for place in range(1, 7)}


@pytest.mark.parametrize("kinds", [["ivf"], []])
@pytest.mark.parametrize("old", [False, True])
def test_the_page_has_plain_queries_where_they_were_timed(tmp_path: Path, kinds: list[str], old: bool) -> None:
    """An older summary has none of them; with exact alone there are no tables of kinds."""
    hits = np.arange(40) % 2 == 0
    rows = [Row("exact", None, 1.0, hits, 1.0, 10.0, 7_654_321.0)]
    rows += [Row(name, place, 0.01 * place, hits, 0.9, 20.0, 40.0) for name in kinds for place in (1, 2, 3)]
    about = {"candidates": 99, "queries": 40, "events": 40, "actors": 20, "lists": 3, "load": {}}
    found = about | summary(rows, np.arange(40) % 20)
    if old:
        for figures in (found["exact"], *found["kinds"].values()):
            for name in [name for name in figures if name.endswith("_dense")]:
                del figures[name]
    write_frontier(tmp_path, rows, found, {"run": "run"})
    page = (tmp_path / "report.html").read_text()
    assert ("7,654,321 plain queries/s" in page) == ("<th>plain queries/s</th>" in page) == (not old)
    assert ("ivf, plain queries" in page) == (bool(kinds) and not old)
    assert ("At equal shares" in page) == ("so much neighbour recall" in page) == bool(kinds)


def test_exact_alone_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("exact", None, 1.0, np.arange(40) % 2 == 0, 1.0, 1234.0, 2000.0)]
    _show({"candidates": 99, "queries": 40} | summary(rows, np.arange(40)), "out")
    assert capsys.readouterr().out == "exact: 0.500, 1,234 queries/s on one thread\nout/report.html\n"


def test_one_thread_and_then_as_before() -> None:
    def state() -> tuple[object, ...]:
        return [pool.CORES for pool in POOLS], faiss.omp_get_max_threads(), torch.get_num_threads()

    for pool in POOLS:
        pool.CORES = 3
    before = state()
    try:
        with one_thread():
            assert state() == ([1] * len(POOLS), 1, 1)
        assert state() == before
        with pytest.raises(KeyboardInterrupt), one_thread():
            raise KeyboardInterrupt
        assert state() == before
    finally:
        for pool in POOLS:
            pool.CORES = len(os.sched_getaffinity(0))
