"""The trained model against chance: where only the event itself tells its target, or nothing does, it is lost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from friendrec.datasets.packing import Queries as PackedQueries
from friendrec.pipeline import inference
from friendrec.pipeline.evaluation.scoring import recommender_ranks
from friendrec.pipeline.evaluation.tasks import LEVEL, STATES, scored_events
from friendrec.pipeline.inference import Recommender, open_recommender
from friendrec.pipeline.publish import publish
from tests.pipeline.evaluation import null
from tests.synthetic import prepared_from_events
from tests.training import CHUNK, train_run

TOLD = 10  # actions of a log that tells
COMPARISONS = 3 * 2 * len(STATES) * len(null.NULL_TASKS)  # logs, models


def told_by_action(seed: int) -> null.Log:
    """The action of an event, which training shows half of the time, tells the last digit of its target."""
    actor, target, _, time = null.random_log(seed)
    return actor, target, np.array([f"action{digit}" for digit in range(TOLD)])[target % TOLD], time


LOGS = {"random": null.random_log(0), "told by time": null.telling_log(1), "told by action": told_by_action(2)}


def trained(log: null.Log, root: Path, *args: str) -> Recommender:
    """Three epochs: enough to learn by heart what there is."""
    with publish(root / "data", kind="data", options=None, inputs={}) as attempt:
        prepared_from_events(*log, chunk_length=CHUNK, path=attempt)
    widths = ("--dim=16", "--hidden=32", "--batch-size=128", "--context-length=50", "--contacts=48")
    train_run(root / "data", root / "run", *widths, "--epochs=3", "--patience=0", "--workers=0", *args)
    return open_recommender(root / "run", root / "data")


def assert_all_chance(model: Recommender) -> None:
    events, _ = scored_events(model.data, "test", model.exclusions)
    for state in STATES:
        ranks = recommender_ranks(model.data, events, model.exclusions, model, state)
        for task in null.NULL_TASKS:
            placed = ranks[LEVEL[task], events.of_task(task)]
            candidates = null.allowed(model.data, events, model.exclusions, task)
            null.assert_chance(placed, candidates, COMPARISONS, f"{task}, {state}")


@pytest.mark.parametrize("copy_term", ["--copy-term", pytest.param("--no-copy-term", marks=pytest.mark.long)])
@pytest.mark.parametrize("log", LOGS)
def test_model_scores_chance_where_there_is_nothing_to_know(log: str, copy_term: str, tmp_path: Path) -> None:
    assert_all_chance(trained(LOGS[log], tmp_path, copy_term))


def test_a_model_that_is_told_the_action_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: the weights do know what an action says, and queries that name it are not chance."""
    model = trained(LOGS["told by action"], tmp_path)
    data, entries = model.data, model.data.event_entry
    actors = np.searchsorted(data.offsets, entries, side="right") - 1
    moments = zip(actors.tolist(), data.timestamp[entries].tolist(), strict=True)
    action = dict(zip(moments, data.action[entries].tolist(), strict=True))

    def peeking(queries: PackedQueries) -> PackedQueries:
        asked = zip(queries.users.tolist(), queries.times.tolist(), strict=True)
        return replace(queries, conditions=np.array([1 + action.get(moment, -1) for moment in asked]))

    monkeypatch.setattr(inference, "PackedQueries", lambda *args, **kwargs: peeking(PackedQueries(*args, **kwargs)))
    with pytest.raises(AssertionError, match="next_contact, live"):
        assert_all_chance(model)
