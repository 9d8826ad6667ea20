"""A small seeded run, step by step: its losses and what it scores, committed.

A change that moves these numbers must say why in its message, and give the new ones, which
`OMP_WAIT_POLICY=PASSIVE python -m tests.test_golden` prints.
Tolerances allow for other processors (order of additions), not for another model.
"""

import tempfile
from pathlib import Path
from pprint import pp

import pytest

from friendrec.datasets.prepared import load_prepared
from friendrec.pipeline.evaluation.ranking import score
from friendrec.pipeline.evaluation.results import results
from friendrec.pipeline.evaluation.tasks import STATES, Exclusions, scored_events
from friendrec.pipeline.inference import open_recommender
from friendrec.pipeline.prepare import PrepareOptions
from friendrec.pipeline.prepare import main as prepare
from friendrec.pipeline.simulate import SimulateOptions
from friendrec.pipeline.simulate import main as simulate
from tests.training import losses, train_run

LOSSES = [
    6.23023, 6.20371, 6.23591, 5.90896, 5.69915, 5.40051, 5.19251, 4.84786, 4.78045, 5.00997,
    4.58691, 4.93731, 4.14994, 4.64465, 4.11256, 4.1205, 3.44986, 3.35099, 3.65439, 3.49939,
]  # fmt: skip
"""Of the first 20 steps; within 1e-3 of each."""
METRICS = {
    "next_contact": {
        "live": {"recall@10": 0.6728, "mrr": 0.4725},
        "frozen": {"recall@10": 0.4233, "mrr": 0.2416},
    },
    "new_link": {
        "live": {"recall@10": 0.4976, "mrr": 0.322},
        "frozen": {"recall@10": 0.3285, "mrr": 0.1516},
    },
}
"""Of the validation period (437 and 207 events); within 0.02."""


def small_run(root: Path) -> Path:
    """A network like `--preset regular`, a quarter of it, through the verbs: three epochs in one process."""
    simulate(SimulateOptions(users=500, events=5000, seed=1, out=str(root / "log")))
    prepare(PrepareOptions(interactions=str(root / "log"), roles="block=exclude", out=str(root / "data")))
    args = ("--dim=32", "--hidden=64", "--batch-size=256", "--context-length=50", "--contacts=48")
    train_run(root / "data", root / "run", *args, "--epochs=3", "--patience=0", "--workers=0")
    return root


def measure(root: Path) -> tuple[list[float], dict[str, dict[str, dict[str, float]]]]:
    """The losses of the first 20 steps, and the model's figures on the validation period by task and state."""
    data = load_prepared(root / "data")
    exclusions = Exclusions.of(data)
    events, _ = scored_events(data, "validation", exclusions)
    model = open_recommender(root / "run", root / "data")
    tasks = results(score(data, events, exclusions, model, baselines=False))["tasks"]
    figures = {
        task: {state: {name: round(tasks[task][state][name], 4) for name in ("recall@10", "mrr")} for state in STATES}
        for task in METRICS
    }
    curve = losses(root / "run")
    return [round(curve[step], 5) for step in range(1, 21)], figures


def test_the_run_is_what_it_was(tmp_path: Path) -> None:
    curve, figures = measure(small_run(tmp_path))
    assert curve == pytest.approx(LOSSES, rel=1e-3)
    for task in METRICS:
        for state in STATES:
            assert figures[task][state] == pytest.approx(METRICS[task][state], abs=0.02), (task, state)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        pp(measure(small_run(Path(folder))))
