"""Vectors of users who came after training, from their first events and their profile: ridge regression.

    k(u) ≈ k̄ + (x(u) − x̄) W,   x(u) = [mean of k(v) over u's first partners v, of each kind of event;
                                        which kinds there are; profile codes, as shares of each bag]

fitted on users whose own vector was trained (closed form). A kind of event is a direction and an action.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from friendrec.models.tokenizer import Vectors

LAMBDAS = 10.0 ** np.arange(-5, 4)
"""Penalties λ tried, a user: the squared error of N users is penalised by N λ |W|²."""
LATE, LEAST = 0.2, 200
"""Share of the users that is fitted, those who came last, and their least number: their vectors are made of few events,
as newcomers' would be, and lie elsewhere than those of the first."""
BLOCK = 1 << 14
"""Users whose features lie in memory at a time."""


@dataclass(frozen=True)
class Bags:
    """A bag of values for each of N users: `values[offsets[i] : offsets[i + 1]]` are those of user i."""

    offsets: NDArray[np.int64]  # [N + 1]
    values: NDArray[np.int64]

    def rows(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """User of each value, counted from `start`, and the values, of users start to stop."""
        counts = np.diff(self.offsets[start : stop + 1])
        return np.repeat(np.arange(stop - start), counts), self.values[self.offsets[start] : self.offsets[stop]]


@dataclass(frozen=True)
class FirstEvents:
    """What is known of N users at once, when they first appear: events, and a profile."""

    partners: Bags
    """Row of each event's other user in the table of vectors; rows beyond it have no vector and count as nobody."""
    kinds: NDArray[np.int64]  # beside partners.values
    num_kinds: int
    profiles: Sequence[tuple[Bags, int]] = ()
    """Codes of each profile column, and how many codes it has."""

    def __len__(self) -> int:
        return len(self.partners.offsets) - 1

    def width(self, dim: int) -> int:
        """Components of the features where vectors have `dim`."""
        return self.num_kinds * (dim + 1) + sum(size for _, size in self.profiles)

    def features(self, vectors: Vectors, start: int, stop: int) -> NDArray[np.float64]:
        """x(u) `[stop - start, width]` of users start to stop."""
        num, dim = stop - start, vectors.shape[1]
        user, partner = self.partners.rows(start, stop)
        kind = self.kinds[self.partners.offsets[start] : self.partners.offsets[stop]]
        known = partner < len(vectors)
        place = (user * self.num_kinds + kind)[known]
        counts = np.bincount(place, minlength=num * self.num_kinds)
        means = np.zeros((num * self.num_kinds, dim))
        np.add.at(means, place, vectors[partner[known]])
        means /= np.maximum(counts, 1)[:, None]
        blocks = [means.reshape(num, -1), (counts > 0).reshape(num, -1)]
        for bags, size in self.profiles:
            owner, code = bags.rows(start, stop)
            shares = np.bincount(owner * size + code, minlength=num * size).reshape(num, size)
            blocks.append(shares / np.maximum(shares.sum(1, keepdims=True), 1))
        return np.concatenate(blocks, axis=1)


@dataclass(frozen=True)
class Regression:
    """Weights `[width, D]` with the means they go from; the λ chosen, and what it explains of users held out."""

    weights: NDArray[np.float64]
    mean_features: NDArray[np.float64]
    mean_vector: NDArray[np.float64]
    penalty: float
    explained: float
    """Share of the squared distance from the mean vector of the users before that is saved, of users held out."""

    def predict(self, events: FirstEvents, vectors: Vectors) -> Vectors:
        """Vectors `[N, D]` of the users of `events`; `vectors` are those of their partners."""
        found = [np.zeros((0, vectors.shape[1]))]
        for start in range(0, len(events), BLOCK):
            features = events.features(vectors, start, min(start + BLOCK, len(events)))
            found.append(self.mean_vector + (features - self.mean_features) @ self.weights)
        return np.concatenate(found).astype(np.float32)


def fit_newcomers(events: FirstEvents, vectors: Vectors) -> Regression:
    """Fit on the last of the users who have vectors; `events` are theirs in the same order, which is that of time.

    λ is the one of LAMBDAS that serves the later half of these best when the earlier half is fitted. Then both are.
    """
    num = len(vectors)
    start = max(0, num - max(int(LATE * num), LEAST))
    half = start + (num - start + 1) // 2
    early = _Moments.of(events, vectors, start, half)
    values, basis = np.linalg.eigh(early.covariance)
    features = (events.features(vectors, half, num) - early.mean_features) @ basis
    wanted, turned = vectors[half:] - early.mean_vector, basis.T @ early.cross_covariance
    left = [np.square(features @ (turned / (values + p)[:, None]) - wanted).sum() for p in early.num * LAMBDAS]
    best = int(np.argmin(left))
    total = np.square(vectors[half:] - vectors[:start].mean(axis=0)).sum() if start else np.square(wanted).sum()
    late = _Moments.of(events, vectors, start, num)
    ridge = late.covariance + late.num * LAMBDAS[best] * np.eye(len(values))
    weights = np.linalg.solve(ridge, late.cross_covariance)
    explained = float(1 - left[best] / total) if total else 0.0
    return Regression(weights, late.mean_features, late.mean_vector, float(LAMBDAS[best]), explained)


@dataclass(frozen=True)
class _Moments:
    """Sums over `num` users, of features and vectors around their means."""

    num: int
    mean_features: NDArray[np.float64]
    mean_vector: NDArray[np.float64]
    covariance: NDArray[np.float64]  # [width, width]
    cross_covariance: NDArray[np.float64]  # [width, D]

    @classmethod
    def of(cls, events: FirstEvents, vectors: Vectors, start: int, stop: int) -> "_Moments":
        """Of users start to stop, of whom there is at least one."""
        width, num = events.width(vectors.shape[1]), stop - start
        both = np.zeros((width, width + vectors.shape[1]))
        total = np.zeros(width + vectors.shape[1])
        for begin in range(start, stop, BLOCK):
            end = min(begin + BLOCK, stop)
            features = events.features(vectors, begin, end)
            beside = np.concatenate([features, vectors[begin:end]], axis=1)
            both += features.T @ beside
            total += beside.sum(axis=0)
        both -= np.outer(total[:width], total) / num
        mean = total / num
        return cls(num, mean[:width], mean[width:], both[:, :width], both[:, width:])
