"""The oracle says what the generator does: its probabilities against what happens when networks are grown anew."""

import numpy as np
import pytest
from scipy import stats

from friendrec.datasets.choices import forget, message_options, request_options, request_share
from friendrec.datasets.growth import NOBODY, decide, draw_stranger, grow
from friendrec.datasets.network import (
    ACCEPT,
    ACTIONS,
    BLOCK,
    MESSAGE,
    REQUEST,
    NetworkParameters,
    Population,
    empty_network,
    visit_rate,
)
from friendrec.datasets.oracle import Events, Oracle, read_truth
from friendrec.datasets.simulator import DEFAULTS, draw_population, simulate

LIVELY = DEFAULTS._replace(
    days=20.0, community_size=5.0, lapse_days=3.0, block_request=0.2, block_message=0.05, stay_days=0.1
)
"""A small network in which all that can happen does, within few events."""


def grown(population: Population, events: int, parameters: NetworkParameters, seed: int) -> Events:
    net, rate = empty_network(population, events), visit_rate(population, events, parameters)
    return Events(*grow(net, rate, parameters, np.random.default_rng(seed), events, np.zeros(1, np.int64)))


def predictions(
    population: Population, parameters: NetworkParameters, believed: NetworkParameters, runs: int
) -> list[tuple[Events, np.ndarray]]:
    """Networks grown anew among the same users, and P(action, target | actor, time, past) of each event `[n, A, U]`."""
    found = []
    for seed in range(runs):
        events = grown(population, 60, parameters, seed)
        oracle, probabilities = Oracle(population, events, believed), []
        for i in range(60):
            oracle.replay(i)
            rates = oracle.rates(events.actor[i], events.time[i])
            probabilities.append(rates / rates.sum())
        found.append((events, np.stack(probabilities)))
    return found


def cell_statistic(found: list[tuple[Events, np.ndarray]]) -> tuple[float, float]:
    """Chi-square of how often each (action, target) followed each (event before, actor), against its probabilities.

    Whatever is known of the past may sort events into cells: in each, what happens deviates from the sum of its
    probabilities by no more than their variance. Returns the mean square deviation and its p-value.
    """
    observed: dict[tuple[int, ...], float] = {}
    expected: dict[tuple[int, ...], float] = {}
    variance: dict[tuple[int, ...], float] = {}
    for events, probabilities in found:
        for i in range(1, len(events.time)):
            past = int(events.action[i - 1]), int(events.actor[i - 1] == events.actor[i]), int(events.actor[i])
            for action, target in np.argwhere(probabilities[i] > 0).tolist():
                cell, p = (*past, action, target), float(probabilities[i, action, target])
                observed[cell] = observed.get(cell, 0) + (events.action[i] == action and events.target[i] == target)
                expected[cell] = expected.get(cell, 0) + p
                variance[cell] = variance.get(cell, 0) + p * (1 - p)
    squares = [(observed[c] - expected[c]) ** 2 / variance[c] for c in observed if variance[c] > 5]
    assert len(squares) > 100
    return float(np.mean(squares)), float(stats.chi2.sf(np.sum(squares), len(squares)))


def surprise(found: list[tuple[Events, np.ndarray]]) -> float:
    """Log-likelihood of what happened less its expectation, in standard deviations: a martingale, so near 0."""
    gained = variance = 0.0
    for events, probabilities in found:
        for i, p in enumerate(probabilities):
            log_p = np.log(np.where(p > 0, p, 1))
            mean = (p * log_p).sum()
            gained += log_p[events.action[i], events.target[i]] - mean
            variance += (p * (log_p - mean) ** 2).sum()
    return float(gained / np.sqrt(variance))


@pytest.fixture(scope="module")
def population() -> Population:
    return draw_population(7, LIVELY, np.random.default_rng(3))


@pytest.fixture(scope="module")
def found(population: Population) -> list[tuple[Events, np.ndarray]]:
    return predictions(population, LIVELY, LIVELY, runs=400)


@pytest.mark.long
def test_what_happens_is_as_likely_as_the_oracle_says(found: list[tuple[Events, np.ndarray]]) -> None:
    happened = np.bincount(np.concatenate([events.action for events, _ in found]), minlength=len(ACTIONS))
    assert happened.min() > 300, "blocks too"
    mean_square, p_value = cell_statistic(found)
    assert p_value > 1e-3, mean_square
    assert abs(surprise(found)) < 3.3


@pytest.mark.long
@pytest.mark.parametrize(
    "wrong",
    [
        {"reply": 0.5}, {"greet": 0.65}, {"answer_days": 0.13}, {"stay": 0.4}, {"stay_days": 0.15}, {"newcomer": 5.0},
        {"accept_inside": 0.75}, {"accept_median": 0.8}, {"lapse_days": 2.0}, {"request": 0.55}, {"triadic": 0.4},
        {"scene": 0.25}, {"preferential": 0.5}, {"same_city": 2.0}, {"fresh": 1.0}, {"repeat": 0.4},
        {"block_request": 0.3}, {"block_message": 0.1},
    ],
)  # fmt: skip
def test_an_oracle_of_other_parameters_is_found_out(
    population: Population, found: list[tuple[Events, np.ndarray]], wrong: dict[str, float]
) -> None:
    """Every rule counts: with one number changed, what happened becomes less likely."""
    believed = predictions(population, LIVELY, LIVELY._replace(**wrong), runs=len(found))

    def likelihood(these: list[tuple[Events, np.ndarray]]) -> float:
        with np.errstate(divide="ignore"):
            return sum(float(np.log(p[np.arange(60), events.action, events.target]).sum()) for events, p in these)

    assert likelihood(believed) < likelihood(found) - 2


@pytest.mark.long
def test_a_visitor_does_what_the_weights_say(population: Population) -> None:
    """One state, many draws: the drawing code against the weights that the oracle adds up."""
    events = grown(population, 40, LIVELY, seed=1)
    oracle, rng = Oracle(population, events, LIVELY), np.random.default_rng(0)
    oracle.replay(40)
    net, now, draws, tested = oracle.net, float(events.time[-1]) + 0.01, 8_000, 0
    for u in range(len(population.joined)):
        asked = request_options(net, u, now, LIVELY)
        expected = np.zeros(len(population.joined))
        np.add.at(expected, net.option[: asked.listed], net.share[: asked.listed])
        eligible = ~net.known[: len(expected)]
        expected += eligible * (asked.each + asked.scene_each * (net.scenes.of == net.scenes.of[u]))
        forget(net, u)
        if asked.anywhere == 0:
            assert expected.sum() == 0
            continue
        assert expected.sum() == pytest.approx(1)
        drawn = []
        for _ in range(draws):
            drawn.append(draw_stranger(net, u, now, LIVELY, rng))
            forget(net, u)
        counts = np.bincount(drawn, minlength=len(expected))
        assert counts[expected == 0].sum() == 0
        tested += (expected > 0).sum() > 1
        assert stats.chisquare(counts[expected > 0], draws * expected[expected > 0]).pvalue > 1e-4
    assert tested >= 3
    assert not net.known.any()


def test_a_message_goes_where_the_weights_say(population: Population) -> None:
    events = grown(population, 60, LIVELY, seed=2)
    oracle, rng = Oracle(population, events, LIVELY), np.random.default_rng(1)
    oracle.replay(60)
    net, quiet = oracle.net, LIVELY._replace(request=0.0)
    u = int(np.argmax(net.friends))
    listed = message_options(net, u, quiet)
    expected = np.zeros(len(population.joined))
    np.add.at(expected, net.peer[net.option[:listed]], net.share[:listed])
    assert net.friends[u] > 1
    assert expected.sum() == pytest.approx(1)
    assert request_share(net, u, quiet) == 0
    counts = np.zeros(len(expected))
    for _ in range(20_000):
        action, contact = decide(net, u, float(events.time[-1]), quiet, rng)
        assert action == MESSAGE
        assert contact != NOBODY
        counts[net.peer[contact]] += 1
    assert stats.chisquare(counts[expected > 0], 20_000 * expected[expected > 0]).pvalue > 1e-4


def test_what_cannot_happen_has_no_rate(population: Population) -> None:
    """Against the rules told anew, on sets: before every event of several networks, for every user."""
    for seed in range(10):
        events = grown(population, 60, LIVELY, seed)
        oracle = Oracle(population, events, LIVELY)
        asked: dict[tuple[int, int], float] = {}
        friends: set[frozenset[int]] = set()
        blocked: set[frozenset[int]] = set()
        for i, (u, v, action, now) in enumerate(zip(*(column.tolist() for column in events), strict=True)):
            oracle.replay(i)
            for x in range(len(population.joined)):
                rates = oracle.rates(x, now)
                assert (rates >= 0).all()
                for action_of, y in np.argwhere(rates > 0).tolist():
                    pair = frozenset((x, y))
                    assert x != y
                    assert population.joined[y] <= now
                    assert pair not in blocked
                    still_open = {s for s in ((x, y), (y, x)) if s in asked and now - asked[s] < LIVELY.lapse_days}
                    if action_of == REQUEST:
                        assert pair not in friends
                        assert not still_open
                    elif action_of == ACCEPT:
                        assert pair not in friends
                        assert still_open == {(y, x)}
                    elif action_of == MESSAGE:
                        assert pair in friends
                    else:
                        assert any(x in other for other in friends - {pair})
            pair = frozenset((u, v))
            if action == REQUEST:
                asked.pop((v, u), None)
                asked[u, v] = now
            elif action == ACCEPT:
                friends.add(pair)
            elif action == BLOCK:
                friends.discard(pair)
                blocked.add(pair)


def test_the_tables_tell_the_oracle_what_the_generator_knew() -> None:
    """Through tables and back: users under other names, times on the clock of the wall, rounded to microseconds."""
    log = simulate(users=200, events=2_000, seed=4)
    population, events = read_truth(log, DEFAULTS)
    rng = np.random.default_rng(4)
    drawn = draw_population(200, DEFAULTS, rng)
    net, rate = empty_network(drawn, 2_000), visit_rate(drawn, 2_000, DEFAULTS)
    true = Events(*grow(net, rate, DEFAULTS, rng, 2_000, np.zeros(1, np.int64)))
    assert visit_rate(population, 2_000, DEFAULTS) == pytest.approx(rate, rel=1e-9)
    np.testing.assert_allclose(events.time, true.time, atol=1e-7)
    np.testing.assert_array_equal(events.action, true.action)
    for side in ("actor", "target"):
        np.testing.assert_array_equal(population.user_id[getattr(events, side)], drawn.user_id[getattr(true, side)])
    order = np.argsort(population.user_id), np.argsort(drawn.user_id)
    for trait in ("community", "interest", "city", "activity"):
        np.testing.assert_array_equal(getattr(population, trait)[order[0]], getattr(drawn, trait)[order[1]])
    np.testing.assert_allclose(population.joined[order[0]], drawn.joined[order[1]], atol=1e-9)
