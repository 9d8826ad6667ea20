"""Recommend friends to every user: Parquet of user_id, rank, candidate_id, score.

Users never see themselves, whom they have already contacted, or who is blocked either way.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from friendrec.errors import FriendrecError
from friendrec.pipeline.publish import is_finished
from friendrec.pipeline.times import end_of_log, format_time, parse_time
from friendrec.pipeline.together import publish_together, say

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from friendrec.datasets.prepared import PreparedData
    from friendrec.models.sampling import Sampling
    from friendrec.pipeline.inference import Recommender

EXAMPLES = """
friendrec recommend --run RUN --data DATA --index INDEX --k 100 --out RECS
friendrec recommend --run RUN --data DATA --index INDEX --users cohort.parquet --as-of 2025-01-01T00:00:00Z --out RECS
friendrec recommend --run STU_RUN --data DATA --index STU_INDEX --temperature 1.5 --nucleus 0.9 --seed 7 --out RECS
"""


@dataclass(frozen=True, kw_only=True)
class RecommendOptions:
    """For whom, as of when, how many."""

    run: str
    """Finished run: what `friendrec train` made; it encodes the queries."""
    data: str
    """Prepared data that the run was trained on."""
    index: str
    """Index of the run's target vectors or tokens: what `friendrec index` made."""
    out: str
    """Directory of the recommendations: part-<rank>.parquet."""
    users: str | None = None
    """Parquet file with a column user_id; by default every user of the data."""
    as_of: str | None = None
    """Time (ISO 8601, UTC unless it says otherwise) before which events count; by default the end of the log."""
    k: int = 100
    """Recommendations a user; fewer where fewer candidates are allowed."""
    temperature: float | None = None
    """STU runs: draw k different friends in place of the best, with the tokens' log-probabilities divided by this.
    Below 1 for likelier friends, above 1 for more variety; 1 where only another of these options is given. The score is
    then that of the draw: the logarithm of the probability with noise."""
    top_k_tokens: int | None = None
    """STU runs: draw among so many of the likeliest tokens at each level. Fewer for less surprise."""
    nucleus: float | None = None
    """STU runs: draw among the fewest tokens that have this share of the probability at each level, as 0.9."""
    seed: int | None = None
    """STU runs: another seed draws other friends, the same one the same; 0 where only another of these is given."""


def main(options: RecommendOptions) -> None:
    """Each rank answers its share of the users."""
    if options.k < 1:
        raise FriendrecError(f"--k {options.k}: ask for at least 1 recommendation")
    sampling = _sampling(options)
    inputs = {"run": options.run, "data": options.data, "index": options.index}
    inputs |= {"users": options.users} if options.users else {}
    if is_finished(options.out, kind="recommendations", options=options, inputs=inputs):
        say(f"{options.out} is up to date")
        return
    wanted = parse_time(options.as_of, "--as-of") if options.as_of else None
    import numpy as np
    import pyarrow.parquet as pq
    import torch.distributed as dist

    from friendrec.pipeline.inference import open_recommender
    from friendrec.sharding.parallel import process_group

    extra: dict[str, Any] = {"k": options.k}
    with process_group():
        rank, world = dist.get_rank(), dist.get_world_size()
        with publish_together(
            options.out, kind="recommendations", options=options, inputs=inputs, extra=extra
        ) as attempt:
            recommender = open_recommender(options.run, options.data, options.index)
            if sampling is not None:
                recommender = _drawing(recommender, sampling)
            data = recommender.data
            as_of = end_of_log(data) if wanted is None else wanted
            users = chosen_users(options.users, data)
            extra.update(as_of=as_of, users=len(users))
            share = np.array_split(users, world)[rank]
            table = recommendations(recommender, share, as_of, options.k, progress=rank == 0)
            pq.write_table(table, attempt / f"part-{rank}.parquet")
        say(f"{len(users):,} users as of {format_time(as_of)}: {options.out}")


def _sampling(options: RecommendOptions) -> "Sampling | None":
    """How to draw, where the options ask for a draw."""
    from friendrec.models.sampling import Sampling

    given = {"temperature": options.temperature, "top_k": options.top_k_tokens}
    given |= {"nucleus": options.nucleus, "seed": options.seed}
    kept: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Sampling(**kept) if kept else None


def _drawing(recommender: "Recommender", sampling: "Sampling") -> "Recommender":
    """The recommender, whose index draws."""
    from friendrec.pipeline.retrieval.stu import StuIndex

    if not isinstance(recommender.retriever, StuIndex):
        raise FriendrecError(
            "--temperature, --top-k-tokens, --nucleus and --seed draw tokens, which only an STU run writes: leave them "
            "out, or pass --run of `friendrec train stu`"
        )
    return replace(recommender, retriever=replace(recommender.retriever, sampling=sampling))


def recommendations(
    recommender: "Recommender", users: "NDArray[np.int64]", as_of: int, k: int, progress: bool = False
) -> "pa.Table":
    """The best k candidates of dense user rows as of a time (µs): columns user_id, rank, candidate_id, score."""
    import numpy as np
    import pyarrow as pa
    from rich.progress import track

    from friendrec.pipeline.inference import num_blocks

    blocks = np.array_split(users, num_blocks(len(users)))
    rows = [
        recommender.recommend(block, np.full(len(block), as_of), k)
        for block in track(blocks, "recommending", disable=not progress)
    ]
    ids, scores = (np.concatenate(part) for part in zip(*rows, strict=True))
    query, place = np.nonzero(ids >= 0)  # -1 where there is none
    user_ids = recommender.data.user_ids
    columns = {
        "user_id": user_ids[users[query]],
        "rank": (place + 1).astype(np.int32),
        "candidate_id": user_ids[ids[query, place]],
        "score": scores[query, place],
    }
    return pa.table(columns)


def chosen_users(file: str | None, data: "PreparedData") -> "NDArray[np.int64]":
    """Dense rows of the users named in a Parquet file, in its order, or of all."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file is None:
        return np.arange(data.num_users)
    try:
        wanted = pq.read_table(file, columns=["user_id"])["user_id"].cast(pa.array(data.user_ids).type)
    except (OSError, pa.ArrowException) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise FriendrecError(f"--users {file}: {reason}; give a Parquet file with a column user_id") from None
    return user_rows(wanted, data, f"--users {file}")


def user_rows(user_ids: "pa.Array | pa.ChunkedArray", data: "PreparedData", source: str) -> "NDArray[np.int64]":
    """Dense rows of raw ids, in their order; `source` names where they come from in what is said of unknown ones."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = pc.index_in(user_ids, value_set=pa.array(data.user_ids))
    if rows.null_count:
        first = user_ids.filter(rows.is_null())[0]
        raise FriendrecError(
            f"{source}: {rows.null_count} users are not in the prepared data, the first is {first}; "
            "prepare a log that holds them, or leave them out"
        )
    return rows.to_numpy().astype(np.int64)
