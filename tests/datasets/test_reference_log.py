"""The reference log keeps the generator's rules: each draw against the exact distribution that the past gives it."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from friendrec.datasets.reference_log import ACTION_WEIGHTS, ACTIONS, NEAR, YEAR, draw_days, reference_log
from friendrec.errors import FriendrecError
from friendrec.pipeline.prepare import PrepareOptions
from friendrec.pipeline.prepare import main as prepare
from friendrec.pipeline.simulate import PRESETS, SimulateOptions, main

WEIGHTS = {"follow": 0.4, "like": 0.3, "comment": 0.2, "share": 0.1}


def departures(users: int, events: int, seed: int, same: float = 2.0, followed: float = 0.1) -> dict[str, float]:
    """How far each kind of choice departs from what the rules expect, in standard deviations; by plain loops.

    Given the past a choice is a draw from a known distribution, so that observed minus expected, summed, is a
    martingale and its sum over the root of the summed variances nearly standard normal.
    """
    log = reference_log(users, events, seed)
    community = log.truth["community"].to_numpy()
    received, follows = np.zeros(users), np.zeros((users, users), bool)
    sums: dict[str, float] = defaultdict(float)
    variances: dict[str, float] = defaultdict(float)
    for row in log.interactions.to_pylist():
        u, v = row["actor_id"], row["target_id"]
        weight = 1 + received
        ours = community == community[u]
        choice = weight * np.where(ours, same, 1.0) * np.where(follows[u], followed, 1.0)
        choice[u] = 0
        for name, probability, value, chosen in (
            ("actor", weight, received, u), ("target", choice, received, v),
            ("same", choice, ours, v), ("followed", choice, follows[u], v),
        ):  # fmt: skip
            probability = probability / probability.sum()
            mean = probability @ value
            sums[name] += value[chosen] - mean
            variances[name] += probability @ np.square(value - mean)
        if row["action"] == "follow":
            received[v] += 1
            follows[u, v] = True
    return {name: sums[name] / np.sqrt(variances[name]) for name in sums}


def test_every_draw_has_the_weights_of_the_rules() -> None:
    for seed in range(3):
        departure = departures(60, 3000, seed)
        assert max(map(abs, departure.values())) < 4, departure


def test_other_rules_would_be_noticed() -> None:
    assert departures(60, 3000, 0, same=1.0)["same"] > 6
    assert departures(60, 3000, 0, followed=1.0)["followed"] < -6


def test_actions_and_communities() -> None:
    log = reference_log(2_000, 20_000, 0)
    counts = np.bincount(log.interactions["action"].chunk(0).indices.to_numpy(), minlength=4)
    assert dict(zip(ACTIONS, ACTION_WEIGHTS, strict=True)) == WEIGHTS
    assert stats.chisquare(counts, 20_000 * ACTION_WEIGHTS).pvalue > 1e-3
    assert log.truth["user_id"].to_pylist() == list(range(2_000))
    assert len(np.unique(log.truth["community"].to_numpy())) == 100


def test_days_are_uniform_or_near_the_event_before() -> None:
    days = draw_days(20_000, np.random.default_rng(0))
    assert days.min() >= 0 and days.max() <= YEAR
    near = np.abs(np.diff(days)) <= NEAR
    by_chance = 2 * NEAR / YEAR
    assert near.mean() == pytest.approx(0.3 + 0.7 * by_chance, abs=0.015)
    assert stats.kstest(days[1:][~near], "uniform", args=(0, YEAR)).pvalue > 1e-3


@pytest.mark.parametrize(("users", "events"), [(2, 300), (3, 1), (19, 200), (500, 20)])
def test_small_sizes(users: int, events: int) -> None:
    interactions = reference_log(users, events, seed=1).interactions
    actor, target = (interactions[name].to_numpy() for name in ("actor_id", "target_id"))
    assert interactions.num_rows == events
    assert (actor != target).all()
    assert min(actor.min(), target.min()) >= 0 and max(actor.max(), target.max()) < users


def test_the_verb_writes_a_log_that_can_be_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in {"log": 5, "same": 5, "other": 6}.items():
        main(SimulateOptions(preset="reference", out=str(tmp_path / name), users=300, events=2_000, seed=seed))
    logs = [pq.read_table(tmp_path / name / "interactions") for name in ("log", "same", "other")]
    assert logs[0].equals(logs[1]) and not logs[0].equals(logs[2])
    assert logs[0]["action"].type == pa.dictionary(pa.int8(), pa.string())
    times = logs[0]["timestamp"].cast(pa.int64()).to_numpy()
    assert (np.diff(times) >= 0).all() and (times[-1] - times[0]) / 86_400e6 <= YEAR
    assert PRESETS["reference"] == (2_000, 20_000)
    manifest = json.loads((tmp_path / "log" / "manifest.json").read_text())
    assert manifest["extra"] == {"users": 300, "events": 2_000, "seed": 5}
    assert f"friendrec prepare --interactions {tmp_path}/log/interactions --out data" in capsys.readouterr().out
    prepare(PrepareOptions(interactions=str(tmp_path / "log"), out=str(tmp_path / "data")))
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["extra"]["events"] == 2_000


@pytest.mark.parametrize(("option", "value"), [("users", 1), ("events", 0), ("seed", -1)])
def test_bad_numbers_are_refused(option: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(FriendrecError, match=f"^--{option} {value}: .*; give"):
        main(SimulateOptions(preset="reference", out=str(tmp_path / "log"), **{option: value}))  # type: ignore[arg-type]
