"""TorchRec's pipeline against the plain loop on the real model, and bf16 against float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from friendrec.pipeline import forward, job, train
from tests.training import SMALL, joined, publish_data, recorded, train_run

from .harness import Workers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_data(tmp_path_factory.mktemp("forward") / "data", users=80, events=800)


def overlapped(loss_of: Any, tables: Any, batches: Any, device: torch.device, precision: str) -> Iterator[torch.Tensor]:
    return forward.overlapped(loss_of, tables, batches, device)


def train_overlapped(data: Path, out: Path, *args: str) -> None:
    """Training as on CUDA, on the CPU."""
    with patch.object(forward, "losses", overlapped):
        train_run(data, out, *args)


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [
        (1, "--sharding=row_wise"),
        (2, "--max-minutes=0.00001"),  # ends with two batches on their way
        pytest.param(2, "--sharding=row_wise", marks=pytest.mark.long),
        pytest.param(2, "--sharding=data_parallel", marks=pytest.mark.long),
    ],
)
def test_the_pipeline_trains_as_the_plain_loop_does(
    workers: Workers, data: Path, tmp_path: Path, world_size: int, extra: str
) -> None:
    """Two epochs, so that validation has looked up in its own way in between."""
    args = ("--epochs=2", "--patience=0", extra)
    workers.run(world_size, train_run, data, tmp_path / "plain", *args)
    workers.run(world_size, train_overlapped, data, tmp_path / "overlapped", *args)
    expected, found = recorded(tmp_path / "plain"), recorded(tmp_path / "overlapped")
    assert found.keys() == expected.keys()
    assert min(found) < 0 < max(found)
    for step, value in expected.items():
        if step < 0:
            for task in value:
                assert found[step][task] == pytest.approx(value[task], abs=1e-6)
        else:
            assert found[step] == pytest.approx(value, abs=1e-6)


def train_in(precision: str, data: Path, out: Path, preset: str) -> tuple[list[float], set[torch.dtype]]:
    """Losses of the first steps, and what the parameters are then."""
    arguments = [preset, f"--data={data}", f"--out={out}", *SMALL, f"--precision={precision}", "--workers=0"]
    options = train.parse(arguments)
    with joined(), job.start(options.config, data, out) as own:
        losses = []
        progress = own.restore()
        for loss in own.losses(progress, 20):
            assert loss.dtype == torch.float32
            loss.backward()
            own.optimizers.finish_step()
            progress.step += 1
            losses.append(float(loss))
        return losses, {p.dtype for p in own.model.parameters()}


@pytest.mark.parametrize("preset", ["two_tower_mlp", pytest.param("two_tower_moe", marks=pytest.mark.long)])
def test_bf16_rounds_the_towers_and_neither_weights_nor_loss(
    workers: Workers, data: Path, tmp_path: Path, preset: str
) -> None:
    ((expected, _),) = workers.run(1, train_in, "float32", data, tmp_path / "float32", preset)
    ((rounded, kinds),) = workers.run(1, train_in, "bf16", data, tmp_path / "bf16", preset)
    assert kinds == {torch.float32}
    assert len(rounded) > 10
    assert rounded != expected
    assert rounded == pytest.approx(expected, rel=0.02)
