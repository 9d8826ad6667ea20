"""What is known of a user at once, when it first appears, read from prepared data; and codes for newcomers from that.

Only events that share a user's first timestamp count. So a code knows no more than any later event may, and stays the
same however long the log goes on.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.models.newcomers import Bags, FirstEvents, Regression, fit_newcomers
from friendrec.models.tokenizer import Vectors


def vectors_of_newcomers(data: PreparedData, vectors: Vectors) -> tuple[Vectors, Regression]:
    """Vectors of all users without a training row, in vocabulary order, by a regression on those who have one.

    `vectors` `[T, D]` are those of the T train users. Whom a newcomer met first may be a newcomer too: without a
    vector, it counts as nobody.
    """
    num_train = data.num_train_users
    regression = fit_newcomers(first_events(data, 0, num_train), vectors)
    return regression.predict(first_events(data, num_train, data.num_users), vectors), regression


def first_events(data: PreparedData, start: int, stop: int) -> FirstEvents:
    """First events and profiles of the users of rows start to stop."""
    begin, end = data.offsets[start:stop], data.offsets[start + 1 : stop + 1]
    counts = np.minimum(end - begin, 1)
    growing = np.flatnonzero(counts)
    while len(growing):
        entry = begin[growing] + counts[growing]
        growing, entry = growing[entry < end[growing]], entry[entry < end[growing]]
        growing = growing[data.timestamp[entry] == data.timestamp[begin[growing]]]
        counts[growing] += 1
    offsets = np.concatenate([[0], np.cumsum(counts)])
    entries = np.repeat(begin - offsets[:-1], counts) + np.arange(offsets[-1])
    kinds = data.direction[entries].astype(np.int64) * len(data.actions) + data.action[entries]
    partners = Bags(offsets, data.partner[entries].astype(np.int64))
    return FirstEvents(partners, kinds, 2 * len(data.actions), tuple(_profiles(data, start, stop)))


def _profiles(data: PreparedData, start: int, stop: int) -> Iterator[tuple[Bags, int]]:
    for name, size in data.profile_rows.items():
        offsets: NDArray[np.int64] = data.array(f"profile_{name}_offsets")[start : stop + 1]
        values = data.array(f"profile_{name}_values")[offsets[0] : offsets[-1]]
        yield Bags(offsets - offsets[0], values.astype(np.int64)), size
