"""From a run's config and the tables that its data need to the model, not yet sharded."""

import torch

from friendrec.datasets.packing import Tables
from friendrec.models.two_tower import TwoTower
from friendrec.pipeline.config import RunConfig
from friendrec.sharding.tables import Table, embedding_bag_collection


def build_model(config: RunConfig, tables: Tables) -> TwoTower:
    """The model with its tables on device meta; its dense parameters are a function of the seed."""
    collection = embedding_bag_collection(
        [Table(name, rows, config.model.dim, (name,)) for name, rows in tables.rows.items()]
    )
    torch.manual_seed(config.training.seed)
    return TwoTower(config.model, collection, config.context.context_length)
