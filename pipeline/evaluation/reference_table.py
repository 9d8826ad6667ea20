"""The table of the concept repository, made again with our models, and what is left of it once nothing leaks.

Each model is trained three times for each seed, by the same loop and judged by the same metrics:

    leaky            random split, every step of a training history is predicted, as the concept repository did
    own_targets      random split, train examples alone: no test target is trained on
    temporal_split   split by time: nothing after the train part is trained on
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.packing import Packer
from friendrec.datasets.prepared import PreparedData
from friendrec.errors import FriendrecError
from friendrec.pipeline.config import RunConfig, preset
from friendrec.pipeline.evaluation.link import over_seeds
from friendrec.pipeline.evaluation.metrics import summary
from friendrec.pipeline.evaluation.reference import (
    BATCH,
    DRAWN,
    LABEL,
    Split,
    history_steps,
    prefixes,
    random_split,
    reference_metrics,
    temporal_split,
)
from friendrec.pipeline.evaluation.reference_model import EPOCHS, Examples, ReferenceModel

Rows = NDArray[np.int64]
Figures = dict[str, float]

PUBLISHED: dict[str, Figures] = {
    "two_tower_mlp": {"accuracy": 0.7733, "mrr": 0.4621, "mean_rank": 11.29, "parameters": 1_280_000},
    "two_tower_moe": {"accuracy": 0.8191, "mrr": 0.5922, "mean_rank": 8.40, "parameters": 1_950_000},
}
"""The concept repository's own figures, of pooled attention with an MLP and of a transformer with four experts."""
SETTINGS = ("leaky", "own_targets", "temporal_split")
SEEDS = range(2)
STEPS = len(PUBLISHED) * len(SETTINGS) * len(SEEDS) * EPOCHS
"""How often a table calls `advance`."""
MOST = 80_000_000
"""Examples times users: a full softmax over all users gets through twice the reference's log in minutes, not more."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained on, ascending, and the split whose other parts judge it."""

    train: Rows
    split: Split


def reference_table(
    data: PreparedData,
    configs: Mapping[str, RunConfig] | None = None,
    seeds: Sequence[int] = SEEDS,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What metrics.json holds: figures of each config, of popularity and of chance, means over `seeds`."""
    data = dataclasses.replace(data, num_train_users=data.num_users)  # a row for everybody: no split by time
    examples = Examples.of(data)
    _check(data, examples)
    if configs is None:
        configs = {name: _without_copy_term(preset(name)) for name in PUBLISHED}
    runs: dict[str, dict[str, list[Figures]]] = {}
    trained_on: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for seed in seeds:
        for name, setting in settings(data, examples, seed).items():
            trained_on[name].append(float(np.isin(setting.split.test, setting.train).mean()))
            for method, figures in _figures(configs, data, examples, setting, seed, advance).items():
                runs.setdefault(method, {}).setdefault(name, []).append(figures)
    protocol = {
        "name": "reference", "label": LABEL, "seeds": list(seeds), "events": data.num_events, "users": data.num_users,
        **{name: len(part) for name, part in random_split(len(examples.actor), 0)._asdict().items()},
        "candidates": BATCH + DRAWN,
        "test_targets_trained_on": {name: float(np.mean(shares)) for name, shares in trained_on.items()},
    }  # fmt: skip
    return {"protocol": protocol, "reference": {method: _row(method, found) for method, found in runs.items()}}


def settings(data: PreparedData, examples: Examples, seed: int) -> dict[str, Setting]:
    """The three, by name; `seed` draws the random split."""
    at_random, by_time = random_split(len(examples.actor), seed), temporal_split(data, prefixes(data))
    every_step = history_steps(examples.actor, at_random.train)
    trained = (every_step, at_random), (np.sort(at_random.train), at_random), (np.sort(by_time.train), by_time)
    return {name: Setting(*parts) for name, parts in zip(SETTINGS, trained, strict=True)}


def judge(scores: NDArray[np.float32], targets: Rows, seed: int) -> Figures:
    """The protocol's figures, and Recall@10 among all users, of scores `[T, U]`; `seed` draws the users of a row."""
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    ranks = 1 + (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2

    def score(places: Rows, users: Rows) -> NDArray[np.float32]:
        return np.take_along_axis(scores[places], users, axis=1)

    figures = reference_metrics(score, np.arange(len(targets)), targets, scores.shape[1], seed)
    return figures | {"recall@10": summary(ranks)["recall@10"]}


def _check(data: PreparedData, examples: Examples) -> None:
    if len(examples.actor) < 10:
        raise FriendrecError(f"{len(examples.actor)} events follow an earlier one of their actor: use a longer log")
    if len(examples.actor) * data.num_users > MOST:
        raise FriendrecError(
            f"{len(examples.actor):,} examples times {data.num_users:,} users is too much for a full softmax: "
            "the protocol reference is for logs such as `friendrec simulate --preset reference` makes"
        )


def _without_copy_term(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, copy_term=False))


def _figures(
    configs: Mapping[str, RunConfig],
    data: PreparedData,
    examples: Examples,
    setting: Setting,
    seed: int,
    advance: Callable[[], None],
) -> dict[str, Figures]:
    """Every method's figures on the test part."""
    test = examples.target[setting.split.test]
    popular = np.bincount(examples.target[setting.train], minlength=data.num_users).astype(np.float32)
    figures = {name: _trained(config, data, examples, setting, seed, advance) for name, config in configs.items()}
    chance = np.random.default_rng(seed).random((len(test), data.num_users), dtype=np.float32)
    baselines = {"popularity": np.broadcast_to(popular, chance.shape), "chance": chance}
    return figures | {name: judge(scores, test, seed) for name, scores in baselines.items()}


def _trained(
    config: RunConfig,
    data: PreparedData,
    examples: Examples,
    setting: Setting,
    seed: int,
    advance: Callable[[], None],
) -> Figures:
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
    model = ReferenceModel(config, Packer(data, config.context), examples)

    def judged(part: Rows) -> Figures:
        return judge(model.scores(part), examples.target[part], seed)

    seconds = model.fit(setting.train, lambda: judged(setting.split.validation)["mrr"], advance)
    return judged(setting.split.test) | {"train_seconds": seconds, "parameters": model.parameters}


def _row(method: str, runs: dict[str, list[Figures]]) -> dict[str, Any]:
    """A method's leaky figures, the number of its parameters, what was published, and its honest figures."""
    parameters = [run.pop("parameters") for found in runs.values() for run in found if "parameters" in run]
    means = {name: over_seeds(found) for name, found in runs.items()}
    row: dict[str, Any] = means.pop("leaky") | ({"parameters": parameters[0]} if parameters else {})
    published = {"published": PUBLISHED[method]} if method in PUBLISHED else {}
    return row | published | {"honest": means}
