"""The model's rank of each event in a file of the report, so that two reports can be compared event by event."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from friendrec.pipeline.evaluation.results import MODEL, Evaluation
from friendrec.pipeline.evaluation.tasks import STATES, Events

RANKS = "ranks.npz"
"""Arrays by name: the fields of `Events`, and the ranks `[LEVELS, E]` of each state; nan where no task asks."""


def save_ranks(report: Path, evaluation: Evaluation) -> None:
    """Nothing where no model was scored."""
    if MODEL in evaluation.ranks:
        arrays: dict[str, Any] = vars(evaluation.events) | evaluation.ranks[MODEL]
        np.savez_compressed(report / RANKS, **arrays)


def load_ranks(report: Path) -> Evaluation:
    """The events, and the ranks of the model alone."""
    with np.load(report / RANKS) as arrays:
        events = Events(**{field.name: arrays[field.name] for field in dataclasses.fields(Events)})
        return Evaluation(events, {MODEL: {state: arrays[state] for state in STATES if state in arrays}})
