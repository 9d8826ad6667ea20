"""No score knows the future: the weights fixed, whatever happens at or after t moves nothing that is asked at t."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from friendrec.datasets.config import ContextConfig, ReaderConfig
from friendrec.datasets.packing import Packer
from friendrec.datasets.prepared import PreparedData, load_prepared
from friendrec.datasets.reader import Reader
from friendrec.pipeline.build import build_model
from friendrec.pipeline.config import RunConfig
from friendrec.pipeline.evaluation.scoring import recommender_ranks
from friendrec.pipeline.evaluation.tasks import LEVELS, STATES, Events, Exclusions, scored_events
from friendrec.pipeline.inference import Recommender, open_recommender
from friendrec.pipeline.publish import publish
from friendrec.sharding.checkpoint import load_whole
from tests.pipeline.evaluation.null import Log
from tests.synthetic import prepared_from_events
from tests.training import CHUNK, train_run

USERS, LATECOMERS, EVENTS = 12, 4, 500
ACTIONS = ("block", "message", "poke", "request")
ROLES = {"block": "exclude", "poke": "negative", "request": "history"}
SPLITS = 0.8, 0.9


def make_log() -> Log:
    """All users of the train period meet within the first events; few distinct times; latecomers after training."""
    rng = np.random.default_rng(0)
    actor = (USERS * rng.random(EVENTS) ** 1.5).astype(np.int64)
    target = (actor + rng.integers(1, 5, EVENTS)) % USERS
    action = rng.choice(ACTIONS, EVENTS, p=[0.05, 0.65, 0.1, 0.2])
    time = np.sort(rng.integers(10, 200, EVENTS)) * 60_000_000
    ring = np.arange(2 * USERS)
    actor[: 2 * USERS], target[: 2 * USERS], time[: 2 * USERS] = ring % USERS, (ring + 1) % USERS, 60_000_000
    action[: 2 * USERS] = np.resize(ACTIONS[1:], 2 * USERS)
    late = np.flatnonzero((time > 170 * 60_000_000) & (rng.random(EVENTS) < 0.3))
    actor[late] = USERS + rng.integers(0, LATECOMERS, len(late))
    return actor, target, action, time


LOG = make_log()
TRAIN_UNTIL, VALIDATION_UNTIL = (int(LOG[3][int(share * EVENTS)]) for share in SPLITS)
MOMENTS = np.unique(LOG[3])[1:]


def rewritten(log: Log, moment: int, seed: int, keep: int | None = None, actions: tuple[str, ...] = ACTIONS) -> Log:
    """The log with the events at or after `moment` changed, dropped, put off and added to, but for the event `keep`.

    Only events of `actions` are touched and added.
    """
    rng = np.random.default_rng(seed)
    actor, target, action, time = log[0].copy(), log[1].copy(), log[2].copy(), log[3].copy()
    free = (time >= moment) & np.isin(action, actions) & (np.arange(len(time)) != keep)
    changed = np.flatnonzero(free & (rng.random(len(time)) < 0.6))
    everyone = USERS + LATECOMERS + 3
    actor[changed] = rng.integers(0, everyone, len(changed))
    action[changed] = rng.choice(actions, len(changed))
    target[changed] = (actor[changed] + rng.integers(1, everyone, len(changed))) % everyone
    put_off = np.flatnonzero(free & (rng.random(len(time)) < 0.3))
    time[put_off] = np.maximum(moment, time[put_off] + 60_000_000 * rng.integers(-20, 20, len(put_off)))
    stays = ~free | (rng.random(len(time)) < 0.7)
    new = rng.integers(0, 60)
    latest = max(moment, int(log[3].max())) + 1
    return (
        np.concatenate([actor[stays], rng.integers(0, everyone, new)]),
        np.concatenate([target[stays], rng.integers(0, everyone, new)]),
        np.concatenate([action[stays], rng.choice(actions, new)]),
        np.concatenate([time[stays], rng.integers(moment, latest, new)]),
    )


def prepare(log: Log, path: Path) -> PreparedData:
    """A log with the split times of LOG, so that the periods stay where they are whatever became of the events."""
    data = prepared_from_events(*log, roles=ROLES, chunk_length=CHUNK, path=path)
    times = data.timestamp[data.event_entry]
    num_train, num_seen = np.searchsorted(times, [TRAIN_UNTIL, VALIDATION_UNTIL]).tolist()
    first = data.timestamp[data.offsets[:-1]]
    splits = json.loads((path / "splits.json").read_text()) | {
        "train_until": TRAIN_UNTIL,
        "validation_until": VALIDATION_UNTIL,
        "num_train_events": num_train,
        "num_validation_events": num_seen - num_train,
        "num_train_users": int((first < TRAIN_UNTIL).sum()),
    }
    (path / "splits.json").write_text(json.dumps(splits))
    return load_prepared(path)


def train_on(log: Log, root: Path, *args: str) -> Path:
    """DIR/data and DIR/run."""
    with publish(root / "data", kind="data", options=None, inputs={}) as attempt:
        prepare(log, attempt)
    train_run(root / "data", root / "run", "--epochs=2", "--patience=0", "--workers=0", *args)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    root = train_on(LOG, tmp_path_factory.mktemp("leakage"))
    opened = open_recommender(root / "run", root / "data")
    assert opened.data.num_train_users == USERS < opened.data.num_users
    assert [action.role for action in opened.data.actions] == ["target", "negative", "history"]
    return opened


def knowing(model: Recommender, log: Log, path: Path) -> Recommender:
    """The same weights and index with another past and future. The vocabulary of the weights stays."""
    data = replace(prepare(log, path), num_train_users=USERS)
    return replace(model, data=data, packer=Packer(data, model.config.context), exclusions=Exclusions.of(data))


def answers(model: Recommender, moment: int) -> dict[str, NDArray[Any]]:
    """Everything that users seen before `moment` are told at it, all ranks included."""
    data = model.data
    actors = np.flatnonzero(data.timestamp[data.offsets[:-1]] < moment)
    as_of = np.full(len(actors), moment)
    queries = model.queries(actors, as_of)
    found = {f.name: getattr(queries, f.name) for f in dataclasses.fields(queries)} | {"users": data.user_ids[actors]}
    for level in range(LEVELS):
        hidden = model.exclusions.at(level, actors, as_of)
        found |= {f"offsets {level}": hidden[0], f"excluded {level}": hidden[1]}
        for target in range(USERS):
            targets = np.full(len(actors), target)
            found[f"ranks of {target}, {level}"] = model.retriever.rank(queries.excluding(*hidden), targets)
    found["ids"], found["scores"] = model.recommend(actors, as_of, k=USERS)
    return found


def assert_equal(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@given(seed=st.integers(0, 2**32 - 1), moment=st.sampled_from(MOMENTS.tolist()))
@settings(max_examples=50, deadline=None)
def test_nothing_at_or_after_a_time_moves_an_answer(model: Recommender, seed: int, moment: int) -> None:
    with TemporaryDirectory() as folder:
        other = knowing(model, rewritten(LOG, moment, seed), Path(folder))
        assert_equal(answers(other, moment), answers(model, moment))


def test_what_came_before_does_move_it(model: Recommender, tmp_path: Path) -> None:
    """The test above compares something: its answers differ, one by one, where the past does."""
    other = knowing(model, rewritten(LOG, TRAIN_UNTIL - 1, seed=1), tmp_path)
    mine, theirs = answers(model, VALIDATION_UNTIL), answers(other, VALIDATION_UNTIL)
    changed = {name for name in mine if not np.array_equal(mine[name], theirs[name])}
    assert {"vector", "sparse_ids", "sparse_bonus", "excluded 0", "excluded 1", "excluded 2", "ids"} <= changed
    assert np.ptp(mine["sparse_bonus"]) > 0.01
    scored = [ranks_of(model, tuple(column[place].item() for column in LOG)) for place in scored_places()]
    assert sum(map(bool, scored)) > len(scored) / 2


def ranks_of(model: Recommender, event: tuple[Any, ...]) -> dict[str, list[float]]:
    """What `evaluate` makes of one event (actor, target, action, time): its tasks, and its rank at each level."""
    data = model.data
    for period in ("validation", "test"):
        events, _ = scored_events(data, period, model.exclusions)
        rows = [data.user_ids[row].tolist() for row in (events.actor, events.target)]
        action = [data.actions[code].name for code in data.action[data.event_entry[events.index]]]
        for place, found in enumerate(zip(*rows, action, events.timestamp.tolist(), strict=True)):
            if found == event:
                only: Events = events.take(np.array([place]))
                ranks = {state: recommender_ranks(data, only, model.exclusions, model, state)[:, 0] for state in STATES}
                tasks = [float(only.is_new[0]), float(only.is_reply[0])]
                return {"tasks": tasks} | {
                    state: np.nan_to_num(found, nan=-1).tolist() for state, found in ranks.items()
                }
    return {}


def scored_places() -> list[int]:
    """Events of LOG that are scored whatever happens beside them: messages to users of the train period."""
    target, action, time = LOG[1:]
    return np.flatnonzero((time >= TRAIN_UNTIL) & (action == "message") & (target < USERS)).tolist()


@given(seed=st.integers(0, 2**32 - 1), place=st.sampled_from(scored_places()))
@settings(max_examples=40, deadline=None)
def test_evaluation_ranks_an_event_by_what_was_before_it(model: Recommender, seed: int, place: int) -> None:
    event = tuple(column[place].item() for column in LOG)
    with TemporaryDirectory() as folder:
        other = knowing(model, rewritten(LOG, event[3], seed, keep=place), Path(folder))
        assert ranks_of(other, event) == ranks_of(model, event)


@given(seed=st.integers(0, 2**32 - 1), place=st.sampled_from(scored_places()))
@settings(max_examples=40, deadline=None)
def test_a_frozen_score_knows_nothing_after_training(model: Recommender, seed: int, place: int) -> None:
    """Whom a task leaves out follows the log, scores do not: with blocks kept, so are ranks among everybody."""
    event = tuple(column[place].item() for column in LOG)
    with TemporaryDirectory() as folder:
        other = knowing(model, rewritten(LOG, TRAIN_UNTIL, seed, keep=place, actions=ACTIONS[1:]), Path(folder))
        mine, theirs = ranks_of(model, event), ranks_of(other, event)
    assert mine.keys() == theirs.keys()
    assert mine.get("frozen", [0])[0] == theirs.get("frozen", [0])[0]


@pytest.mark.parametrize("order", ["user", "time"])
def test_training_reads_nothing_of_later_periods(order: Any, tmp_path: Path) -> None:
    config = ReaderConfig(order=order, batch_size=CHUNK, uniform_negatives=3, recent_negatives=3, shared_negatives=4)
    context = ContextConfig(context_length=12, contacts=5)
    logs = LOG, rewritten(LOG, TRAIN_UNTIL, seed=2)
    mine, theirs = (
        Reader(prepare(log, tmp_path / name), context, config) for log, name in zip(logs, "ab", strict=True)
    )
    assert mine.data.num_events != theirs.data.num_events
    assert mine.steps == theirs.steps > 5
    for epoch in range(2):
        for step in range(mine.steps):
            for a, b in zip(leaves(mine[epoch, step]), leaves(theirs[epoch, step]), strict=True):
                np.testing.assert_array_equal(a, b)


def leaves(batch: Any) -> Iterator[NDArray[Any]]:
    """Every array and number of a batch."""
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value)
        elif isinstance(value, KeyedJaggedTensor):
            yield from (value.values().numpy(), value.lengths().numpy())
        else:
            yield np.asarray(value)


def test_trained_weights_know_nothing_of_later_periods(tmp_path: Path) -> None:
    """Bit by bit. Validation may choose another checkpoint and does, so the last ones are compared."""
    logs = LOG, rewritten(LOG, TRAIN_UNTIL, seed=3)
    mine, theirs = (last_weights(train_on(log, tmp_path / name)) for log, name in zip(logs, "ab", strict=True))
    assert mine.keys() == theirs.keys()
    for name, weights in mine.items():
        assert torch.equal(weights, theirs[name]), name


def last_weights(root: Path) -> dict[str, torch.Tensor]:
    config = RunConfig.load(root / "run")
    model = build_model(config, Packer(load_prepared(root / "data"), config.context).tables)
    steps = (root / "run" / "checkpoints").iterdir()
    load_whole(max(steps, key=lambda path: int(path.name.removeprefix("step-"))), model)
    return model.state_dict()
