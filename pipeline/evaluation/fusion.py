"""Two recommenders asked the same questions, and their lists merged by weighted reciprocal rank.

score(v) = Σ_lists weight · 1 / (RANK_OFFSET + place of v), over the lists that hold v (Cormack et al. 2009, where all
weights are equal). Lists are as long as a search is deep; whom a question excludes is left out inside each search.

A list that is much the worse of the two only harms a merger of equals. So the weight of the first is one of WEIGHTS,
chosen on the validation period for each state and level of exclusion, for a server knows both: the one of highest
Recall@10. New links and the replies among them are of one level; there each is divided by what the better of the two
lists has, and the lower quotient counts.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from friendrec.datasets.prepared import PreparedData
from friendrec.pipeline.evaluation.metrics import gains
from friendrec.pipeline.evaluation.results import ALSO, FUSION, MODEL, Evaluation
from friendrec.pipeline.evaluation.scoring import (
    EVERYTHING,
    Recommender,
    places_among,
    questions,
    search_with_targets,
)
from friendrec.pipeline.evaluation.tasks import LEVEL, LEVELS, STATES, TASKS, Events, Exclusions
from friendrec.pipeline.retrieval.protocol import Queries, Ranker, Retriever

RANK_OFFSET = 60
"""Of the paper: how little the first places stand out from those after them."""
WEIGHTS = np.arange(11) / 10
"""Of the first list; the second has the rest. Half is the paper's, 0 and 1 are one of the lists alone."""
EQUAL = len(WEIGHTS) // 2


def ranks_beside(
    data: PreparedData,
    events: Events,
    exclusions: Exclusions,
    recommenders: tuple[Recommender, Recommender],
    state: str,
    advance: Callable[[int], None] = lambda scored: None,
    share: slice = EVERYTHING,
) -> dict[str, NDArray[np.float64]]:
    """Ranks of each recommender, MODEL and ALSO, as it would have alone, `[LEVELS, E]`, and of FUSION by every weight.

    FUSION is `[W, LEVELS, E]`: the place in the merged list, ties shared, infinite where that does not hold the
    target. As for one recommender, the blocks of `share` are scored, and the others are nan.
    """
    ranks = {method: np.full((LEVELS, len(events.index)), np.nan) for method in (MODEL, ALSO)}
    fused = np.full((len(WEIGHTS), LEVELS, len(events.index)), np.nan)
    for level, at, asked in questions(data, events, exclusions, recommenders, state, advance, share):
        lists = []
        for method, recommender, queries in zip((MODEL, ALSO), recommenders, asked, strict=True):
            ranks[method][level, at], found = _rank_and_list(recommender.retriever, queries, events.target[at])
            lists.append(found)
        fused[:, level, at] = fused_places(*lists, events.target[at], WEIGHTS, data.num_train_users).T
    return {**ranks, FUSION: fused}


def weighted(evaluation: Evaluation, validation: Evaluation) -> tuple[Evaluation, dict[str, list[float]]]:
    """The evaluation with FUSION at one weight, `[LEVELS, E]`, and the weights `[LEVELS]` chosen for each state."""
    chosen = {state: [_best_weight(validation, state, level) for level in range(LEVELS)] for state in STATES}
    fused = {
        state: np.stack([of[chosen[state][level], level] for level in range(LEVELS)])
        for state, of in evaluation.ranks[FUSION].items()
    }
    weights = {state: WEIGHTS[of].tolist() for state, of in chosen.items()}
    return replace(evaluation, ranks=evaluation.ranks | {FUSION: fused}), weights


def _best_weight(validation: Evaluation, state: str, level: int) -> int:
    """Place among WEIGHTS of the best; of equals that of the highest NDCG@10, then the nearest to equal weights."""
    worst, ndcg = np.full(len(WEIGHTS), np.inf), np.zeros(len(WEIGHTS))
    for task in (task for task in TASKS if LEVEL[task] == level and validation.events.of_task(task).any()):
        fused = gains(validation.ranks[FUSION][state][:, level, validation.events.of_task(task)])
        alone = max(float((validation.of(method, task, state) <= 10).mean()) for method in (MODEL, ALSO))
        worst = np.minimum(worst, fused["recall@10"].mean(axis=1) / (alone or 1))
        ndcg += fused["ndcg@10"].sum(axis=1)
    return int(np.lexsort((np.abs(np.arange(len(WEIGHTS)) - EQUAL), -ndcg, -worst))[0])


def _rank_and_list(
    retriever: Retriever, queries: Queries, targets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The rank that `target_ranks` gives, and the list: of one search, where the rank comes of a search."""
    ids, scores = search_with_targets(retriever, queries, targets)
    ranked = retriever.rank(queries, targets) if isinstance(retriever, Ranker) else places_among(ids, scores, targets)
    return ranked, ids


@numba.njit(cache=True, nogil=True)
def fused_places(first: Any, second: Any, targets: Any, weights: Any, num_candidates: int) -> Any:
    """Place of each target in the merger of two lists `[Q, K]` (best first, -1 behind the last) by weight: `[Q, W]`.

    1 + those of higher score + half of the others tied; infinite where the target has none.
    """
    places = np.full((len(targets), len(weights)), np.inf)
    slot = np.empty(num_candidates, np.int64)
    seen_by = np.full(num_candidates, -1)  # the last query with a slot for each candidate
    for q in range(len(targets)):
        gains = np.zeros((first.shape[1] + second.shape[1], 2))
        used = 0
        for source, found in enumerate((first[q], second[q])):
            for place, v in enumerate(found):
                if v < 0:
                    break
                if seen_by[v] != q:
                    seen_by[v], slot[v] = q, used
                    used += 1
                gains[slot[v], source] = 1 / (RANK_OFFSET + 1 + place)
        if seen_by[targets[q]] != q:
            continue
        for w, weight in enumerate(weights):
            scores = weight * gains[:used, 0] + (1 - weight) * gains[:used, 1]
            mine = scores[slot[targets[q]]]
            if mine > 0:
                places[q, w] = (scores > mine).sum() + (1 + (scores == mine).sum()) / 2
    return places
