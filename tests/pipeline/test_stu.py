"""A run of preset stu from training to ranks: the search against brute force over all codes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from friendrec.datasets.config import ReaderConfig
from friendrec.datasets.packing import Packer, Tables
from friendrec.datasets.prepared import load_prepared
from friendrec.errors import FriendrecError
from friendrec.pipeline.build import build_model
from friendrec.pipeline.config import RunConfig, preset
from friendrec.pipeline.evaluation.scoring import recommender_ranks
from friendrec.pipeline.evaluation.tasks import LEVEL, scored_events
from friendrec.pipeline.inference import Recommender, open_recommender
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.retrieval.stu import StuIndex
from tests.tokens import SIZES, publish_random_tokens
from tests.training import publish_data, train_stu_run

NEWCOMERS = 5
Folder = dict[str, Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Data, and two runs whose tokens are gone."""
    root = tmp_path_factory.mktemp("stu")
    data = publish_data(root / "data")
    tokens = publish_random_tokens(data, root / "tokens", NEWCOMERS)
    train_stu_run(data, tokens, root / "run", "--epochs=2", "--patience=0", "--workers=0")
    train_stu_run(data, tokens, root / "plain", "--epochs=1", "--workers=0", "--no-copy-term", "--decoder=towers")
    shutil.rmtree(tokens)
    return {path.name: path for path in root.iterdir()}


def opened(folder: Folder, run: str = "run", width: int = 1000) -> Recommender:
    """Beams as wide as every level find the best of all."""
    recommender = open_recommender(folder[run], folder["data"])
    assert isinstance(recommender.retriever, StuIndex)
    return dataclasses.replace(recommender, retriever=dataclasses.replace(recommender.retriever, beam_width=width))


@torch.no_grad()
def brute_force(recommender: Recommender, actors: np.ndarray, times: np.ndarray) -> np.ndarray:
    """log P of the code of every train user, plus the bonus where it is named, `[Q, N]`."""
    queries, index = recommender.queries(actors, times), recommender.retriever
    assert isinstance(index, StuIndex) and index.decoder is not None
    cache = index.decoder.cache(torch.from_numpy(queries.vector))
    rows = torch.arange(len(actors))
    scores = np.zeros((len(actors), len(index)), np.float32)
    for user, code in enumerate(recommender.packer.codes.tokens[: len(index)].tolist()):  # type: ignore[union-attr]
        for level, token in enumerate(code):
            if token >= 0:
                prefix = torch.tensor(code[:level], dtype=torch.int64).expand(len(actors), -1)
                scores[:, user] += index.decoder.log_probabilities(cache, rows, prefix)[:, token].numpy()
    query = np.repeat(np.arange(len(actors)), np.diff(queries.sparse_offsets))
    scores[query, queries.sparse_ids] += queries.sparse_bonus
    return scores


@pytest.mark.parametrize("run", ["run", "plain"])
def test_ranks_are_those_of_all_codes_scored(folder: Folder, run: str) -> None:
    recommender = opened(folder, run)
    data, exclusions = recommender.data, recommender.exclusions
    events, _ = scored_events(data, "validation", exclusions)
    ranks = recommender_ranks(data, events, exclusions, recommender, "live")
    scores = brute_force(recommender, events.actor, events.timestamp)
    compared = 0
    for task, level in LEVEL.items():
        chosen = np.flatnonzero(events.of_task(task))
        offsets, hidden = exclusions.at(level, events.actor[chosen], events.timestamp[chosen])
        for q, event in enumerate(chosen):
            others = np.delete(scores[event], [*hidden[offsets[q] : offsets[q + 1]], events.target[event]])
            rank = 1 + (others > scores[event, events.target[event]]).sum()
            if np.isfinite(ranks[level, event]):
                assert abs(ranks[level, event] - rank) <= 1, "sums in another order may swap neighbours"
                compared += 1
            else:
                assert rank >= 100
    assert compared > 50


def test_a_run_opens_without_the_directory_of_its_tokens_and_holds_their_newcomers(folder: Folder) -> None:
    recommender = opened(folder)
    data, codes = recommender.data, recommender.packer.codes
    assert codes is not None and codes.sizes == SIZES
    assert len(codes.tokens) == data.num_train_users + NEWCOMERS < data.num_users
    assert len(recommender.retriever) == data.num_train_users
    ids, scores = recommender.recommend(np.arange(data.num_users), np.full(data.num_users, data.validation_until), 10)
    assert ids.max() < data.num_train_users
    assert np.isfinite(scores[ids >= 0]).all()


def test_a_newcomer_is_unknown_whatever_its_code(folder: Folder) -> None:
    recommender = opened(folder)
    data, codes = recommender.data, recommender.packer.codes
    assert codes is not None
    tokens = codes.tokens.copy()
    tokens[data.num_train_users :] = tokens[:NEWCOMERS]
    other = Packer(data, recommender.packer.config, dataclasses.replace(codes, tokens=tokens))
    users, times = np.arange(data.num_users), np.full(data.num_users, data.validation_until)
    found, expected = (
        dataclasses.replace(recommender, packer=packer).queries(users, times) for packer in (other, recommender.packer)
    )
    assert np.array_equal(found.vector, expected.vector)
    assert np.array_equal(found.sparse_bonus, expected.sparse_bonus)
    assert set(data.partner.tolist()) > set(range(data.num_train_users)), "newcomers are in histories"


def test_queries_name_contacts_where_the_copy_term_is_on(folder: Folder) -> None:
    for run, names in (("run", True), ("plain", False)):
        recommender = opened(folder, run)
        queries = recommender.queries(np.arange(30), np.full(30, recommender.data.train_until))
        assert (len(queries.sparse_ids) > 0) == names
        assert queries.sparse_bonus.any() == names


def test_the_log_tells_of_levels_and_of_whole_codes(folder: Folder) -> None:
    lines = [json.loads(line) for line in (folder["run"] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) > 10
    for line in steps:
        parts = [line[name] for name in ("level_0", "level_1", "level_2", "code")]
        assert all(0 <= part["accuracy"] <= 1 and part["loss"] >= 0 for part in parts)
        assert line["code"]["loss"] >= max(line["level_0"]["loss"], line["level_1"]["loss"])
    assert steps[-1]["code"]["loss"] < steps[0]["code"]["loss"]


def test_the_config_comes_back_as_the_class_of_its_preset(folder: Folder) -> None:
    for run, decoder in (("run", "transformer"), ("plain", "towers")):
        config = RunConfig.load(folder[run])
        assert type(config.model) is type(preset("stu").model)
        assert config.model.decoder == decoder  # type: ignore[union-attr]
    for name in ("two_tower_mlp", "two_tower_moe", "stu"):
        assert RunConfig.from_dict(json.loads(json.dumps(preset(name).to_dict()))) == preset(name)
    _, manifest = open_published(folder["run"], "run", verify=True)
    assert manifest.extra["sizes"] == list(SIZES)
    assert set(manifest.inputs) == {"data", "tokens"}


def test_negatives_are_for_two_towers_alone() -> None:
    with pytest.raises(FriendrecError, match="two towers need some"):
        RunConfig(preset="two_tower_mlp", reader=ReaderConfig(negatives="none"))
    with pytest.raises(FriendrecError, match="tokens none"):
        dataclasses.replace(preset("stu"), reader=ReaderConfig())
    with pytest.raises(FriendrecError, match="draws no uniform_negatives"):
        ReaderConfig(negatives="none", uniform_negatives=3)


def test_a_million_users_take_five_per_cent_of_an_id_table(folder: Folder) -> None:
    """At the preset's defaults, everything that learns included; the number of users is nowhere in it."""
    config = preset("stu")
    model = build_model(config, Tables.of(load_prepared(folder["data"]), (256, 256, 256)))
    learned = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert learned <= 0.05 * 4 * 1_000_000 * config.model.dim
