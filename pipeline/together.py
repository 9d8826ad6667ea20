"""Publishing by many ranks: each writes its own files into one attempt, which rank 0 makes whole."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from friendrec.pipeline.publish import publish


@contextmanager
def publish_together(
    out: str, *, kind: str, options: object, inputs: Mapping[str, str | Path], extra: Mapping[str, Any]
) -> Iterator[Path]:
    """The attempt directory, the same on every rank of the default process group; it becomes `out` after the last."""
    with ExitStack() as stack:
        attempt: list[Any] = [None]
        if dist.get_rank() == 0:
            attempt = [stack.enter_context(publish(out, kind=kind, options=options, inputs=inputs, extra=extra))]
        dist.broadcast_object_list(attempt)
        yield attempt[0]
        dist.barrier()
