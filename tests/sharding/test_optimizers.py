"""The schedule, and what an optimizer config refuses."""

import math

import pytest

from friendrec.errors import FriendrecError
from friendrec.sharding.config import OptimizerConfig
from friendrec.sharding.optimizers import schedule


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_schedule_rises_then_falls(decay: str) -> None:
    config = OptimizerConfig(warmup_share=0.25, decay=decay)  # type: ignore[arg-type]
    factors = [schedule(config, step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 25)
    assert factors[24] == factors[25] == 1.0
    assert factors[:25] == sorted(factors[:25])
    assert factors[25:] == sorted(factors[25:], reverse=True)
    assert factors[100] == pytest.approx(1.0 if decay == "constant" else 0.0)


def test_cosine_is_half_in_the_middle() -> None:
    assert schedule(OptimizerConfig(warmup_share=0), 50, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_still_learn(total: int) -> None:
    assert all(schedule(OptimizerConfig(), step, total) > 0 for step in range(total))


@pytest.mark.parametrize(
    "field",
    [
        {"table_learning_rate": -1.0},
        {"dense_learning_rate": math.nan},
        {"weight_decay": math.inf},
        {"warmup_share": 1.0},
        {"clip_norm": 0.0},
        {"clip_norm": math.nan},
        {"decay": "step"},
    ],
)
def test_bad_values_are_named(field: dict[str, object]) -> None:
    with pytest.raises(FriendrecError, match=next(iter(field))):
        OptimizerConfig(**field)  # type: ignore[arg-type]
