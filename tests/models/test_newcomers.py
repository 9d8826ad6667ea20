"""The regression behind newcomers' vectors against plain loops and numpy's own solver."""

import numpy as np
from numpy.typing import NDArray

from friendrec.models.newcomers import Bags, FirstEvents, fit_newcomers
from friendrec.models.tokenizer import Vectors


def bags(rows: list[list[int]]) -> Bags:
    lengths = [len(row) for row in rows]
    values = np.array([value for row in rows for value in row], np.int64)
    return Bags(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values)


def random_events(num: int, partners: int, seed: int = 0) -> FirstEvents:
    """One to three events each, of four kinds, and one column of profiles."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, partners, rng.integers(1, 4)).tolist() for _ in range(num)]
    chosen = bags(rows)
    codes = bags([rng.choice(3, rng.integers(1, 3), replace=False).tolist() for _ in range(num)])
    return FirstEvents(chosen, rng.integers(0, 4, len(chosen.values)), 4, ((codes, 3),))


def features_by_hand(events: FirstEvents, vectors: Vectors) -> NDArray[np.float64]:
    rows = []
    for user in range(len(events)):
        begin, end = events.partners.offsets[user : user + 2]
        met = list(zip(events.partners.values[begin:end], events.kinds[begin:end], strict=True))
        means, there = [], []
        for kind in range(events.num_kinds):
            known = [vectors[p] for p, k in met if k == kind and p < len(vectors)]
            means += np.mean(known, axis=0).tolist() if known else [0.0] * vectors.shape[1]
            there.append(float(bool(known)))
        row = [*means, *there]
        for column, size in events.profiles:
            own = column.values[column.offsets[user] : column.offsets[user + 1]].tolist()
            row += [own.count(code) / len(own) for code in range(size)]
        rows.append(row)
    return np.array(rows)


def test_features_are_means_of_known_partners_by_kind_and_shares_of_profile_codes() -> None:
    vectors = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    events = FirstEvents(bags([[0, 1, 1], [7], []]), np.array([0, 0, 1, 1]), 2, ((bags([[2, 0], [1], [0]]), 3),))
    expected = [
        [2, 4, 3, 6, 1, 1, 0.5, 0, 0.5],
        [0, 0, 0, 0, 0, 0, 0, 1, 0],  # row 7 is a newcomer too: it has no vector, and counts as nobody
        [0, 0, 0, 0, 0, 0, 1, 0, 0],
    ]
    assert events.width(2) == 9
    np.testing.assert_allclose(events.features(vectors, 0, 3), expected)
    np.testing.assert_allclose(events.features(vectors, 1, 3), expected[1:])


def test_weights_solve_the_ridge_equations() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((200, 5)).astype(np.float32)
    events = random_events(200, 200)
    fitted = fit_newcomers(events, vectors)
    x = features_by_hand(events, vectors)
    # ridge with an intercept that is not penalised, as one least squares with rows of √(N λ) beneath
    design = np.concatenate([np.ones((200, 1)), x], axis=1)
    penalty = np.sqrt(200 * fitted.penalty) * np.eye(x.shape[1] + 1)[1:]
    beneath = np.zeros((x.shape[1], 5))
    solved = np.linalg.lstsq(np.concatenate([design, penalty]), np.concatenate([vectors, beneath]))[0]
    late = random_events(40, 260, seed=1)  # some met users without a vector
    found = fitted.predict(late, vectors)
    np.testing.assert_allclose(found, solved[0] + features_by_hand(late, vectors) @ solved[1:], atol=1e-4)


def test_what_follows_from_the_events_is_explained_and_chance_is_not() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1000, 5)).astype(np.float32)
    assert abs(fit_newcomers(random_events(1000, 1000), noise).explained) < 0.05
    events = FirstEvents(bags([[0]] * 1000), np.zeros(1000, np.int64), 1, ((bags([[i % 5] for i in range(1000)]), 5),))
    told = np.eye(5, dtype=np.float32)[np.arange(1000) % 5] @ noise[:5] + 0.1 * noise
    assert fit_newcomers(events, told).explained > 0.9


def test_nobody_to_predict_gives_nothing() -> None:
    vectors = np.ones((30, 4), np.float32)
    fitted = fit_newcomers(random_events(30, 30), vectors)
    assert fitted.predict(random_events(0, 1), vectors).shape == (0, 4)
    np.testing.assert_allclose(fitted.predict(random_events(3, 30), vectors), 1)
