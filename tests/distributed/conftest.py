"""The gloo processes that all distributed tests share."""

from collections.abc import Iterator

import pytest

from .harness import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Three processes, started once: `workers.run(world_size, function, *args)` for world sizes 1, 2 and 3."""
    with Workers(3) as started:
        yield started
