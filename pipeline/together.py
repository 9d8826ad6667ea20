"""What many ranks do as one: rank 0 speaks for all, and they publish into one attempt, which rank 0 makes whole."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from friendrec.errors import FriendrecError
from friendrec.pipeline.publish import publish


def is_rank_zero() -> bool:
    """Whether this process speaks for all; told before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line to the person, from rank 0."""
    if is_rank_zero():
        print(text, flush=True)


@contextmanager
def publish_together(
    out: str, *, kind: str, options: object, inputs: Mapping[str, str | Path], extra: Mapping[str, Any]
) -> Iterator[Path]:
    """The attempt directory, the same on every rank of the default process group; it becomes `out` after the last.

    What stops rank 0 from making it stops all.
    """
    import torch.distributed as dist

    with ExitStack() as stack:
        news: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                news = [stack.enter_context(publish(out, kind=kind, options=options, inputs=inputs, extra=extra))]
            except FriendrecError as error:  # the others wait and must hear of it
                news = [error]
        dist.broadcast_object_list(news)
        if isinstance(news[0], FriendrecError):
            raise news[0]
        yield news[0]
        dist.barrier()
