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
    6.48573, 6.2197, 6.12549, 6.04158, 6.12594, 5.95035, 5.84194, 5.51648, 5.25545, 5.29831,
    5.52733, 5.05679, 5.12438, 4.90729, 4.49957, 4.38301, 4.44658, 3.77412, 3.80034, 4.24251,
]  # fmt: skip
"""Of the first 20 steps; within 1e-3 of each."""
METRICS = {
    "next_contact": {
        "live": {"recall@10": 0.6981, "mrr": 0.5703},
        "frozen": {"recall@10": 0.4218, "mrr": 0.2136},
    },
    "new_link": {
        "live": {"recall@10": 0.4794, "mrr": 0.3724},
        "frozen": {"recall@10": 0.268, "mrr": 0.1222},
    },
}
"""Of the validation period (467 and 194 events); within 0.02."""


def small_run(root: Path) -> Path:
    """A network like `--preset regular`, a quarter of it, through the verbs: three epochs in one process."""
    simulate(SimulateOptions(users=500, events=5000, seed=1, out=str(root / "log")))
    prepare(PrepareOptions(interactions=str(root / "log"), out=str(root / "data")))
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
