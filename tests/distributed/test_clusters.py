"""Clusters while a model trains: placed, revived, counted and exported alike on any number of processes."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from friendrec.datasets.packing import Packer
from friendrec.datasets.prepared import load_prepared
from friendrec.pipeline import clustering, inference, job, train
from friendrec.pipeline.build import build_model
from friendrec.pipeline.clustering import FIRST_ACCUMULATOR, TABLE, ClusterTraining
from friendrec.pipeline.config import RunConfig
from friendrec.pipeline.embeddings import read_centroids
from friendrec.pipeline.inference import centroids_of, encode_targets, open_run
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.retrieval.centroids import Centroids, hierarchical_k_means, refitted
from friendrec.sharding.checkpoint import load_whole
from friendrec.sharding.parallel import local_shards, whole_table
from tests.training import SMALL, at_step, export_run, joined, kill, losses, publish_data, recorded, train_run

from .harness import Workers
from .test_forward import train_overlapped
from .test_train import ROUTED, Tallest

CLUSTERS = ("--clusters=residual", "--epochs=2", "--patience=0", "--workers=0")
FIRST, LISTS = 4, 9  # a tenth of 40 steps warms up; 138 users train
SHARDINGS = [
    "data_parallel",
    "row_wise",
    *(pytest.param(s, marks=pytest.mark.long) for s in ("table_wise", "column_wise")),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("clusters") / "data")


@pytest.fixture(scope="module")
def runs(workers: Workers, data: Path) -> dict[int, Path]:
    """The same run by world size."""
    runs = {world_size: data.parent / f"run-{world_size}" for world_size in (1, 2)}
    for world_size, out in runs.items():
        workers.run(world_size, train_run, data, out, *CLUSTERS)
    return runs


def around_k_means(run: Path) -> list[float]:
    """Losses of the steps before it, and of ten after; the step that saw it first is the one numbered FIRST + 1."""
    return [losses(run)[step] for step in range(1, FIRST + 11)]


def test_losses_around_k_means_agree_at_world_sizes_1_and_2(runs: dict[int, Path]) -> None:
    """K-means is not continuous: here no user lies so near a border that the last bits would sort it elsewhere."""
    expected = around_k_means(runs[1])
    assert abs(expected[FIRST] - expected[FIRST - 1]) > 0.3  # the clusters' own losses have set in
    assert around_k_means(runs[2]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("--no-two-level",), ("--clusters=representation",), ROUTED])
def test_other_clusters_agree_at_every_world_size(
    workers: Workers, data: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    for world_size in (1, 2, 3):
        workers.run(world_size, train_run, data, tmp_path / str(world_size), *CLUSTERS, *options)
    for world_size in (2, 3):
        assert around_k_means(tmp_path / str(world_size)) == pytest.approx(around_k_means(tmp_path / "1"), abs=1e-4)


@pytest.mark.long
def test_the_pipeline_of_cuda_lets_k_means_look_up(
    workers: Workers, data: Path, runs: dict[int, Path], tmp_path: Path
) -> None:
    workers.run(2, train_overlapped, data, tmp_path / "run", *CLUSTERS)
    assert losses(tmp_path / "run") == pytest.approx(losses(runs[2]), abs=1e-6)


@pytest.mark.parametrize("sharding", ["row_wise", pytest.param("table_wise", marks=pytest.mark.long)])
def test_losses_do_not_depend_on_where_the_centroids_lie(
    workers: Workers, data: Path, runs: dict[int, Path], tmp_path: Path, sharding: str
) -> None:
    workers.run(2, train_run, data, tmp_path / "run", *CLUSTERS, "--table-sharding", "cluster", sharding)
    assert around_k_means(tmp_path / "run") == pytest.approx(around_k_means(runs[2]), abs=1e-5)
    plan = {entry["table"]: entry["sharding"] for entry in json.loads((tmp_path / "run" / "plan.json").read_text())}
    assert plan["cluster"] == sharding


LOAD = [0.0, 0.3, 0.1, 0.15, 0.15, 0.0, 0.3, 0.0, 0.0]
"""Of three cells: list 0 takes half of list 1, 5 of 3, 7 of 6, and 8 of what is left of 6."""
REVIVED = [0.15, 0.15, 0.1, 0.075, 0.15, 0.075, 0.075, 0.15, 0.075]


@contextmanager
def started(data: Path, out: Path, sharding: str) -> Iterator[tuple[job.Job, ClusterTraining, dict[str, np.ndarray]]]:
    """A job at its first step, and target vectors of all users."""
    args = (*CLUSTERS, "--table-sharding", "cluster", sharding)
    options = train.parse(["two_tower_mlp", f"--data={data}", f"--out={out}", *SMALL, *args])
    with joined(), job.start(options.config, data, out) as running:
        users = np.arange(running.reader.data.num_train_users)
        seen = {"users": encode_targets(running.model.module.eval(), running.reader.packer, users)}
        assert running.clusters is not None
        yield running, running.clusters, seen


def state_of(running: job.Job, when: str) -> dict[str, np.ndarray]:
    """Table and buffers; and which rows here have the state of new ones, which they lose by this look."""
    new = np.zeros(LISTS, bool)
    for part, sums in zip(local_shards(running.model, TABLE), running.optimizers.accumulators(TABLE), strict=True):
        new[part.first_row : part.first_row + len(sums)] = sums == FIRST_ACCUMULATOR
        sums.fill_(7.0)
    buffers = {f"{when} {name}": b.numpy().copy() for name, b in running.model.module.clustering.named_buffers()}
    return buffers | {f"{when} rows": whole_table(running.model, TABLE).numpy(), f"{when} new": new}


def alike(ranks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What all ranks saw; rows are new where some rank says so."""
    for name in ranks[0]:
        if name.endswith("new"):
            ranks[0][name] = np.any([rank[name] for rank in ranks], axis=0)
        else:
            for rank in ranks:
                np.testing.assert_array_equal(rank[name], ranks[0][name])
    return ranks[0]


def place_and_revive(data: Path, out: Path, sharding: str) -> dict[str, np.ndarray]:
    with started(data, out, sharding) as (running, clusters, seen):
        drawn = torch.get_rng_state()
        clusters.place()
        seen |= state_of(running, "placed")
        clusters.place()
        seen |= state_of(running, "again")
        clusters.clustering.load.copy_(torch.tensor(LOAD))
        assert [clusters.start_step(FIRST + step, 1000) for step in (0, 49, 51)] == [0, 0, 0]
        assert clusters.start_step(FIRST + 50, 1000) == 4
        assert torch.equal(torch.get_rng_state(), drawn)
        assert running.model.module.training
        return seen | state_of(running, "revived")


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_k_means_and_revival_wherever_the_table_lies(
    workers: Workers, data: Path, tmp_path: Path, sharding: str
) -> None:
    seen = alike(workers.run(2, place_and_revive, data, tmp_path / "run", sharding))
    users, old = seen["users"], seen["placed rows"]
    centroids = np.column_stack([old + seen["placed centre"], seen["placed bias"]])
    np.testing.assert_allclose(centroids, hierarchical_k_means(users, LISTS, 3).vectors, atol=1e-5)
    np.testing.assert_allclose(seen["placed load"], share_in_lists(users, centroids), atol=1e-6)
    np.testing.assert_allclose(seen["placed load"] @ old, 0, atol=1e-6)  # relative to the users' mean
    assert seen["placed ready"] == 1
    assert seen["placed new"].all()
    assert not seen["again new"].any()
    np.testing.assert_array_equal(seen["again rows"], old)

    new = seen["revived rows"]
    np.testing.assert_allclose(seen["revived load"], REVIVED, atol=1e-6)
    np.testing.assert_array_equal(new[[2, 4]], old[[2, 4]])
    np.testing.assert_allclose(new[[0, 5]] + new[[1, 3]], 2 * old[[1, 3]], atol=1e-6)
    np.testing.assert_allclose(new[6] + new[8], 2 * (2 * old[6] - new[7]), atol=1e-6)
    apart = np.linalg.norm(new[[0, 5, 7, 8]] - new[[1, 3, 6, 6]], axis=1)
    assert (apart > 1e-3).all()
    assert (apart < 0.5 * np.linalg.norm(old.std(0))).all()
    np.testing.assert_array_equal(seen["revived bias"][[0, 5, 7, 8]], seen["placed bias"][[1, 3, 6, 6]])
    assert np.flatnonzero(seen["revived new"]).tolist() == [0, 1, 3, 5, 6, 7, 8]


def share_in_lists(users: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    nearest = np.square(users[:, None] - centroids).sum(2).argmin(1)
    return np.bincount(nearest, minlength=len(centroids)) / len(users)


def settle(data: Path, out: Path, sharding: str) -> dict[str, np.ndarray]:
    """K-means; then list 4 is put where nobody is."""
    with started(data, out, sharding) as (running, clusters, seen):
        clusters.settle()
        seen |= state_of(running, "placed")
        for part in local_shards(running.model, TABLE):
            if 0 <= 4 - part.first_row < len(part.values):
                part.values[4 - part.first_row] = 100.0
        clusters.settle()
        return seen | state_of(running, "settled")


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_lists_are_evened_by_all_users(workers: Workers, data: Path, tmp_path: Path, sharding: str) -> None:
    """K-means goes on from where the centroids are; the one put where nobody is comes back among the users."""
    seen = alike(workers.run(2, settle, data, tmp_path / "run", sharding))
    users, centre = seen["users"], seen["placed centre"]
    before = np.column_stack([seen["placed rows"] + centre, seen["placed bias"]])
    before[4, :-1] = 100 + centre
    expected = refitted(users, before.astype(np.float32), 3)
    found = np.column_stack([seen["settled rows"] + centre, seen["settled bias"]])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(seen["settled load"], share_in_lists(users, found), atol=1e-6)
    assert seen["settled load"].min() > 0


def train_and_be_asked_to_stop(data: Path, out: Path, step: int) -> None:
    with at_step(step, lambda: kill(signal.SIGTERM) if os.environ["RANK"] == "0" else None), often():
        train_run(data, out, *CLUSTERS)


def train_with_revivals(data: Path, out: Path, *args: str) -> None:
    with often():
        train_run(data, out, *CLUSTERS, *args)


@contextmanager
def often() -> Iterator[None]:
    """Revivals of every list that is not half full, every third step."""
    with patch.object(clustering, "EVERY", 3), patch.object(clustering, "DEAD", 0.5):
        yield


@pytest.mark.parametrize(
    ("stopped", "world_size"),
    [pytest.param(*case, marks=pytest.mark.long) for case in ((FIRST, 2), (FIRST - 1, 1), (FIRST + 3, 2), (20, 1))],
)
def test_a_run_stopped_around_k_means_goes_on_as_if_it_had_not_been(
    workers: Workers, data: Path, tmp_path: Path, stopped: int, world_size: int
) -> None:
    workers.run(2, train_with_revivals, data, tmp_path / "whole")
    whole = open_published(tmp_path / "whole", "run")[1].extra["progress"]
    assert whole["revived"] > 0
    workers.run(2, train_and_be_asked_to_stop, data, tmp_path / "run", stopped - 1)
    assert max(recorded(tmp_path / "run")) == stopped
    workers.run(world_size, train_with_revivals, data, tmp_path / "run", "--resume")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6 if world_size == 2 else 1e-4)
    assert open_published(tmp_path / "run", "run")[1].extra["progress"]["revived"] == whole["revived"]


def test_what_is_published_has_its_centroids_though_time_was_up(workers: Workers, data: Path, tmp_path: Path) -> None:
    workers.run(1, train_run, data, tmp_path / "run", *CLUSTERS, "--max-minutes=0.0001")
    assert max(losses(tmp_path / "run")) < FIRST
    centroids, _ = opened(tmp_path / "run", data)
    assert len(centroids) == LISTS


def opened(run: Path, data: Path) -> tuple[Centroids, np.ndarray]:
    """Centroids of a run's best checkpoint, and target vectors of all users, in one process."""
    config, prepared, weights = open_run(run, data)
    packer = Packer(prepared, config.context, clusters=LISTS)
    model = build_model(config, packer.tables)
    load_whole(weights, model)
    centroids = centroids_of(model.eval(), packer)
    assert centroids is not None
    return centroids, encode_targets(model, packer, np.arange(prepared.num_train_users))


def call_export(options: dict[str, Any]) -> None:
    export_run(**options)


def test_ranks_export_the_centroids_of_the_run(
    workers: Workers, data: Path, runs: dict[int, Path], tmp_path: Path
) -> None:
    expected, _ = opened(runs[2], data)
    assert expected.cells == 3
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        workers.run(ranks, call_export, {"run": str(runs[2]), "data": str(data), "out": str(out)})
        found = read_centroids(out)
        assert found is not None
        assert found.cells == 3
        np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-6)
        assert open_published(out, "embeddings", verify=True)[1].extra["clusters"] == LISTS


def validate_again(data: Path, run: Path) -> dict[str, dict[str, float]]:
    with joined(), job.start(RunConfig.load(run), data, run) as running:
        running.restore()
        return running.validate()


def test_validation_counts_every_candidate_in_its_list(
    workers: Workers, data: Path, runs: dict[int, Path], tmp_path: Path
) -> None:
    centroids, users = opened(runs[2], data)
    best = open_published(runs[2], "run")[1].extra["progress"]["best_step"]
    nearest = np.square(users[:, None] - centroids.vectors).sum(2).argmin(1)
    counts = np.bincount(nearest, minlength=LISTS)
    share = counts[counts > 0] / len(users)
    expected = {
        "fullest": counts.max() * LISTS / len(users),
        "empty": (counts == 0).sum(),
        "entropy": -(share * np.log(share)).sum() / np.log(LISTS),
    }
    assert recorded(runs[2])[-best]["clusters"] == pytest.approx(expected)
    again = shutil.copytree(runs[2], tmp_path / "run")
    newest = recorded(runs[2])[-max(losses(runs[2]))]["clusters"]
    for metrics in workers.run(3, validate_again, data, again):
        assert metrics["clusters"] == pytest.approx(newest)


def tallest_while_training(data: Path, out: Path) -> tuple[int, str]:
    with patch.object(inference, "BLOCK", 64), Tallest() as made:
        train_run(data, out, *CLUSTERS, "--warmup-share=0.01", "--max-minutes=0.002")
        return made.rows


def test_k_means_holds_no_row_for_every_user(workers: Workers, tmp_path: Path) -> None:
    data = publish_data(tmp_path / "data", users=5000, events=12000)
    num_users = load_prepared(data).num_train_users
    assert num_users > clustering.SAMPLE * 64
    for rows, operation in workers.run(2, tallest_while_training, data, tmp_path / "run"):
        assert -(-num_users // 2) <= rows < num_users, operation
