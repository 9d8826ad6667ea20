"""Shared neighbours against networkx; `test_baselines.py` holds their ranks to the definitions and the reference."""

import networkx as nx
import numpy as np

from friendrec.pipeline.evaluation.baselines import event_stream
from friendrec.pipeline.evaluation.neighbours import _two_hops
from tests.pipeline.evaluation import null


def test_scores_are_those_of_networkx() -> None:
    data = null.prepared(null.random_log(0, users=40, events=120))
    stream = event_stream(data)
    graph = nx.Graph(zip(stream.actor.tolist(), stream.target.tolist(), strict=True))
    known = np.diff(stream.slot_offsets)
    for actor in range(data.num_users):
        common, adamic = _two_hops(actor, known, stream.slot_offsets, stream.slot_other)
        pairs = [(actor, w) for w in range(data.num_users) if w != actor]
        for _, w, value in nx.adamic_adar_index(graph, pairs):
            assert common[w] == len(list(nx.common_neighbors(graph, actor, w)))
            assert adamic[w] == round(value * 1e6)


def test_what_is_not_known_is_not_counted() -> None:
    """A path 0-1-2-3 of which only 0-1-2 is known: 2 shares 1 with 0, and 3 shares nobody."""
    data = null.prepared((np.array([0, 1, 2]), np.array([1, 2, 3]), np.full(3, "say"), np.arange(3)))
    stream = event_stream(data)
    common, adamic = _two_hops(0, np.array([1, 2, 1, 0]), stream.slot_offsets, stream.slot_other)
    assert common.tolist() == [1, 0, 1, 0]
    assert adamic.tolist() == [1442695, 0, 1442695, 0]
