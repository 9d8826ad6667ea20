"""What sampling in place of the best costs and buys: coverage and diversity against recall of a generating run.

python benchmarks/exploration.py --data DATA --run RUN --write

Each event of a sample of the validation period asks, live, for ten friends whom its actor has not contacted. They are
the ten best of the beams, or drawn one after the other by temperature, top-k and nucleus p.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from measuring import RESULTS, report, table
from numpy.typing import NDArray

from friendrec.models.sampling import Sampling
from friendrec.pipeline.evaluation.tasks import LEVEL, Events, scored_events
from friendrec.pipeline.inference import Recommender, open_recommender
from friendrec.pipeline.retrieval.protocol import Queries
from friendrec.pipeline.retrieval.stu import StuIndex

PLOT = RESULTS.parents[1] / "docs" / "exploration.svg"
K = 10
TASK = "new_link"
BLOCK = 1024
SETTINGS: dict[str, dict[str, Sampling]] = {
    "temperature": {f"{t:g}": Sampling(temperature=t) for t in (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 4)},
    "top-k": {f"{k}": Sampling(top_k=k) for k in (1, 2, 4, 8, 16, 64)},
    "nucleus p": {f"{p:g}": Sampling(nucleus=p) for p in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)},
}
"""Each varies one setting, the others as they are by default: temperature 1, all tokens."""
COLUMNS = ("recall@10", "coverage", "Gini of exposure", "first tokens in a list")


def figures(lists: NDArray[np.int64], events: Events, first_token: NDArray[np.int64]) -> tuple[float, ...]:
    """COLUMNS of the lists `[E, K]`: -1 behind the last.

    Coverage is the share of candidates that anybody was shown; the Gini coefficient of how often each was shown is 0
    where all are shown alike and near 1 where a few take all; the last counts the distinct first tokens of a list.
    """
    shown = np.sort(np.bincount(lists[lists >= 0], minlength=len(first_token)))
    places = np.arange(1, len(shown) + 1)
    gini = float((2 * places - len(shown) - 1) @ shown / (len(shown) * shown.sum()))
    tokens = np.sort(np.where(lists >= 0, first_token[lists], -1), axis=1)
    distinct = (tokens[:, :1] >= 0).sum(1) + ((tokens[:, 1:] != tokens[:, :-1]) & (tokens[:, 1:] >= 0)).sum(1)
    recall = float((lists == events.target[:, None]).any(axis=1).mean())
    return recall, float((shown > 0).mean()), gini, float(distinct.mean())


def asked(recommender: Recommender, num_events: int) -> tuple[Events, Queries]:
    """Events of TASK, spread evenly over the validation period, and what each asks."""
    data, exclusions = recommender.data, recommender.exclusions
    events, _ = scored_events(data, "validation", exclusions)
    events = events.take(events.of_task(TASK))
    events = events.take(np.linspace(0, len(events.index) - 1, min(num_events, len(events.index))).astype(np.int64))
    hidden = exclusions.at(LEVEL[TASK], events.actor, events.timestamp)
    return events, recommender.queries(events.actor, events.timestamp).excluding(*hidden)


def drawn(index: StuIndex, queries: Queries, sampling: Sampling | None) -> NDArray[np.int64]:
    """Lists `[E, K]`: of the best without sampling."""
    asking = dataclasses.replace(index, sampling=sampling)
    blocks = np.array_split(np.arange(len(queries)), -(-len(queries) // BLOCK))
    return np.concatenate([asking.search(queries.take(block), K)[0] for block in blocks])


def explored(recommender: Recommender, num_events: int) -> dict[str, dict[str, tuple[float, ...]]]:
    """COLUMNS by what is varied and its value, `beams` first."""
    index = recommender.retriever
    assert isinstance(index, StuIndex)
    events, queries = asked(recommender, num_events)
    first_token = index.codes_of(np.arange(len(index)))[:, 0].astype(np.int64)
    found = {"beams": {"": figures(drawn(index, queries, None), events, first_token)}}
    for varied, settings in SETTINGS.items():
        found[varied] = {
            value: figures(drawn(index, queries, sampling), events, first_token) for value, sampling in settings.items()
        }
    return found


def plot(found: dict[str, dict[str, tuple[float, ...]]], path: Path) -> None:
    """One panel a column but recall, which is the height of all; a line for what is varied, the beams a star."""
    import matplotlib
    from matplotlib.figure import Figure

    from friendrec.pipeline.evaluation.figures import BEST_COLOUR, FAINT, FUSION_COLOUR, MODEL_COLOUR, STYLE

    colours = dict(zip(SETTINGS, (MODEL_COLOUR, BEST_COLOUR, FUSION_COLOUR), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        panels = figure.subplots(1, len(COLUMNS) - 1, sharey=True)
        for column, axes in enumerate(panels, 1):
            for varied, colour in colours.items():
                points = np.array([(row[column], row[0]) for row in found[varied].values()])
                axes.plot(*points.T, "o-", color=colour, markersize=4, linewidth=1.4, label=varied)
                values = list(found[varied])
                for at in (0, -1):
                    axes.annotate(values[at], points[at], (4, 4), textcoords="offset points", size=8, color=colour)
            best = found["beams"][""]
            axes.plot(best[column], best[0], "*", color="black", markersize=11, label="best of the beams")
            axes.set(xlabel=COLUMNS[column])
            axes.grid(color=FAINT)
        panels[0].set_ylabel(COLUMNS[0])
        panels[0].set_ylim(bottom=0)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="what `friendrec prepare` made")
    parser.add_argument("--run", required=True, help="an STU run on it")
    parser.add_argument("--events", type=int, default=2000, help="events asked, at most")
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--write", action="store_true", help="write results/exploration.md, and the plot")
    options = parser.parse_args()
    recommender = open_recommender(options.run, options.data)
    found = explored(recommender, options.events)
    rows = [
        [varied, value, *(f"{number:.3f}" for number in row[:3]), f"{row[3]:.2f}"]
        for varied, settings in found.items()
        for value, row in settings.items()
    ]
    about = f"{len(recommender.data.user_ids):,} users of which {len(recommender.retriever):,} are candidates, {TASK}."
    report("exploration", f"{about}\n\n{table(['varied', 'value', *COLUMNS], rows)}", options.write)
    if options.write:
        plot(found, options.plot)


if __name__ == "__main__":
    run()
