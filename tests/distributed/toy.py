"""A model small enough to check by hand, with the shape of a real one: slots of a user table, tiny side tables."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel

from friendrec.sharding.config import OptimizerConfig, Sharding, ShardingConfig
from friendrec.sharding.optimizers import Optimizers
from friendrec.sharding.parallel import local_shards, shard
from friendrec.sharding.plan import make_plan
from friendrec.sharding.tables import Table, embedding_bag_collection, initial_rows

SEED = 7
USERS = 101  # odd: no world size above 1 divides it
TABLES = (
    Table("user", USERS, 8, ("user",)),
    Table("action", 5, 8, ("action",)),
    Table("direction", 2, 8, ("direction",)),  # fewer rows than three ranks
)
EXAMPLES, SLOTS = 12, 5  # a step's global batch; slots an example


@dataclass(frozen=True)
class Batch:
    """E examples of a rank: slot s of example e is bag e · SLOTS + s of every key. `labels`, `weights`: `[E]`."""

    ids: KeyedJaggedTensor
    labels: Tensor
    weights: Tensor
    global_weight: float


def batch(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """Rank's slice of the global batch of `step`: the same examples whatever the world size."""
    draw = torch.Generator().manual_seed(step)
    ids = {table.name: torch.randint(table.rows, (EXAMPLES, SLOTS), generator=draw) for table in TABLES}
    used = torch.rand(EXAMPLES, SLOTS, generator=draw) < 0.8  # the other bags are empty
    labels = torch.rand(EXAMPLES, generator=draw).round()
    weights = torch.rand(EXAMPLES, generator=draw)
    mine = slice(rank * EXAMPLES // world_size, (rank + 1) * EXAMPLES // world_size)
    jagged = KeyedJaggedTensor(
        keys=[table.name for table in TABLES],
        values=torch.cat([ids[table.name][mine][used[mine]] for table in TABLES]),
        lengths=used[mine].long().flatten().repeat(len(TABLES)),
    )
    return Batch(jagged, labels[mine], weights[mine], float(weights.sum()))


class Toy(nn.Module):
    """Sum the tables, mean over slots, one hidden layer, weighted logistic loss."""

    def __init__(self, collection: EmbeddingBagCollection, hidden: int = 16) -> None:
        super().__init__()
        self.lookup = nn.ModuleDict({"tables": collection})
        self.hidden = nn.Linear(8, hidden)
        self.output = nn.Linear(hidden, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over ranks of the first value is the global batch's weighted mean loss; `loss` is this rank's part."""
        pooled = sum(self.lookup["tables"](batch.ids).to_dict().values())
        logits = self.output(self.hidden(pooled.view(len(batch.labels), SLOTS, -1).mean(1)).tanh()).squeeze(1)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        part = (losses * batch.weights).sum() / batch.global_weight
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return part * ranks, {"loss": part.detach(), "logits": logits.detach()}


def toy(hidden: int = 16, tables: tuple[Table, ...] = TABLES) -> Toy:
    torch.manual_seed(SEED)
    return Toy(embedding_bag_collection(tables), hidden)


def sharded(
    config: OptimizerConfig | None = None,
    hidden: int = 16,
    tables: tuple[Table, ...] = TABLES,
    device: str = "cpu",
    sharding: Sharding = "row_wise",
) -> tuple[DistributedModelParallel, Optimizers]:
    """The toy on the default process group; its dense part is built on `device`, which may be meta."""
    with torch.device(device):
        model = toy(hidden, tables)
    plan = make_plan(model, dist.get_world_size(), ShardingConfig(sharding=sharding), group=dist.group.WORLD)
    dmp = shard(model, plan, torch.device("cpu"), SEED)
    return dmp, Optimizers(dmp, config or OptimizerConfig())


def whole() -> Toy:
    """The toy unsharded, with the rows that sharding would give it."""
    tables = {
        f"lookup.tables.embedding_bags.{t.name}.weight": initial_rows(SEED, t.name, range(t.rows), t.dim)
        for t in TABLES
    }
    dense = {name: value for name, value in toy().state_dict().items() if name not in tables}
    model = Toy(EmbeddingBagCollection(tables=embedding_bag_collection(TABLES).embedding_bag_configs()))
    model.load_state_dict(tables | dense)
    return model


def train(dmp: DistributedModelParallel, optimizers: Optimizers, steps: range, total: int = 20) -> list[float]:
    """Global loss of each step."""
    losses = []
    for step in steps:
        optimizers.start_step(step, total)
        loss, metrics = dmp(batch(step, dist.get_rank(), dist.get_world_size()))
        loss.backward()
        optimizers.finish_step()
        dist.all_reduce(metrics["loss"])
        losses.append(metrics["loss"].item())
    return losses


Parts = dict[str, list[tuple[int, int, Tensor]]]


def all_parts(dmp: DistributedModelParallel, tables: tuple[Table, ...] = TABLES) -> Parts:
    """This rank's (first row, first column, values) of every table."""
    return {
        table.name: [(p.first_row, p.first_column, p.values.clone()) for p in local_shards(dmp, table.name)]
        for table in tables
    }


def assembled(ranks: list[Parts], table: str, size: tuple[int, ...] | None = None) -> Tensor:
    """The whole table from what each rank holds of it: every value somewhere, and the same wherever it is."""
    whole = torch.full(size or next((t.rows, t.dim) for t in TABLES if t.name == table), torch.nan)
    for row, column, values in (part for rank in ranks for part in rank[table]):
        place = whole[row : row + values.shape[0], column : column + values.shape[1]]
        assert (place.isnan() | (place == values)).all()
        place.copy_(values)
    assert not whole.isnan().any()
    return whole
