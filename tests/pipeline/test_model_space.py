"""Every point of the model space trains, evaluates, and ranks as it trained; what it logs is there."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from friendrec.errors import FriendrecError
from friendrec.pipeline import train
from friendrec.pipeline.config import PRESETS, RunConfig, preset
from friendrec.pipeline.evaluation.ranking import score
from friendrec.pipeline.evaluation.results import results
from friendrec.pipeline.evaluation.tasks import Exclusions, scored_events
from friendrec.pipeline.inference import open_recommender
from tests.training import SMALL, losses, publish_data, train_run

ENCODERS, INTERACTIONS, TEMPORAL = ("pooled_attention", "transformer"), ("mlp", "moe"), (True, False)
SPACE = list(itertools.product(ENCODERS, INTERACTIONS, TEMPORAL))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("space") / "data", users=60, events=700)


def flags(encoder: str, interaction: str, temporal: bool) -> list[str]:
    switch = "--temporal" if temporal else "--no-temporal"
    return [f"--history-encoder={encoder}", f"--interaction={interaction}", switch, "--num-experts=3"]


@pytest.mark.parametrize(("encoder", "interaction", "temporal"), SPACE)
def test_every_combination_trains_and_evaluates(
    data: Path, tmp_path: Path, encoder: str, interaction: str, temporal: bool
) -> None:
    epochs = 2 if temporal else 8
    args = [*flags(encoder, interaction, temporal), f"--epochs={epochs}", "--patience=0", "--workers=0"]
    train_run(data, tmp_path / "run", *args)
    config = RunConfig.load(tmp_path / "run")
    assert (config.model.history_encoder, config.model.interaction) == (encoder, interaction)
    assert config.reader.temporal == temporal
    curve = list(losses(tmp_path / "run").values())
    assert np.mean(curve[-3:]) < np.mean(curve[:3])
    opened = open_recommender(tmp_path / "run", data)
    exclusions = Exclusions.of(opened.data)
    events, _ = scored_events(opened.data, "validation", exclusions)
    tasks = results(score(opened.data, events, exclusions, opened, baselines=False))["tasks"]
    for task in ("next_contact", "new_link"):
        assert 0 < tasks[task]["live"]["recall@10"] <= 1
    names = {name for name, _ in opened.model.named_parameters()}
    assert ("history.layers.0.query_key_value.weight" in names) == (encoder == "transformer")
    assert ("query_tower.interaction.gate.weight" in names) == (interaction == "moe")


@pytest.mark.parametrize("top_k", [0, 2])
def test_the_use_of_the_experts_is_logged(data: Path, tmp_path: Path, top_k: int) -> None:
    args = ("--interaction=moe", "--num-experts=3", f"--gate-top-k={top_k}", "--epochs=1", "--workers=0")
    train_run(data, tmp_path, *args)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    experts = [line["experts"] for line in lines if "loss" in line]
    assert len(experts) > 5
    for scalars in experts:
        assert sum(scalars[f"share_{e}"] for e in range(3)) == pytest.approx(1.0, abs=1e-5)
        assert 0 < scalars["entropy"] <= 1 + 1e-6
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"experts/share_0", "experts/share_2", "experts/entropy"} <= set(board.Tags()["scalars"])
    shown = [event.value for event in board.Scalars("experts/entropy")]
    assert shown == pytest.approx([scalars["entropy"] for scalars in experts], abs=1e-6)


def test_the_preset_two_tower_moe_is_a_transformer_and_a_mixture() -> None:
    assert list(PRESETS) == ["two_tower_mlp", "two_tower_moe", "two_tower_clusters", "stu"]
    ours, plain = preset("two_tower_moe"), preset("two_tower_mlp")
    assert (ours.model.history_encoder, ours.model.interaction) == ("transformer", "moe")
    assert (plain.model.history_encoder, plain.model.interaction) == ("pooled_attention", "mlp")
    assert ours.reader == plain.reader


def test_the_preset_two_tower_clusters_is_two_tower_moe_with_one_field_changed() -> None:
    ours, base = preset("two_tower_clusters"), preset("two_tower_moe")
    assert (ours.model.clusters, base.model.clusters) == ("residual", "off")
    assert replace(ours, preset=base.preset, model=replace(ours.model, clusters="off")) == base


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--num-layers=12", "num_layers 12 is not below context_length 12"),
        ("--gate-top-k=5", "gate_top_k 5 must be between 0 and num_experts 4"),
        ("--interaction=mlp --gate-top-k=1", "gate_top_k 1 must come with --interaction moe"),
        ("--negatives=in_batch", "in_batch draws no uniform_negatives"),  # SMALL gives counts of every source
        ("--balance-loss=-1", "balance_loss -1.0 must not be negative"),
    ],
)
def test_what_contradicts_itself_is_refused_with_one_line(argument: str, said: str) -> None:
    with pytest.raises(FriendrecError, match=said):
        train.parse(["two_tower_moe", "--data=data", "--out=out", *SMALL, *argument.split()])


def test_a_source_of_negatives_is_chosen_by_name() -> None:
    chosen: Any = train.parse(["two_tower_moe", "--data=d", "--out=o", "--negatives=popularity", "--no-logq"])
    assert chosen.config.reader.negatives == "popularity"
    assert not chosen.config.reader.logq
    assert chosen.config.reader.negative_counts.popularity == 128
