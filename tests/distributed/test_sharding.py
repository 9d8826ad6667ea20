"""The sharded model against the same model whole, at world sizes 1, 2 and 3 on real gloo processes."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from friendrec.sharding.config import OptimizerConfig
from friendrec.sharding.parallel import local_rows, sharded_tables
from friendrec.sharding.tables import initial_rows

from .harness import Workers, heights
from .toy import SEED, TABLES, USERS, all_rows, batch, sharded, train, whole

WORLD_SIZES = (1, 2, 3)
CONSTANT = OptimizerConfig(warmup_share=0, decay="constant", clip_norm=0.01)


def together(shards: list[dict[str, tuple[int, Tensor]]], table: str) -> Tensor:
    """The whole table from what each rank holds of it."""
    parts = sorted((part[table] for part in shards if len(part[table][1])), key=lambda part: part[0])
    assert [first for first, _ in parts] == [sum(len(rows) for _, rows in parts[:i]) for i in range(len(parts))]
    return torch.cat([rows for _, rows in parts])


def initial_state() -> dict[str, tuple[int, Tensor]]:
    return all_rows(sharded()[0])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_initial_rows_are_those_of_no_sharding(workers: Workers, world_size: int) -> None:
    shards = workers.run(world_size, initial_state)
    for table in TABLES:
        expected = initial_rows(SEED, table.name, range(table.rows), table.dim)
        assert torch.equal(together(shards, table.name), expected)


def one_step() -> tuple[Tensor, dict[str, tuple[int, Tensor]], dict[str, Tensor], float]:
    dmp, optimizers = sharded(CONSTANT)
    optimizers.start_step(0, 1)
    loss, metrics = dmp(batch(0, dist.get_rank(), dist.get_world_size()))
    loss.backward()
    norm = optimizers.finish_step()
    return metrics["logits"], all_rows(dmp), {n: p.detach() for n, p in optimizers.dense.params.items()}, norm


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_forward_and_step_equal_the_whole_model(workers: Workers, world_size: int) -> None:
    model = whole()
    loss, metrics = model(batch(0))
    loss.backward()
    tables = {name.split(".")[-2]: p for name, p in model.named_parameters() if name.startswith("lookup")}
    dense = {name: p for name, p in model.named_parameters() if not name.startswith("lookup")}
    expected_norm = torch.nn.utils.clip_grad_norm_(dense.values(), CONSTANT.clip_norm)
    torch.optim.AdamW(
        [{"params": [p], "weight_decay": CONSTANT.weight_decay * (p.ndim > 1)} for p in dense.values()],
        lr=CONSTANT.dense_learning_rate,
    ).step()

    answers = workers.run(world_size, one_step)

    logits = torch.cat([logits for logits, *_ in answers])
    torch.testing.assert_close(logits, metrics["logits"], rtol=0, atol=1e-6)
    for name, weight in tables.items():
        assert weight.grad is not None
        momentum = weight.grad.square().mean(1, keepdim=True)  # row-wise Adagrad's first step
        expected = weight - CONSTANT.table_learning_rate * weight.grad / (momentum.sqrt() + 1e-8)
        stepped = together([shards for _, shards, *_ in answers], name)
        torch.testing.assert_close(stepped, expected.detach(), rtol=0, atol=1e-6)
    for _, _, parameters, norm in answers:
        assert norm == pytest.approx(float(expected_norm), rel=1e-5)
        assert norm > CONSTANT.clip_norm  # so the step was a clipped one
        for name, expected in dense.items():
            torch.testing.assert_close(parameters[name], expected.detach(), rtol=0, atol=1e-6)


def ten_losses(device: str) -> list[float]:
    return train(*sharded(device=device), range(10))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ten_losses_agree_at_every_world_size(workers: Workers, device: str) -> None:
    losses = {world_size: workers.run(world_size, ten_losses, device) for world_size in WORLD_SIZES}
    for by_rank in losses.values():
        for rank in by_rank:
            assert rank == pytest.approx(losses[1][0], abs=1e-4)


def shape_of_the_user_table() -> tuple[type, int, set[int]]:
    dmp, optimizers = sharded()
    train(dmp, optimizers, range(2))
    return type(sharded_tables(dmp)), len(local_rows(dmp, "user")[1]), heights()


def test_no_rank_holds_the_whole_user_table(workers: Workers) -> None:
    answers = workers.run(2, shape_of_the_user_table)
    assert [rows for _, rows, _ in answers] == [51, 50]
    for kind, rows, held in answers:
        assert kind is ShardedEmbeddingBagCollection
        assert rows in held
        assert USERS not in held


def change_at_rate_zero() -> tuple[float, float]:
    """Largest change of a user row over a step at rate 0, then over one at the peak."""
    dmp, optimizers = sharded(OptimizerConfig(decay="linear", warmup_share=0))
    _, rows = local_rows(dmp, "user")
    changes = []
    for step, total in ((10, 10), (0, 10)):
        before = rows.clone()
        train(dmp, optimizers, range(step, step + 1), total)
        changes.append(float((rows - before).abs().max()))
    return changes[0], changes[1]


def test_the_schedule_reaches_the_fused_tables(workers: Workers) -> None:
    for at_zero, at_peak in workers.run(2, change_at_rate_zero):
        assert at_zero == 0.0
        assert at_peak > 1e-3


def evaluate_unevenly(lengths: tuple[int, int]) -> Tensor:
    dmp, _ = sharded()
    mine = range(lengths[dist.get_rank()])
    one = torch.ones(len(mine), dtype=torch.int64)
    ids = KeyedJaggedTensor(
        keys=[table.name for table in TABLES],
        values=torch.cat([torch.tensor(mine, dtype=torch.int64), 0 * one, 0 * one]),
        lengths=one.repeat(len(TABLES)),
    )
    with torch.no_grad():
        return sharded_tables(dmp)(ids).wait()["user"]


@pytest.mark.parametrize("lengths", [(7, USERS), (5, 0)])
def test_evaluation_needs_no_equal_bags(workers: Workers, lengths: tuple[int, int]) -> None:
    table = initial_rows(SEED, "user", range(USERS), 8)
    for length, rows in zip(lengths, workers.run(2, evaluate_unevenly, lengths), strict=True):
        torch.testing.assert_close(rows, table[:length])
