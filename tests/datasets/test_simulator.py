"""The simulated network keeps its promises: exact size, the rules of its actions, and the structure it claims."""

import json
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from friendrec.datasets.clock import activity_days, wall_days
from friendrec.datasets.network import RECENT, NetworkParameters
from friendrec.datasets.simulator import DEFAULTS, SocialLog, simulate
from friendrec.errors import FriendrecError
from friendrec.pipeline.simulate import PRESETS, SimulateOptions, main

END = datetime(2025, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Arrays:
    """A log as columns: raw ids (which are 0..users-1, so they index the truth), action names, days before END."""

    actor: np.ndarray
    target: np.ndarray
    action: np.ndarray
    day: np.ndarray
    community: np.ndarray
    joined: np.ndarray

    def pairs(self, action: str) -> list[tuple[int, int]]:
        chosen = self.action == action
        return list(zip(self.actor[chosen].tolist(), self.target[chosen].tolist(), strict=True))

    def friendships(self) -> nx.Graph:
        return nx.Graph(self.pairs("accept"))


def arrays(log: SocialLog) -> Arrays:
    def days(column: pa.ChunkedArray) -> np.ndarray:
        microseconds: np.ndarray = column.cast(pa.int64()).to_numpy()
        return (microseconds - END.timestamp() * 1e6) / 86_400e6

    return Arrays(
        actor=log.interactions["actor_id"].to_numpy(),
        target=log.interactions["target_id"].to_numpy(),
        action=np.array(log.interactions["action"].to_pylist()),
        day=days(log.interactions["timestamp"]),
        community=log.truth["community"].to_numpy(),
        joined=days(log.truth["joined"]),
    )


def plain(**changes: float) -> NetworkParameters:
    """The defaults, with all candidates of a request alike in appeal."""
    return DEFAULTS._replace(preferential=0.0, same_interest=1.0, same_city=1.0, fresh=0.0, **changes)


@pytest.fixture(scope="module")
def regular() -> Arrays:
    return arrays(simulate(*PRESETS["regular"], seed=0))


@pytest.fixture(scope="module")
def large() -> Arrays:
    return arrays(simulate(*PRESETS["4x"], seed=0))


@given(users=st.integers(2, 60), events=st.integers(1, 600), seed=st.integers(0, 10**6))
@example(users=2, events=1, seed=0)
@example(users=2, events=300, seed=3)
@example(users=500, events=20, seed=1)
@settings(max_examples=60, deadline=None)
def test_rules_hold_at_every_size(users: int, events: int, seed: int) -> None:
    log = simulate(users, events, seed)
    assert log.interactions.num_rows == events
    assert log.users["user_id"].to_pylist() == log.truth["user_id"].to_pylist() == list(range(users))
    times = log.interactions["timestamp"].cast(pa.int64()).to_numpy()
    assert (np.diff(times) > 0).all()
    assert END - timedelta(days=1) <= log.interactions["timestamp"][-1].as_py() < END
    joined = log.truth["joined"].cast(pa.int64()).to_numpy()
    assert (times >= joined[log.interactions["actor_id"].to_numpy()]).all()
    assert (times >= joined[log.interactions["target_id"].to_numpy()]).all()

    requests: dict[frozenset[int], tuple[int, datetime]] = {}  # the pair's last: who sent it, and when
    friends: set[frozenset[int]] = set()
    blocked: set[frozenset[int]] = set()
    for row in log.interactions.to_pylist():
        actor, target, now = row["actor_id"], row["target_id"], row["timestamp"]
        pair = frozenset((actor, target))
        assert actor != target
        assert pair not in blocked, "nothing passes between them any more"
        match row["action"]:
            case "request":
                assert pair not in friends
                if pair in requests:
                    assert now - requests[pair][1] > timedelta(days=DEFAULTS.lapse_days - 1), "still open"
                requests[pair] = actor, now
            case "accept":
                sender, sent = requests[pair]
                assert sender == target
                assert now - sent < timedelta(days=DEFAULTS.lapse_days + 1)
                assert pair not in friends
                friends.add(pair)
            case "block":
                assert pair in requests
                friends.discard(pair)
                blocked.add(pair)
                assert any(actor in pair for pair in friends), "who blocks has another friend"
            case action:
                assert action == "message"
                assert pair in friends


def test_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in {"one": 5, "same": 5, "other": 6}.items():
        main(SimulateOptions(out=str(tmp_path / name), users=300, events=2_000, seed=seed))
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.parquet")]
    assert len(files) == 3
    for file in files:
        one, same, other = ((tmp_path / name / file).read_bytes() for name in ("one", "same", "other"))
        assert one == same
        assert one != other


def test_published_log_has_the_contract_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "log"
    main(SimulateOptions(out=str(out)))
    interactions = pq.read_table(out / "interactions")
    assert interactions.schema.remove_metadata() == pa.schema(
        {
            "actor_id": pa.int64(),
            "target_id": pa.int64(),
            "action": pa.dictionary(pa.int8(), pa.string()),
            "timestamp": pa.timestamp("us", "UTC"),
        }
    )
    users = pq.read_table(out / "users")
    assert users.schema.names == ["user_id", "interest", "city", "languages"]
    assert users.schema.field("languages").type == pa.list_(pa.string())
    assert all(0 < len(spoken) == len(set(spoken)) for spoken in users["languages"].to_pylist())
    assert (users.num_rows, interactions.num_rows) == PRESETS["regular"]
    extra = json.loads((out / "manifest.json").read_text())["extra"]
    assert NetworkParameters(**extra["parameters"]) == DEFAULTS
    next_step = (
        f"friendrec prepare --interactions {out}/interactions --users {out}/users --roles block=exclude --out data"
    )
    assert next_step in capsys.readouterr().out


def test_repeating_keeps_the_log_and_anything_else_is_refused(tmp_path: Path) -> None:
    options = SimulateOptions(out=str(tmp_path / "log"), users=50, events=100)
    main(options)
    before = (tmp_path / "log" / "manifest.json").stat().st_mtime_ns
    main(options)
    assert (tmp_path / "log" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(FriendrecError, match="choose another --out"):
        main(SimulateOptions(out=options.out, users=50, events=101))


@pytest.mark.parametrize(
    ("option", "value"), [("users", 1), ("users", -3), ("events", 0), ("events", -1), ("seed", -1)]
)
def test_bad_numbers_leave_nothing_behind(option: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(FriendrecError, match=f"^--{option} {value}: .*; give") as mistake:
        main(SimulateOptions(out=str(tmp_path / "log"), **{option: value}))  # type: ignore[arg-type]
    assert "\n" not in str(mistake.value)
    assert not list(tmp_path.iterdir())


def test_log_spans_about_half_a_year(regular: Arrays, large: Arrays) -> None:
    for log in (regular, large):
        assert -198 < log.day[0] < -162


def test_degrees_have_a_heavy_tail(large: Arrays) -> None:
    degrees = np.sort([degree for _, degree in large.friendships().degree()])
    assert degrees.var() > 2.5 * degrees.mean(), "a Poisson tail would have equal mean and variance"
    assert degrees[-len(degrees) // 100 :].mean() > 6 * np.median(degrees)


def attraction(log: Arrays) -> float:
    """Requests received in the second half: founders with 8 friends and more by then against those with 0 or 1."""
    early = log.day <= log.day[len(log.day) // 2]
    accepts, requests = log.action == "accept", log.action == "request"
    ends = np.concatenate([log.actor[accepts & early], log.target[accepts & early]])
    degree = np.bincount(ends, minlength=len(log.joined))
    received = np.bincount(log.target[requests & ~early], minlength=len(log.joined))
    founders = log.joined <= log.day[0]
    return float(received[founders & (degree >= 8)].mean() / received[founders & (degree <= 1)].mean())


def test_popular_users_attract_more(large: Arrays) -> None:
    even = plain(triadic=0.0, community=DEFAULTS.community + DEFAULTS.triadic)
    assert attraction(arrays(simulate(*PRESETS["4x"], seed=0, parameters=even))) < 1.3
    assert attraction(large) > 2


def test_requests_stay_in_communities(regular: Arrays) -> None:
    nx.set_node_attributes(friends := regular.friendships(), dict(enumerate(regular.community.tolist())), "community")
    assert nx.attribute_assortativity_coefficient(friends, "community") > 0.7
    shuffled = dict(enumerate(np.random.default_rng(0).permutation(regular.community).tolist()))
    nx.set_node_attributes(friends, shuffled, "community")
    assert abs(nx.attribute_assortativity_coefficient(friends, "community")) < 0.05


def test_profiles_follow_communities() -> None:
    log = simulate(*PRESETS["regular"], seed=0)
    rng = np.random.default_rng(0)
    for column in ("interest", "city"):
        value, community = np.array(log.users[column].to_pylist()), log.truth["community"].to_numpy()
        left, right = rng.integers(len(value), size=(2, 200_000))
        together = community[left] == community[right]
        equal = value[left] == value[right]
        assert equal[together].mean() > 2.5 * equal[~together].mean()


def closure_lift(log: Arrays) -> float:
    """How much oftener than a random stranger of the same community the person asked shares a friend with the actor."""
    members = [np.flatnonzero(log.community == c) for c in range(log.community.max() + 1)]
    friends: list[set[int]] = [set() for _ in log.joined]
    asked: list[set[int]] = [set() for _ in log.joined]
    shared, chance = [], []
    for actor, target, action, day in zip(log.actor, log.target, log.action, log.day, strict=True):
        if action == "accept":
            friends[actor].add(target)
            friends[target].add(actor)
        if action == "request":
            if friends[actor] and target not in asked[actor] and log.community[actor] == log.community[target]:
                present = (v for v in members[log.community[actor]] if log.joined[v] <= day)
                strangers = [v for v in present if v != actor and v not in asked[actor]]
                shared.append(not friends[actor].isdisjoint(friends[target]))
                chance.append(np.mean([not friends[actor].isdisjoint(friends[v]) for v in strangers]))
            asked[actor].add(target)
            asked[target].add(actor)
    return float(np.mean(shared) / np.mean(chance))


def test_triangles_close_beyond_what_communities_explain() -> None:
    moved = plain(triadic=0.0, community=DEFAULTS.community + DEFAULTS.triadic)
    assert closure_lift(arrays(simulate(*PRESETS["4x"], seed=0, parameters=moved))) < 1.2
    assert closure_lift(arrays(simulate(*PRESETS["4x"], seed=0, parameters=plain()))) > 1.4


def likeness(log: SocialLog) -> float:
    """How much oftener the one asked has the actor's interest than others of the same community have."""
    table = pa.table({name: log.interactions[name] for name in ("actor_id", "target_id", "action")})
    asked = table.filter(pa.compute.equal(table["action"].cast(pa.string()), "request"))
    actor, target = asked["actor_id"].to_numpy(), asked["target_id"].to_numpy()
    community, interest = log.truth["community"].to_numpy(), np.array(log.users["interest"].to_pylist())
    inside = community[actor] == community[target]
    chance = [(interest[community == c][:, None] == interest[community == c]).mean() for c in community[actor[inside]]]
    return float((interest[actor] == interest[target])[inside].mean() / np.mean(chance))


def test_like_turns_to_like() -> None:
    """The same interest counts beyond what it tells of the community; without its factor it does not."""
    assert likeness(simulate(*PRESETS["regular"], seed=0)) > 1.2
    assert likeness(simulate(*PRESETS["regular"], seed=0, parameters=plain())) < 1.1


@pytest.mark.parametrize("rhythm", [0.0, 0.5, 0.85])
def test_the_activity_clock_is_the_integral_of_its_rate(rhythm: float) -> None:
    hours = np.linspace(0, 72, 72 * 60 + 1)
    middle = np.floor((hours[1:] + hours[:-1]) / 2) % 24
    rate = 1 + rhythm * np.cos(2 * np.pi * (middle - 20) / 24)
    integral = np.concatenate([[0], np.cumsum(rate) / 60 / 24])
    np.testing.assert_allclose(activity_days(hours / 24, rhythm), integral, atol=1e-9)
    np.testing.assert_allclose(wall_days(integral, rhythm), hours / 24, atol=1e-9)


def hour_share(log: Arrays, first: int, last: int) -> float:
    hour = (log.day % 1) * 24
    return float(((hour >= first) & (hour < last)).mean())


def test_nights_are_quiet(large: Arrays) -> None:
    """Six hours of the night and of the evening, against what the stated rate gives them, and against no rhythm."""
    assert hour_share(large, 5, 11) == pytest.approx(0.25 * (1 - 0.85 * 0.93), abs=0.01)
    assert hour_share(large, 17, 23) == pytest.approx(0.25 * (1 + 0.85 * 0.93), abs=0.02)
    flat = arrays(simulate(*PRESETS["4x"], seed=0, parameters=DEFAULTS._replace(rhythm=0.0)))
    assert hour_share(flat, 5, 11) == pytest.approx(0.25, abs=0.01)


def gap_dispersion(log: Arrays) -> float:
    """Median over busy founders of the spread of the gaps between a user's own events, in means: 1 is Poisson."""
    spreads = []
    for user in np.flatnonzero(log.joined <= log.joined.min()):
        days = log.day[log.actor == user]
        if len(days) >= 40:
            gaps = np.diff(days)
            spreads.append(gaps.std() / gaps.mean())
    assert len(spreads) > 20
    return float(np.median(spreads))


def test_users_act_in_bursts(large: Arrays) -> None:
    """Without what sets off more of one's own events, gaps are those of a Poisson process."""
    alone = DEFAULTS._replace(stay=0.0, reply=0.0, greet=0.0, accept_inside=0.0, accept_outside=0.0, rhythm=0.0)
    assert gap_dispersion(arrays(simulate(*PRESETS["4x"], seed=0, parameters=alone))) == pytest.approx(1, abs=0.12)
    assert gap_dispersion(large) > 1.6


def test_activity_is_a_power_law(large: Arrays) -> None:
    """Maximum-likelihood exponent of the least active nine tenths (above them it is cut off), and of what users do."""
    activity = simulate(*PRESETS["4x"], seed=0).truth["activity"].to_numpy()
    end = np.quantile(activity, 0.9)
    below = np.log(activity[activity < end])
    exponent = len(below) / (below.sum() + np.log(end) * (activity >= end).sum())
    assert exponent == pytest.approx(DEFAULTS.activity_tail, rel=0.04)
    events = np.bincount(large.actor, minlength=len(activity))
    assert np.sort(events)[-len(events) // 100 :].sum() > 0.06 * events.sum(), "one in a hundred does a lot"
    founders = large.joined <= large.joined.min()
    assert stats.spearmanr(activity[founders], events[founders]).statistic > 0.25


def test_blocks_are_as_many_as_stated() -> None:
    """Fewer than the mean says by those who have no other friend, and by whom a first block has silenced."""
    often = DEFAULTS._replace(block_request=0.0, block_message=0.05)
    log = arrays(simulate(*PRESETS["4x"], seed=0, parameters=often))
    messages, blocks = int((log.action == "message").sum()), len(log.pairs("block"))
    assert 0.65 * 0.05 * messages < blocks < 0.05 * messages
    assert not arrays(simulate(*PRESETS["regular"], seed=0, parameters=often._replace(block_message=0.0))).pairs(
        "block"
    )


def request_delays(log: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair's first request, if 30 days before the end or earlier: whether inside a community, and the days
    of the activity clock until it was accepted (inf: not before it lapsed).
    """
    accepted = {pair: i for i, pair in zip(np.flatnonzero(log.action == "accept"), log.pairs("accept"), strict=True)}
    first: dict[frozenset[int], int] = {}
    for i in np.flatnonzero(log.action == "request").tolist():
        first.setdefault(frozenset((log.actor[i], log.target[i])), i)
    sent = np.array([i for i in first.values() if log.day[i] < -30])
    answers = [accepted.get((log.target[i], log.actor[i])) for i in sent]
    clock = activity_days(log.day, DEFAULTS.rhythm)
    delay = np.array([np.inf if j is None else clock[j] - clock[i] for i, j in zip(sent, answers, strict=True)])
    delay[delay >= DEFAULTS.lapse_days] = np.inf  # it was a later request of the pair that was accepted
    return log.community[log.actor[sent]] == log.community[log.target[sent]], delay


def test_acceptance_has_the_stated_rate_and_delay() -> None:
    """Where no block comes before it."""
    peaceful = DEFAULTS._replace(block_request=0.0, block_message=0.0)
    inside, delay = request_delays(arrays(simulate(*PRESETS["4x"], seed=1, parameters=peaceful)))
    for where, rate in ((inside, DEFAULTS.accept_inside), (~inside, DEFAULTS.accept_outside)):
        asked, accepted = int(where.sum()), int(np.isfinite(delay[where]).sum())
        assert stats.binomtest(accepted, asked, rate).pvalue > 1e-3
    stated = stats.lognorm(s=DEFAULTS.accept_sigma, scale=DEFAULTS.accept_median)
    assert stats.kstest(delay[np.isfinite(delay)], stated.cdf).pvalue > 1e-3
    other = stats.lognorm(s=DEFAULTS.accept_sigma, scale=1.1 * DEFAULTS.accept_median)
    assert stats.kstest(delay[np.isfinite(delay)], other.cdf).pvalue < 1e-3, "the test must notice 10 %"


def test_users_join_until_late(regular: Arrays) -> None:
    late = 0.2 * regular.day[0]
    first_seen = np.full(len(regular.joined), np.inf)
    for end in (regular.actor, regular.target):
        np.minimum.at(first_seen, end, regular.day)
    newcomers = np.isfinite(first_seen) & (regular.joined > late)
    assert newcomers.mean() > 0.05
    assert np.isin(np.flatnonzero(newcomers), regular.actor).mean() > 0.5, "most of them act themselves"


def repeat_lift(log: Arrays) -> float:
    """How much oftener than a random friend a message's target is among the partners of the last three messages.

    Over actors with more friends than the simulator remembers partners.
    """
    partners: dict[int, list[int]] = {}
    friends: Counter[int] = Counter()
    repeated, chance = [], []
    for actor, target, action in zip(log.actor.tolist(), log.target.tolist(), log.action, strict=True):
        if action == "accept":
            friends.update((actor, target))
        if action == "message":
            if friends[actor] > RECENT:
                known = set(partners.get(actor, [])[-3:])
                repeated.append(target in known)
                chance.append(len(known) / friends[actor])
            partners.setdefault(actor, []).append(target)
            partners.setdefault(target, []).append(actor)
    return float(np.mean(repeated) / np.mean(chance))


def test_messages_go_back_to_recent_partners(large: Arrays) -> None:
    """More than conversations explain, which are there without repeats as well."""
    without = arrays(simulate(*PRESETS["4x"], seed=0, parameters=DEFAULTS._replace(repeat=0.0)))
    assert repeat_lift(large) > 1.2 * repeat_lift(without)


def test_popularity_does_not_find_new_friends(regular: Arrays) -> None:
    """The ten users most asked so far are hardly ever asked next; the own community nearly always holds the answer."""
    requests = np.flatnonzero(regular.action == "request")
    train, test = requests[: int(0.8 * len(requests))], requests[int(0.8 * len(requests)) :]
    popular = np.argsort(-np.bincount(regular.target[train], minlength=len(regular.joined)))[:10]
    assert np.isin(regular.target[test], popular).mean() < 0.05
    assert (regular.community[regular.actor[test]] == regular.community[regular.target[test]]).mean() > 0.6
