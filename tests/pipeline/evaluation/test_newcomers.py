"""Events towards users without a training row: who counts, among whom, and that nothing tells of what is to come."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData, load_prepared
from friendrec.pipeline.evaluation.metrics import CUTOFFS
from friendrec.pipeline.evaluation.newcomers import (
    _num_allowed,
    among,
    newcomer_events,
    newcomer_figures,
    num_with_codes,
    of_train_users,
    recency_ranks,
    score_newcomers,
    that_know_newcomers,
)
from friendrec.pipeline.evaluation.results import MODEL
from friendrec.pipeline.evaluation.scoring import recommender_ranks
from friendrec.pipeline.evaluation.seen import SeenOnly
from friendrec.pipeline.evaluation.tasks import LEVEL, TASKS, Events, Exclusions, scored_events
from friendrec.pipeline.first_events import first_events
from friendrec.pipeline.inference import open_recommender
from friendrec.pipeline.retrieval.exact import ExactIndex
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.stu import StuIndex
from tests.pipeline.evaluation import null
from tests.tokens import publish_random_tokens
from tests.training import publish_data, train_stu_run

EARLY, LATE, EVENTS = 30, 25, 4000
QUESTIONS = {"all": 0, "newcomers": EARLY}


def growing_log(seed: int) -> null.Log:
    """Targets uniform over everyone, whom nothing foretells; after 70 % of the time LATE users may act and be met."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, EVENTS, EVENTS)) * 60_000_000  # many share a time
    users = np.where(np.arange(EVENTS) < 0.8 * EVENTS, EARLY, EARLY + LATE)
    actor = (users * rng.random(EVENTS)).astype(np.int64)
    target = (actor + 1 + (rng.random(EVENTS) * (users - 1)).astype(np.int64)) % users
    return actor, target, np.full(EVENTS, "message"), time


def asked(data: PreparedData, question: str) -> tuple[SeenOnly, Events]:
    seen = SeenOnly.among(data, Exclusions.of(data), QUESTIONS[question], data.num_users)
    return seen, newcomer_events(data, "validation", seen)


@pytest.fixture(scope="module")
def data() -> PreparedData:
    opened = null.prepared(growing_log(0))
    assert opened.num_train_users == EARLY and opened.num_users == EARLY + LATE
    return opened


def log_of(data: PreparedData) -> list[tuple[int, int, int]]:
    """Actor, target and time of every event, in order."""
    entries = data.event_entry
    actors = np.searchsorted(data.offsets, entries, side="right") - 1
    return list(zip(actors.tolist(), data.partner[entries].tolist(), data.timestamp[entries].tolist(), strict=True))


@pytest.mark.parametrize("question", QUESTIONS)
def test_who_counts_and_among_whom_equal_a_walk_over_the_log(data: PreparedData, question: str) -> None:
    seen, events = asked(data, question)
    log, start = log_of(data), QUESTIONS[question]
    recency = recency_ranks(data, events, seen)["last_active"]
    begin = data.num_train_events
    counted = []
    for index in range(begin, begin + data.num_validation_events):
        actor, target, time = log[index]
        before = [event for event in log[:index] if event[2] < time]
        last = {user: when for a, b, when in before for user in (a, b)}
        if target < EARLY or target not in last:
            continue
        e = len(counted)
        counted.append(index)
        contacted = {b for a, b, _ in before if a == actor}
        contacted_by = {a for a, b, _ in before if b == actor}
        for level, hidden in enumerate(({actor}, {actor} | contacted, {actor} | contacted | contacted_by)):
            _, ids = seen.at(level, events.actor[e : e + 1], events.timestamp[e : e + 1])
            allowed = {user for user in last if user >= start} - hidden
            assert set(range(start, data.num_users)) - {start + v for v in ids.tolist()} == allowed
            if events.at_level(level)[e]:
                higher = sum(last[user] > last[target] for user in allowed)
                tied = sum(last[user] == last[target] for user in allowed) - 1
                assert recency[level, e] == 1 + higher + tied / 2
    assert events.index.tolist() == counted and len(counted) > 30


@dataclass(frozen=True)
class ByFirstPartners:
    """A newcomer is the sum of whom it met at first; who asks is itself: perfect at the first event, and only then."""

    data: PreparedData

    @property
    def vectors(self) -> NDArray[np.float32]:
        own = np.random.default_rng(1).standard_normal((self.data.num_users, 64)).astype(np.float32)
        first = first_events(self.data, EARLY, self.data.num_users).partners
        met = np.stack([own[first.values[slice(*ends)]].sum(0) for ends in zip(first.offsets, first.offsets[1:])])  # noqa: B905
        return np.concatenate([own[:EARLY], met])

    @property
    def retriever(self) -> ExactIndex:
        return ExactIndex(self.vectors[EARLY:], self.data.user_ids[EARLY:])

    def queries(self, actors: NDArray[np.int64], as_of: NDArray[np.int64]) -> Queries:
        return Queries.dense(self.vectors[actors])


def test_a_code_of_first_events_knows_nothing_of_later_ones_and_would_know_the_first(data: PreparedData) -> None:
    """A null log: chance among newcomers, though whom they met first is told. Scored at that time too, it is not."""
    for seed in range(3):
        data = null.prepared(growing_log(seed))
        seen, events = asked(data, "newcomers")
        shifted = replace(events, target=events.target - EARLY)
        ranks = recommender_ranks(data, shifted, seen, ByFirstPartners(data), "live")
        for task in null.NULL_TASKS:
            of = events.of_task(task)
            allowed = _num_allowed(seen, LEVEL[task], events.take(of))
            null.assert_chance(ranks[LEVEL[task], of], allowed, 9, task)
    at_first = replace(seen, first=seen.first - 1)  # whoever appears now counts as seen
    log = log_of(data)
    first = {}
    for index, (actor, target, _) in enumerate(log):
        for user in (actor, target):
            first.setdefault(user, index)
    chosen = np.array([i for i in sorted(first.values()) if first[log[i][1]] == i and log[i][1] >= EARLY > log[i][0]])
    actor, target, time = np.array([log[i] for i in chosen]).T
    leaky = Events(chosen, actor, target - EARLY, time, np.ones(len(chosen), bool), np.zeros(len(chosen), bool))
    ranks = recommender_ranks(data, leaky, at_first, ByFirstPartners(data), "live")
    assert (ranks[0] == 1).mean() > 0.9, "the stand-in does use first events"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/data, and DIR/run whose tokens hold all newcomers."""
    root = tmp_path_factory.mktemp("newcomers")
    data = publish_data(root / "data", users=60, events=2000)
    opened = load_prepared(data)
    tokens = publish_random_tokens(data, root / "tokens", opened.num_users - opened.num_train_users)
    train_stu_run(data, tokens, root / "run", "--epochs=1", "--workers=0")
    return root


def test_a_run_finds_newcomers_and_its_main_figures_are_those_of_train_users(folder: Path) -> None:
    run = open_recommender(folder / "run", folder / "data")
    data = run.data
    num = data.num_users - data.num_train_users
    assert num_with_codes(run) == data.num_users and num > 5
    runs, exclusions = that_know_newcomers({MODEL: run, "also": None}), Exclusions.of(data)
    found = score_newcomers("test", exclusions, runs, {MODEL: 100})
    figures = newcomer_figures(found, exclusions, runs, {})
    assert figures["with_tokens"] == num and figures["events"]["next_contact"] > 5
    halves = [score_newcomers("test", exclusions, runs, {}, slice(part, None, 2)) for part in (0, 1)]
    for question, evaluation in found.items():
        for method, states in evaluation.ranks.items():
            parts = [half[question].ranks[method]["live"] for half in halves]
            np.testing.assert_array_equal(np.where(np.isnan(parts[0]), parts[1], parts[0]), states["live"])
        for task in TASKS:
            rows = figures["among"][question][task]
            if figures["events"][task]:
                ranks = evaluation.of(MODEL, task, "live")
                assert rows["model"]["recall@100"] == (ranks <= 100).mean()
                assert set(rows["chance"]) == {f"recall@{k}" for k in CUTOFFS}
    alone = found["newcomers"].of(MODEL, "next_contact", "live")
    assert np.isfinite(alone).all() and alone.max() <= num, "so few are all found"
    # An index that holds everybody: the same main ranks as without, and the same newcomers.
    codes, index = run.packer.codes, run.retriever
    assert codes is not None and isinstance(index, StuIndex)
    whole = replace(StuIndex.build(codes.tokens, data.user_ids, codes.sizes), decoder=index.decoder)
    with_all = replace(run, retriever=whole)
    events, _ = scored_events(data, "validation", exclusions)
    main = recommender_ranks(data, events, exclusions, of_train_users(with_all), "live")
    np.testing.assert_array_equal(main, recommender_ranks(data, events, exclusions, run, "live"))
    again = score_newcomers("test", exclusions, {MODEL: with_all}, {})
    np.testing.assert_array_equal(again["all"].ranks[MODEL]["live"], found["all"].ranks[MODEL]["live"])


def test_the_score_of_a_train_user_is_the_same_among_newcomers(folder: Path) -> None:
    run = open_recommender(folder / "run", folder / "data")
    data, everybody = run.data, among(run, 0, run.data.num_users)
    assert everybody is not None
    actors, times = np.arange(40), np.full(40, data.validation_until)
    queries = run.queries(actors, times)
    alone, scores = run.retriever.search(queries, data.num_train_users)
    ids, others = everybody.retriever.search(queries, data.num_users)
    assert (ids >= data.num_train_users).sum() == 40 * (data.num_users - data.num_train_users)
    for q in range(40):
        kept = ids[q] < data.num_train_users
        assert ids[q][kept].tolist() == alone[q].tolist()
        np.testing.assert_allclose(others[q][kept], scores[q], atol=1e-5)
