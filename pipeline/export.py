"""Write the query and target vector of every user, each rank the rows it owns.

Rows stay on the rank that holds them: a rank encodes the users of its shard, block by block, and nothing is gathered.
"""

from dataclasses import dataclass
from typing import Literal

from friendrec.errors import FriendrecError
from friendrec.pipeline.publish import is_finished
from friendrec.pipeline.times import end_of_log, format_time, parse_time
from friendrec.pipeline.together import publish_together, say

EXAMPLES = """
friendrec export --run RUN --data DATA --out EMBEDDINGS
friendrec export --run RUN --data DATA --out EMBEDDINGS --as-of 2025-01-01T00:00:00Z --dtype float16
torchrun --nproc-per-node 2 --no-python -- friendrec export --run RUN --data DATA --out EMBEDDINGS
"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which run, as of when, how precise."""

    run: str
    """Finished run: what `friendrec train` made."""
    data: str
    """Prepared data that the run was trained on."""
    out: str
    """Directory of the embeddings: part-<rank>.parquet with user_id, query, target; clusters.npz of a run with
    clusters."""
    as_of: str | None = None
    """Time (ISO 8601, UTC unless it says otherwise) before which events count; by default the end of the log."""
    dtype: Literal["float32", "float16", "int8"] = "float32"
    """Precision of the vectors; int8 adds a scale a vector."""


def main(options: ExportOptions) -> None:
    """Load the run's best checkpoint sharded, encode, publish."""
    inputs = {"run": options.run, "data": options.data}
    if is_finished(options.out, kind="embeddings", options=options, inputs=inputs):
        say(f"{options.out} is up to date")
        return
    wanted = parse_time(options.as_of, "--as-of") if options.as_of else None
    import numpy as np
    import torch.distributed as dist

    from friendrec.datasets.packing import Packer
    from friendrec.models.config import TwoTowerConfig
    from friendrec.pipeline.build import build_model
    from friendrec.pipeline.embeddings import write_centroids, write_part
    from friendrec.pipeline.inference import centroids_of, encode_queries, encode_targets, num_blocks, open_run
    from friendrec.sharding import checkpoint
    from friendrec.sharding.parallel import process_group, shard
    from friendrec.sharding.plan import make_plan

    config, data, weights = open_run(options.run, options.data)
    if not isinstance(config.model, TwoTowerConfig):
        raise FriendrecError(
            f"{options.run} writes codes of users and has no vectors: export the run whose embeddings were tokenized"
        )
    packer = Packer(data, config.context, clusters=config.model.clusters_of(data.num_train_users))
    as_of = end_of_log(data) if wanted is None else wanted
    model = build_model(config, packer.tables)
    with process_group() as device:
        plan = make_plan(model, dist.get_world_size(), group=dist.group.WORLD)
        sharded = shard(model, plan, device, config.training.seed)
        checkpoint.load(weights, sharded)
        sharded.eval()
        share = -(-packer.tables.rows["user"] // dist.get_world_size())  # row-wise, however the run was trained
        own = np.arange(dist.get_rank() * share, min((dist.get_rank() + 1) * share, data.num_train_users))
        blocks = num_blocks(share)
        centroids = centroids_of(sharded.module, packer)
        extra = {"as_of": as_of, "dimensions": config.model.dim + 1, "dtype": options.dtype}
        if centroids is not None:
            extra["clusters"] = len(centroids)
        with publish_together(options.out, kind="embeddings", options=options, inputs=inputs, extra=extra) as attempt:
            targets = encode_targets(sharded.module, packer, own, blocks)
            queries = encode_queries(sharded.module, packer, own, np.full(len(own), as_of), blocks)
            part = attempt / f"part-{dist.get_rank()}.parquet"
            write_part(part, data.user_ids[own], queries.vector, targets, options.dtype)
            if centroids is not None and dist.get_rank() == 0:
                write_centroids(attempt, centroids)
        say(f"{data.num_train_users:,} users as of {format_time(as_of)}: {options.out}")
