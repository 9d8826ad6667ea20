"""The concept repository's own protocol, so that its published table can be compared like for like. It leaks.

Examples are prefixes of the same sequences, split at random: what is tested was seen in training. *Accuracy* is told
among a row's own target and three random users only, and the batch decides the rank. No claim rests on these figures.

    scores [B, B + 3]     targets of the batch    drawn       accuracy of row 0 looks at its own target, its
    row 0, target 7       7    4    7    2        5  1  7     duplicate and 5, 1; its rank counts all seven scores
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.prepared import OUT, PreparedData

BATCH, DRAWN = 32, 3
LABEL = "leaky"
Score = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""From examples `[B]` (places in a list of them) and candidates `[B, C]` (users) to scores `[B, C]`."""


class Split(NamedTuple):
    """Places of examples, in random order."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def prefixes(data: PreparedData) -> NDArray[np.int64]:
    """Entries of the prepared data that are an example's target, `[T]`, actor by actor in order of time.

    They are the out events of every actor but the first.
    """
    out = np.flatnonzero(data.direction == OUT)
    actor = np.searchsorted(data.offsets, out, side="right") - 1
    return out[np.flatnonzero(np.diff(actor, prepend=-1) == 0)]


def random_split(num_examples: int, seed: int) -> Split:
    """A random 80 %, 10 % and the rest, as `torch.utils.data.random_split` draws them."""
    import torch

    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed)).numpy()
    return Split(*np.split(order, [int(0.8 * num_examples), int(0.8 * num_examples) + int(0.1 * num_examples)]))


def temporal_split(data: PreparedData, entries: NDArray[np.int64]) -> Split:
    """The same shares of the examples with those `entries` `[T]`, cut by time: what the random split hides."""
    event = np.empty(len(data.direction), np.int64)
    event[data.event_entry] = np.arange(data.num_events)
    order = np.argsort(event[entries])
    return Split(*np.split(order, [int(0.8 * len(order)), int(0.8 * len(order)) + int(0.1 * len(order))]))


def history_steps(actor: NDArray[np.int64], train: NDArray[np.int64]) -> NDArray[np.int64]:
    """Examples that lie inside a train example's sequence or are one, ascending; `actor` `[T]` is sorted.

    The concept repository's training predicts every step of each training history, whatever the split says of it:
    a test example is among them wherever the actor's train examples hold a later one.
    """
    last = np.full(actor.max(initial=-1) + 1, -1)
    np.maximum.at(last, actor[train], train)
    return np.flatnonzero(np.arange(len(actor)) <= last[actor])


def reference_metrics(
    score: Score, examples: NDArray[np.int64], targets: NDArray[np.int64], num_users: int, seed: int
) -> dict[str, float]:
    """Accuracy, MRR and mean rank over `examples` `[T]`, whose targets `[T]` are users, in batches in order."""
    rng = np.random.default_rng(seed)
    figures = []
    for begin in range(0, len(examples), BATCH):
        batch = slice(begin, begin + BATCH)
        drawn = rng.integers(num_users, size=(len(examples[batch]), DRAWN))
        scores = score(examples[batch], candidates(targets[batch], drawn))
        figures.append(batch_metrics(scores, targets[batch], drawn))
    accuracy, mrr, mean_rank = np.mean(figures, axis=0)
    return {"accuracy": float(accuracy), "mrr": float(mrr), "mean_rank": float(mean_rank)}


def candidates(targets: NDArray[np.int64], drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whom each row is scored against: the targets of its batch, then its own drawn users, `[B, B + DRAWN]`."""
    return np.concatenate([np.tile(targets, (len(targets), 1)), drawn], axis=1)


def batch_metrics(
    scores: NDArray[np.float32], targets: NDArray[np.int64], drawn: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Accuracy, MRR and mean rank of a batch: scores `[B, B + DRAWN]` of its targets `[B]` and the drawn `[B, DRAWN]`.

    Accuracy removes the batch targets that differ from the row's own, and drawn users that do not. A rank is the number
    of all scores that are at least the row's own.
    """
    own = np.diagonal(scores)[:, None]
    is_other = drawn != targets[:, None]
    rivals = np.where(is_other, scores[:, len(targets) :], -np.inf)
    ranks = (scores >= own).sum(axis=1)
    return float((own >= rivals).all(axis=1).mean()), float((1 / ranks).mean()), float(ranks.mean())
