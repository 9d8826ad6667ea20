"""Effects against loops over cells and draws; a grid in which one factor alone does something says so."""

import itertools
from typing import Any

import numpy as np
import pytest

from friendrec.pipeline.evaluation.insight import (
    CLUSTERS,
    MODEL,
    SHARE,
    Grid,
    clusters_by_share,
    effects,
    finding,
    recall_change,
    speed_change,
)

SHARES, SEEDS, EVENTS, BLOCKS = ("exact", "10 %", "1 %"), (0, 1), 80, 6
CELLS = list(itertools.product(range(2), range(2), range(len(SHARES)), range(len(SEEDS))))


def random_grid(seed: int = 0) -> Grid:
    rng = np.random.default_rng(seed)
    shape = (2, 2, len(SHARES), len(SEEDS))
    hits = (rng.random((*shape, EVENTS)) < 0.4).astype(np.float64)
    return Grid(SHARES, SEEDS, hits, rng.integers(0, 12, EVENTS), rng.uniform(0.001, 0.1, (*shape, BLOCKS)))


def sides(axis: int, level: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of cells that differ in one factor alone: its first level, and another."""
    pairs = []
    for cell in CELLS:
        if cell[axis] == 0:
            other = list(cell)
            other[axis] = level
            pairs.append((cell, tuple(other)))
    return pairs


@pytest.mark.parametrize(("axis", "level"), [(MODEL, 1), (CLUSTERS, 1), (SHARE, 1), (SHARE, 2)])
def test_recall_is_compared_over_all_other_factors_on_the_same_users(axis: int, level: int) -> None:
    grid = random_grid()
    pairs = sides(axis, level)

    def recalls(events: Any) -> tuple[float, float]:
        before = np.mean([grid.hits[low][events].mean() for low, _ in pairs])
        after = np.mean([grid.hits[high][events].mean() for _, high in pairs])
        return float(before), float(after)

    found = recall_change(grid.take(axis, [0, level]), axis)
    before, after = recalls(slice(None))
    assert (found["before"], found["after"]) == (pytest.approx(before), pytest.approx(after))
    assert found["difference"] == pytest.approx(after - before) and found["ratio"] == pytest.approx(after / before)
    users = np.unique(grid.actors)
    rng, drawn = np.random.default_rng(0), []
    for draw in rng.integers(len(users), size=(1000, len(users))):
        drawn.append(recalls(np.concatenate([np.flatnonzero(grid.actors == users[u]) for u in draw])))
    low, high = np.array(drawn).T
    assert found["difference_ci"] == pytest.approx(np.quantile(high - low, [0.025, 0.975]))
    assert found["ratio_ci"] == pytest.approx(np.quantile(high / low, [0.025, 0.975]))


@pytest.mark.parametrize(("axis", "level"), [(MODEL, 1), (CLUSTERS, 1), (SHARE, 2)])
def test_speeds_are_compared_pair_by_pair(axis: int, level: int) -> None:
    grid = random_grid()
    pairs = sides(axis, level)

    def changes(blocks: Any) -> tuple[float, float]:
        speeds = [tuple(1 / grid.seconds[cell][blocks].mean() for cell in pair) for pair in pairs]
        ratio = np.prod([high / low for low, high in speeds]) ** (1 / len(speeds))
        return float(np.mean([high - low for low, high in speeds])), float(ratio)

    found = speed_change(grid.take(axis, [0, level]), axis)
    assert (found["difference"], found["ratio"]) == pytest.approx(changes(slice(None)))
    drawn = np.array([changes(draw) for draw in np.random.default_rng(0).integers(BLOCKS, size=(1000, BLOCKS))])
    assert found["difference_ci"] == pytest.approx(np.quantile(drawn[:, 0], [0.025, 0.975]))
    assert found["ratio_ci"] == pytest.approx(np.quantile(drawn[:, 1], [0.025, 0.975]))


def planted(recall: int | None, speed: int | None) -> Grid:
    """A factor alone takes a third of the hits away, and one alone makes queries thrice as fast."""
    grid = random_grid()
    once = np.repeat((np.arange(EVENTS) % 2 == 0).astype(float)[None], len(CELLS), axis=0).reshape(grid.hits.shape)
    seconds = np.full(grid.seconds.shape, 0.01)
    if recall is not None:
        np.moveaxis(once, recall, 0)[1:, ..., ::6] = 0
    if speed is not None:
        np.moveaxis(seconds, speed, 0)[1:] /= 3
    return Grid(SHARES, SEEDS, once, np.arange(EVENTS), seconds)


def test_the_factor_that_was_planted_is_found_and_the_others_change_nothing() -> None:
    found = effects(planted(recall=MODEL, speed=SHARE))
    assert [(row["factor"], row["level"]) for row in found] == [
        ("model", "two_tower_moe"), ("clusters", "on"), ("share", "10 %"), ("share", "1 %"),
    ]  # fmt: skip
    recall = [row["recall@10"]["ratio"] for row in found]
    assert recall == pytest.approx([1 - 14 / 40, 1, 1, 1])
    assert [row["queries_per_second"]["ratio"] for row in found] == pytest.approx([1, 1, 3, 3])
    assert found[0]["recall@10"]["ratio_ci"][1] < 1 and found[1]["recall@10"]["ratio_ci"] == [1, 1]
    assert found[0]["recall@10"]["ratio_by_seed"] == pytest.approx({"0": 1 - 14 / 40, "1": 1 - 14 / 40})


@pytest.mark.parametrize(
    ("recall", "speed", "said"),
    [
        (MODEL, SHARE, "the model matters more for Recall@10 and the search matters more for queries/s."),
        (SHARE, MODEL, "the search matters more for Recall@10 and the model matters more for queries/s."),
        (None, CLUSTERS, "neither can be told from chance for both."),
    ],
)
def test_the_sentence_says_what_the_figures_say(recall: int | None, speed: int | None, said: str) -> None:
    text = finding("ours", effects(planted(recall, speed)))
    assert text.startswith("ours: searching 10 % of the users in place of all changes Recall@10 ×") and said in text
    assert ("×0.650 (" in text) == (recall is not None)


def test_the_model_is_held_against_each_smaller_search_by_itself() -> None:
    """Its change lies between those of the two searches, so that the larger of these must not speak for both."""
    found = effects(planted(recall=MODEL, speed=None))
    model, tenth, hundredth = found[0], found[2], found[3]
    changed = {"ratio": 0.9, "ratio_ci": [0.85, 0.95]}
    hundredth["recall@10"] |= {"ratio": 0.1, "ratio_ci": [0.05, 0.2]}
    tenth["recall@10"] |= changed
    assert 0.1 < model["recall@10"]["ratio"] < 0.9
    assert finding("ours", found).endswith(
        ": at 10 %, the model matters more for Recall@10 and neither can be told from chance for queries/s; "
        "at 1 %, the search matters more for Recall@10 and neither can be told from chance for queries/s."
    )
    hundredth["recall@10"] |= changed
    assert ": at 10 % and 1 %, the model matters more for Recall@10" in finding("ours", found)


def test_a_share_that_some_cell_lacks_is_in_no_effect() -> None:
    grid = random_grid()
    for values in (grid.hits, grid.seconds):
        values[:, 0, 2] = np.nan
    found = effects(grid)
    assert found == effects(Grid(SHARES[:2], SEEDS, grid.hits[:, :, :2], grid.actors, grid.seconds[:, :, :2]))
    assert [row["level"] for row in found] == ["two_tower_moe", "on", "10 %"]
    for values in (grid.hits, grid.seconds):
        values[:, 0, 1] = np.nan
    assert "no list fits in the shares" in finding("small", effects(grid))


def test_clusters_at_each_share_and_with_each_model() -> None:
    grid = random_grid()
    found = clusters_by_share(grid)
    assert list(found) == list(SHARES)
    for place, share in enumerate(SHARES):
        off, on = (grid.hits[:, level, place].mean() for level in (0, 1))
        assert found[share]["recall@10"]["difference"] == pytest.approx(on - off)
    for place, name in enumerate(("two_tower_mlp", "two_tower_moe")):
        off, on = (grid.hits[place, level, 0].mean() for level in (0, 1))
        assert found["exact"]["models"][name]["recall@10"]["ratio"] == pytest.approx(on / off)


def test_no_hit_at_all_has_no_ratio() -> None:
    grid = planted(None, None)
    found = effects(Grid(SHARES, SEEDS, np.zeros_like(grid.hits), grid.actors, grid.seconds))
    assert all(row["recall@10"]["ratio"] is None for row in found)
    assert "Recall@10 from 0" in finding("none", found)
