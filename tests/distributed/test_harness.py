"""The harness itself: what a test hears when a rank fails, dies or hangs."""

import os

import pytest
import torch.distributed as dist

from .harness import Workers


def rank_and_size(tag: str) -> tuple[int, int, str]:
    dist.barrier()
    return dist.get_rank(), dist.get_world_size(), tag


def fail_on_rank_one(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "exit":
            os._exit(3)
        raise ValueError("boom")
    if how == "exit":
        dist.barrier()


@pytest.mark.parametrize(("how", "heard"), [("raise", "ValueError: boom"), ("exit", "exit code 3")])
def test_a_failing_rank_is_heard_and_the_next_call_works(workers: Workers, how: str, heard: str) -> None:
    with pytest.raises(AssertionError, match=heard):
        workers.run(2, fail_on_rank_one, how)
    assert workers.run(3, rank_and_size, "x") == [(0, 3, "x"), (1, 3, "x"), (2, 3, "x")]
