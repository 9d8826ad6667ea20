"""Training with the real model, reader and optimizers: the same at any world size, and no rank holds a user table."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from friendrec.datasets.packing import Packer
from friendrec.datasets.prepared import OUT, PreparedData, load_prepared
from friendrec.pipeline import inference, job, train
from friendrec.pipeline.build import build_model
from friendrec.pipeline.config import RunConfig
from friendrec.pipeline.evaluation.metrics import summary
from friendrec.pipeline.evaluation.tasks import Exclusions, scored_events
from friendrec.pipeline.inference import encode_queries, encode_targets, open_run
from friendrec.pipeline.publish import open_published
from friendrec.sharding.checkpoint import load_whole
from friendrec.sharding.parallel import local_shards, sharded_tables
from tests.training import SMALL, export_run, joined, losses, publish_data, train_run

from .harness import Workers, heights

WORLD_SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("train") / "data")


@pytest.fixture(scope="module")
def run(workers: Workers, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "run"
    workers.run(2, train_run, data, out, "--epochs=2", "--patience=0")
    return out


ROUTED = ("--history-encoder=transformer", "--interaction=moe", "--gate-top-k=1", "--balance-loss=0.5")


@pytest.mark.parametrize(("order", "model"), [("user", ()), ("time", ()), ("user", ROUTED)])
def test_ten_losses_agree_at_every_world_size(
    workers: Workers, data: Path, tmp_path: Path, order: str, model: tuple[str, ...]
) -> None:
    by_size = {}
    for world_size in WORLD_SIZES:
        args = (f"--order={order}", "--epochs=1", "--action-dropout=0.5", "--actor-dropout=0.2", *model)
        workers.run(world_size, train_run, data, tmp_path / str(world_size), *args)
        by_size[world_size] = [losses(tmp_path / str(world_size))[step] for step in range(1, 11)]
    assert by_size[1][0] != by_size[1][9]
    for world_size in WORLD_SIZES:
        assert by_size[world_size] == pytest.approx(by_size[1], abs=1e-4)


def validate_again(data: Path, run: Path) -> dict[str, dict[str, float]]:
    config = RunConfig.load(run)
    with joined(), job.start(config, data, run) as running:
        running.restore()
        return running.validate()


def test_validation_agrees_at_every_world_size_and_with_brute_force(
    workers: Workers, data: Path, run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    expected = brute_force(data, run)
    assert set(expected) == {"next_contact", "new_link"}
    assert expected["next_contact"]["recall@10"] > 0
    for world_size in WORLD_SIZES:
        for metrics in workers.run(world_size, validate_again, data, copy):
            for task, values in expected.items():
                assert metrics[task] == pytest.approx(values, abs=1e-9)


def brute_force(data_path: Path, run: Path) -> dict[str, dict[str, float]]:
    """Every candidate's score in one matrix, and ranks by their definition; the newest checkpoint."""
    data, config = load_prepared(data_path), RunConfig.load(run)
    packer = Packer(data, config.context)
    model = build_model(config, packer.tables)
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    load_whole(newest, model)
    model.eval()
    events, _ = scored_events(data, "validation", Exclusions.of(data))
    chosen = np.linspace(0, len(events.index) - 1, config.training.validation_events).astype(int)
    events = events.take(chosen)
    queries = encode_queries(model, packer, events.actor, events.timestamp)
    scores = queries.vector @ encode_targets(model, packer, np.arange(data.num_train_users)).T
    ranks: dict[str, list[float]] = {"next_contact": [], "new_link": []}
    for row, (actor, target, time) in enumerate(zip(events.actor, events.target, events.timestamp, strict=True)):
        named = slice(*queries.sparse_offsets[row : row + 2])
        scores[row, queries.sparse_ids[named]] += queries.sparse_bonus[named]
        contacted, blocked = met_before(data, actor, time)
        for task in ranks:
            hidden = {actor} | blocked | (contacted if task == "new_link" else set())
            if task == "new_link" and target in contacted:
                continue
            allowed = np.array([v not in hidden and v != target for v in range(data.num_train_users)])
            others = scores[row][allowed]
            ranks[task].append(1 + (others > scores[row, target]).sum() + (others == scores[row, target]).sum() / 2)
    return {task: summary(np.array(values)) for task, values in ranks.items()}


def met_before(data: PreparedData, user: int, time: int) -> tuple[set[int], set[int]]:
    """Whom a user had contacted, and who was blocked either way, strictly before a time."""
    import pyarrow.parquet as pq

    own = slice(*data.offsets[user : user + 2])
    seen = (data.timestamp[own] < time) & (data.direction[own] == OUT)
    blocks = pq.read_table(data.path / "exclusions").to_pylist()
    before = [block for block in blocks if block["timestamp"] < time and user in (block["actor"], block["target"])]
    blocked = {block["target"] if block["actor"] == user else block["actor"] for block in before}
    return set(data.partner[own][seen].tolist()), blocked


class Tallest(TorchDispatchMode):
    """Rows of the tallest two-dimensional tensor that any operation made, and which operation."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: tuple[int, str] = (0, "")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2 and tensor.device.type != "meta":
                self.rows = max(self.rows, (tensor.shape[0], str(function)))
        return result


def tallest_while_training(data: Path, out: Path) -> tuple[type, int, tuple[int, str], int]:
    """Kind of the sharded module, rows of the user table here, the tallest tensor of all and of those that stay."""
    args = ("--max-minutes=0.001", "--epochs=1")
    options = train.parse(["two_tower_mlp", f"--data={data}", f"--out={out}", *SMALL, *args])
    with joined(), patch.object(inference, "BLOCK", 64), Tallest() as made, job.start(options.config, data, out) as own:
        progress = train.fit(own, own.restore())
        assert 1 < progress.step < own.reader.steps
        if own.rank == 0:
            train._publish(own, progress, options)
        rows = len(local_shards(own.model, "user")[0].values)
        return type(sharded_tables(own.model)), rows, made.rows, max(heights())


def tallest_while_exporting(data: Path, run: Path, out: Path) -> tuple[int, str]:
    with patch.object(inference, "BLOCK", 64), Tallest() as made:
        export_run(run=str(run), data=str(data), out=str(out))
        return made.rows


def test_no_rank_holds_the_whole_user_table(workers: Workers, tmp_path: Path) -> None:
    data = publish_data(tmp_path / "data", users=5000, events=12000)
    num_users = load_prepared(data).num_train_users
    half = -(-(num_users + 1) // 2)
    trained = workers.run(2, tallest_while_training, data, tmp_path / "run")
    assert [rows for _, rows, *_ in trained] == [half, num_users + 1 - half]
    for kind, rows, made, held in trained:
        assert kind is ShardedEmbeddingBagCollection
        assert rows <= made[0] < num_users, made
        assert held < num_users
    for made in workers.run(2, tallest_while_exporting, data, tmp_path / "run", tmp_path / "embeddings"):
        assert half - 1 <= made[0] < num_users, made


def test_the_run_names_a_checkpoint_that_exists(data: Path, run: Path) -> None:
    _, manifest = open_published(run, "run", verify=True)
    _, _, best = open_run(run, data)
    assert best.is_dir()
    assert manifest.extra["world_size"] == 2
    assert manifest.extra["examples_per_second"] > 0
    assert manifest.extra["progress"]["done"]


def scripted(recalls: list[float]) -> Any:
    """Validation that answers these, one call after the other."""
    answers = iter(recalls)
    return patch.object(job.Job, "validate", lambda _: {"new_link": {"recall@10": next(answers)}})


@pytest.mark.parametrize(
    ("recalls", "patience", "best", "last"),
    [([0.1, 0.3, 0.3, 0.2, 0.9], 2, 2, 4), ([0.3, 0.2, 0.9, 0.9, 0.9], 1, 1, 2), ([0.3, 0.2, 0.1, 0.4, 0.0], 0, 4, 5)],
)
def test_early_stopping_keeps_the_best(
    data: Path, tmp_path: Path, recalls: list[float], patience: int, best: int, last: int
) -> None:
    with scripted(recalls):
        train_run(data, tmp_path / "run", "--epochs=5", f"--patience={patience}", "--workers=0")
    _, manifest = open_published(tmp_path / "run", "run")
    steps = manifest.extra["progress"]["step"] // last
    assert manifest.extra["progress"]["epoch"] == last
    assert manifest.extra["checkpoint"] == f"checkpoints/step-{best * steps}"
    load_whole(tmp_path / "run" / manifest.extra["checkpoint"], model_of(data, tmp_path / "run"))


def model_of(data: Path, run: Path) -> torch.nn.Module:
    config = RunConfig.load(run)
    return build_model(config, Packer(load_prepared(data), config.context).tables)


def test_the_time_limit_ends_training_and_publishes(data: Path, tmp_path: Path) -> None:
    train_run(data, tmp_path / "run", "--epochs=1000", "--max-minutes=0.0001", "--workers=0")
    _, manifest = open_published(tmp_path / "run", "run")
    assert manifest.extra["progress"]["step"] == 2
    assert manifest.extra["checkpoint"] == "checkpoints/step-2"
