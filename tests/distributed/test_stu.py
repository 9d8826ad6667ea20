"""Preset stu on several processes: the same losses, the same validation, tables in shards, checkpoints that fit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from friendrec.pipeline import job
from friendrec.pipeline.config import RunConfig
from friendrec.sharding.parallel import local_shards, sharded_tables
from tests.tokens import SIZES, publish_random_tokens
from tests.training import joined, losses, publish_data, recorded, train_stu_run

from .harness import Workers

WORLD_SIZES = (1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("stu") / "data")


@pytest.fixture(scope="module")
def tokens(data: Path) -> Path:
    return publish_random_tokens(data, data.parent / "tokens")


@pytest.fixture(scope="module")
def runs(workers: Workers, data: Path, tokens: Path) -> dict[int, Path]:
    """The same run by world size."""
    runs = {world_size: data.parent / f"run-{world_size}" for world_size in WORLD_SIZES}
    for world_size, out in runs.items():
        workers.run(world_size, train_stu_run, data, tokens, out, "--epochs=2", "--patience=0")
    return runs


def test_ten_losses_agree_at_every_world_size(runs: dict[int, Path]) -> None:
    first = {world_size: [losses(run)[step] for step in range(1, 11)] for world_size, run in runs.items()}
    assert first[1][0] != first[1][9]
    assert first[2] == pytest.approx(first[1], abs=1e-4)


def test_levels_are_told_apart_wherever_their_tables_lie(
    workers: Workers, data: Path, tokens: Path, runs: dict[int, Path], tmp_path: Path
) -> None:
    """TorchRec gives vectors in the order of shardings and ranks, not of levels."""
    laid_out = "--table-sharding", "stu_1", "table_wise"  # then comes level 2 before it
    workers.run(1, train_stu_run, data, tokens, tmp_path / "run", "--epochs=2", "--patience=0", *laid_out)
    for step in range(1, 11):
        assert losses(tmp_path / "run")[step] == pytest.approx(losses(runs[1])[step], abs=1e-4)


def look(data: Path, tokens: Path, run: Path) -> tuple[type, dict[str, list[int]], dict[str, Any]]:
    """Kind of the sharded module, rows of each token table here, and the metrics of validation."""
    with joined(), job.start(RunConfig.load(run), data, run, None, str(tokens)) as running:
        running.restore()
        tables = sharded_tables(running.model)
        assert "user" not in tables.embedding_bags
        shards = {name: [len(part.values) for part in local_shards(running.model, name)] for name in ("stu_0", "stu_1")}
        return type(tables), shards, running.validate()


def test_tables_are_sharded_and_validation_agrees_at_every_world_size(
    workers: Workers, data: Path, tokens: Path, runs: dict[int, Path], tmp_path: Path
) -> None:
    metrics = []
    for world_size in WORLD_SIZES:
        copy = shutil.copytree(runs[2], tmp_path / str(world_size))
        looks = workers.run(world_size, look, data, tokens, copy)
        assert {kind for kind, *_ in looks} == {ShardedEmbeddingBagCollection}
        for level, rows in ((0, SIZES[0] + 1), (1, SIZES[1])):
            parts = [sum(shards[f"stu_{level}"]) for _, shards, _ in looks]
            assert sum(parts) == rows
            assert max(parts) == -(-rows // world_size)
        metrics += [found for *_, found in looks]
    assert metrics[0]["next_contact"]["recall@10"] > 0
    for found in metrics[1:]:
        for task, values in metrics[0].items():
            assert found[task] == pytest.approx(values, abs=1e-9)


def test_half_a_run_on_two_goes_on_with_one(
    workers: Workers, data: Path, tokens: Path, runs: dict[int, Path], tmp_path: Path
) -> None:
    """From the checkpoint of the first epoch, the losses of the second and the figures are the whole run's."""
    whole = recorded(runs[2])
    halfway = max(losses(runs[2])) // 2
    half = tmp_path / "half"
    shutil.copytree(runs[2], half)
    (half / "manifest.json").unlink()
    for checkpoint in (half / "checkpoints").iterdir():
        if checkpoint.name != f"step-{halfway}":
            shutil.rmtree(checkpoint)
    workers.run(1, train_stu_run, data, tokens, half, "--epochs=2", "--patience=0", "--resume")
    resumed = recorded(half)
    assert resumed.keys() == whole.keys()
    for step, found in resumed.items():
        if step > 0:
            assert found == pytest.approx(whole[step], abs=1e-4 if step <= halfway + 10 else 1e-2)
