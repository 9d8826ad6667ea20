"""The generator's own ranking of a simulated log's events: what no method that reads the log alone can beat on average.

Live only. Frozen it would have to add up every way in which the network may have gone on since the end of train.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from friendrec.datasets.network import ACTIONS, NetworkParameters
from friendrec.datasets.oracle import Oracle, read_truth
from friendrec.datasets.prepared import PreparedData
from friendrec.datasets.simulator import SocialLog
from friendrec.errors import FriendrecError
from friendrec.pipeline.evaluation.scoring import ranks_among
from friendrec.pipeline.evaluation.tasks import LEVELS, Events, Exclusions
from friendrec.pipeline.publish import open_published

FIRST = np.zeros(1, np.int64)


@dataclass(frozen=True)
class LogOracle:
    """The oracle of a published log, and the time of each of its events, `[n]` µs, ascending."""

    oracle: Oracle
    timestamp: NDArray[np.int64]


def open_oracle(path: str, events: Events, data: PreparedData) -> LogOracle:
    """The oracle of the published log at `path`, which must be the one that the data was prepared from."""
    directory, manifest = open_published(path, "log")
    true = manifest.extra.get("parameters", {})
    if set(true) != set(NetworkParameters._fields):
        raise FriendrecError(
            f"--oracle {path}: the log is not of a friend network that this version simulates, so its probabilities "
            "are not known: leave it out"
        )
    log = SocialLog(*(pq.read_table(directory / name) for name in ("interactions", "users", "truth")))
    parameters = NetworkParameters(**true)
    oracle = Oracle(*read_truth(log, parameters), parameters)
    timestamp = log.interactions["timestamp"].cast(pa.int64()).to_numpy()
    if not _is_of(oracle, timestamp, events, data):
        raise FriendrecError(f"--oracle {path} is not the log that the data was prepared from: pass that one")
    return LogOracle(oracle, timestamp)


def _is_of(oracle: Oracle, timestamp: NDArray[np.int64], events: Events, data: PreparedData) -> bool:
    """Whether each scored event is in the log."""
    user_id = oracle.population.user_id
    if data.user_ids.dtype != np.int64 or not np.isin(data.user_ids, user_id).all():
        return False
    place = np.minimum(np.searchsorted(timestamp, events.timestamp), len(timestamp) - 1)
    actor, target = user_id[oracle.events.actor[place]], user_id[oracle.events.target[place]]
    same = (timestamp[place] == events.timestamp) & (actor == data.user_ids[events.actor])
    return bool((same & (target == data.user_ids[events.target])).all())


def oracle_ranks(
    data: PreparedData,
    events: Events,
    exclusions: Exclusions,
    log: LogOracle,
    advance: Callable[[int], None] = lambda scored: None,
) -> NDArray[np.float64]:
    """Rank of each event's target at each level of exclusion, `[LEVELS, E]`; nan where no task asks.

    What may follow is counted as far as it is predicted: actions of role `target`.
    """
    roles = {action.name: action.role for action in data.actions}
    predicted = np.array([roles.get(action) == "target" for action in ACTIONS])
    oracle, before = log.oracle, np.searchsorted(log.timestamp, events.timestamp)
    index = pc.index_in(pa.array(data.user_ids), value_set=pa.array(oracle.population.user_id)).to_numpy()
    hidden = [exclusions.at(level, events.actor, events.timestamp) for level in range(LEVELS)]
    asked = [events.at_level(level) for level in range(LEVELS)]
    ranks = np.full((LEVELS, len(events.index)), np.nan)
    for e, (actor, target) in enumerate(zip(events.actor, events.target, strict=True)):
        oracle.replay(before[e])
        rates = oracle.rates(index[actor], oracle.events.time[before[e]])[predicted].sum(axis=0)
        scores = rates[index[: data.num_train_users]]
        for level in range(LEVELS):
            if asked[level][e]:
                offsets, ids = hidden[level]
                ranks[level, e] = ranks_among(scores[None], FIRST, np.array([target]), offsets[e : e + 2], ids)[0]
        advance(1)
    return ranks
