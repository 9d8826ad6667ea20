"""The sharded model against the same model whole, at world sizes 1, 2 and 3 on real gloo processes."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from friendrec.sharding.config import OptimizerConfig, Sharding
from friendrec.sharding.parallel import column_shards, local_shards, sharded_tables
from friendrec.sharding.tables import initial_rows

from .harness import Workers, heights
from .toy import SEED, TABLES, USERS, Parts, all_parts, assembled, batch, sharded, train, whole

WORLD_SIZES = (1, 2, 3)
CONSTANT = OptimizerConfig(warmup_share=0, decay="constant", clip_norm=0.01)


SHARDINGS: list[tuple[Sharding, int]] = [
    *(("row_wise", world_size) for world_size in WORLD_SIZES),
    ("table_wise", 2),
    ("data_parallel", 1),
    ("data_parallel", 2),
    ("column_wise", 2),
    ("auto", 2),
]


def initial_state(sharding: Sharding) -> Parts:
    return all_parts(sharded(sharding=sharding)[0])


@pytest.mark.parametrize(("sharding", "world_size"), SHARDINGS)
def test_initial_rows_are_those_of_no_sharding(workers: Workers, sharding: Sharding, world_size: int) -> None:
    ranks = workers.run(world_size, initial_state, sharding)
    for table in TABLES:
        expected = initial_rows(SEED, table.name, range(table.rows), table.dim)
        assert torch.equal(assembled(ranks, table.name), expected)


def layout(sharding: Sharding) -> tuple[list[tuple[int, ...]], dict[str, int]]:
    dmp, _ = sharded(sharding=sharding)
    return [tuple(part.values.shape) for part in local_shards(dmp, "user")], column_shards(dmp)


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        ("row_wise", [[(51, 8)], [(50, 8)]]),
        ("table_wise", [[(101, 8)], []]),
        ("data_parallel", [[(101, 8)], [(101, 8)]]),
        ("column_wise", [[(101, 4)], [(101, 4)]]),
    ],
)
def test_the_user_table_lies_where_it_was_asked_to(
    workers: Workers, sharding: Sharding, expected: list[list[tuple[int, int]]]
) -> None:
    answers = workers.run(2, layout, sharding)
    assert sorted(parts for parts, _ in answers) == sorted(expected)
    assert [columns for _, columns in answers] == [{"user": 2} if sharding == "column_wise" else {}] * 2


def one_step(sharding: Sharding) -> tuple[Tensor, Parts, dict[str, Tensor], float]:
    dmp, optimizers = sharded(CONSTANT, sharding=sharding)
    optimizers.start_step(0, 1)
    loss, metrics = dmp(batch(0, dist.get_rank(), dist.get_world_size()))
    loss.backward()
    norm = optimizers.finish_step()
    return metrics["logits"], all_parts(dmp), {n: p.detach() for n, p in optimizers.dense.params.items()}, norm


@pytest.mark.parametrize(("sharding", "world_size"), SHARDINGS)
def test_forward_and_step_equal_the_whole_model(workers: Workers, sharding: Sharding, world_size: int) -> None:
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

    answers = workers.run(world_size, one_step, sharding)

    logits = torch.cat([logits for logits, *_ in answers])
    torch.testing.assert_close(logits, metrics["logits"], rtol=0, atol=1e-6)
    for name, weight in tables.items():
        assert weight.grad is not None
        width = 4 if (sharding, name) == ("column_wise", "user") else 8  # of a shard, which has its own momentum
        stepped = assembled([parts for _, parts, *_ in answers], name)
        torch.testing.assert_close(stepped, first_step(weight.detach(), weight.grad, width), rtol=0, atol=1e-6)
    for _, _, parameters, norm in answers:
        assert norm == pytest.approx(float(expected_norm), rel=1e-5)
        assert norm > CONSTANT.clip_norm  # so the step was a clipped one
        for name, expected in dense.items():
            torch.testing.assert_close(parameters[name], expected.detach(), rtol=0, atol=1e-6)


def first_step(weight: Tensor, gradient: Tensor, width: int) -> Tensor:
    """Row-wise Adagrad's first step on shards of so many columns."""
    parts = []
    for rows, slope in zip(weight.split(width, dim=1), gradient.split(width, dim=1), strict=True):
        momentum = slope.square().mean(1, keepdim=True)
        parts.append(rows - CONSTANT.table_learning_rate * slope / (momentum.sqrt() + 1e-8))
    return torch.cat(parts, dim=1)


def ten_losses(device: str, sharding: Sharding) -> list[float]:
    return train(*sharded(device=device, sharding=sharding), range(10))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ten_losses_agree_at_every_world_size(workers: Workers, device: str) -> None:
    losses = {world_size: workers.run(world_size, ten_losses, device, "row_wise") for world_size in WORLD_SIZES}
    for by_rank in losses.values():
        for rank in by_rank:
            assert rank == pytest.approx(losses[1][0], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["table_wise", "data_parallel", "auto"])
def test_ten_losses_agree_however_tables_are_spread(workers: Workers, sharding: Sharding) -> None:
    (expected,) = workers.run(1, ten_losses, "cpu", "row_wise")
    for world_size in WORLD_SIZES:
        for rank in workers.run(world_size, ten_losses, "cpu", sharding):
            assert rank == pytest.approx(expected, abs=1e-6)


def shape_of_the_user_table() -> tuple[type, int, set[int]]:
    dmp, optimizers = sharded()
    train(dmp, optimizers, range(2))
    return type(sharded_tables(dmp)), len(local_shards(dmp, "user")[0].values), heights()


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
    rows = local_shards(dmp, "user")[0].values
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
