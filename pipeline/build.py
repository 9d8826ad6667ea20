"""From a run's config and the tables that its data need to the model, not yet sharded."""

import torch

from friendrec.datasets.packing import Tables
from friendrec.models.config import StuConfig
from friendrec.models.stu import Stu
from friendrec.models.two_tower import TwoTower
from friendrec.pipeline.config import RunConfig
from friendrec.sharding.tables import Table, embedding_bag_collection


def build_model(config: RunConfig, tables: Tables) -> TwoTower | Stu:
    """The model with its tables on device meta; its dense parameters are a function of the seed."""
    collection = embedding_bag_collection(
        [Table(name, rows, config.model.dim, tables.features(name)) for name, rows in tables.rows.items()]
    )
    torch.manual_seed(config.training.seed)
    clusters = tables.rows.get("cluster", 0)
    if isinstance(config.model, StuConfig):
        return Stu(config.model, collection, config.context.context_length, tables.sizes, clusters)
    return TwoTower(config.model, collection, config.context.context_length, clusters)
