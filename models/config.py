"""Shape of the models; free of torch, so that the command line stays quick."""

import math
from dataclasses import dataclass
from typing import Literal

from friendrec.errors import FriendrecError


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of what every model has: tables, history encoder, interaction network, copy term."""

    dim: int = 64
    """Dimensions of every table and of the query vector; a multiple of 4 and of num_heads."""
    history_encoder: Literal["pooled_attention", "transformer", "none"] = "pooled_attention"
    """`pooled_attention`: learned queries over the history; `transformer`: events that attend to earlier events;
    `none`: the history is not read."""
    num_heads: int = 4
    """Attention heads of the history encoder; for pooled attention the number of learned queries."""
    num_layers: int = 1
    """Layers of the transformer before its read-out; each and the read-out look back context_length / (num_layers + 1)
    events."""
    interaction: Literal["mlp", "moe", "none"] = "mlp"
    """Network that makes the query vector: one MLP, or a mixture of experts; `none`: it is linear."""
    num_experts: int = 4
    """MLPs in the mixture of experts, each of width `hidden`."""
    gate_top_k: int = 0
    """Experts that an example's gate keeps; 0 keeps all (dense softmax gate). Fewer needs the load-balancing loss."""
    balance_loss: float = 0.01
    """Weight of the load-balancing loss of a top-k gate. Raise it when the logged entropy of the experts falls."""
    hidden: int = 128
    """Width of the hidden layers."""
    copy_term: bool = True
    """Learn a bonus for the actor's own contacts; off shows what ids alone can do."""
    clusters: Literal["off", "residual", "representation"] = "off"
    """Clusters inside the model, learned with it. `residual`: a learned share of the clustered vector is added to the
    vector of each tower; `representation`: it takes its place, so that users of a cluster look alike. Either gives
    two towers the lists of an index of kind clusters; tokens have an index of their own."""
    num_clusters: int = 0
    """Centroids; 0 is about √users, and from 65,536 users on one for 256. A square number where two_level."""
    two_level: bool = True
    """√C cells of √C centroids: a query scores the cells, then the centroids of the best. Off: it scores all."""
    co_assignment_loss: float = 0.1
    """Weight of the loss that a query should expect its target's list. More finds more friends in fewer lists."""
    list_balance_loss: float = 0.1
    """Weight of the loss that lists should be equally long. Raise it when the logged `fullest` is above 4."""

    def __post_init__(self) -> None:
        if min(self.dim, self.num_heads, self.hidden) < 1 or self.dim % 4 or self.dim % self.num_heads:
            raise FriendrecError(
                f"dim {self.dim} must be a multiple of 4 and of num_heads {self.num_heads}; all widths at least 1"
            )
        if min(self.num_layers, self.num_experts) < 1:
            raise FriendrecError("num_layers and num_experts must be at least 1")
        if not 0 <= self.gate_top_k <= self.num_experts:
            raise FriendrecError(f"gate_top_k {self.gate_top_k} must be between 0 and num_experts {self.num_experts}")
        if self.gate_top_k and self.interaction != "moe":
            raise FriendrecError(f"gate_top_k {self.gate_top_k} must come with --interaction moe: an mlp has no gate")
        for name in ("balance_loss", "co_assignment_loss", "list_balance_loss"):
            _check_not_negative(name, getattr(self, name))
        if self.num_clusters < 0 or (self.two_level and math.isqrt(self.num_clusters) ** 2 != self.num_clusters):
            near = round(max(self.num_clusters, 1) ** 0.5) ** 2
            raise FriendrecError(
                f"num_clusters {self.num_clusters} is no square of cells: pass {near}, 0 to go by the number of users, "
                "or --no-two-level"
            )

    def clusters_of(self, num_users: int) -> int:
        """Centroids for so many users; 0 where clusters are off."""
        if self.clusters == "off":
            return 0
        wanted = self.num_clusters or round(max(num_users**0.5, num_users / 256) ** 0.5) ** 2
        if wanted > num_users:
            raise FriendrecError(f"num_clusters {wanted} are more than the {num_users} users: pass fewer, or 0")
        return wanted


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig(EncoderConfig):
    """Shape of the two towers."""

    dense_loss: float = 0.1
    """Weight of a second loss on the dot product alone; more finds more new friends and fewer old ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_not_negative("dense_loss", self.dense_loss)


@dataclass(frozen=True, kw_only=True)
class StuConfig(EncoderConfig):
    """Shape of the model that writes codes of users."""

    decoder: Literal["transformer", "towers"] = "transformer"
    """`towers`: an MLP a level of the codes; `transformer`: one small causal transformer over the tokens so far."""
    decoder_hidden: int = 256
    """Width of the hidden layers of the decoder."""
    decoder_layers: int = 1
    """Layers of the transformer decoder."""
    memory: int = 32
    """Most recent events of the history that the decoder attends to, one by one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.decoder_hidden, self.decoder_layers, self.memory) < 1:
            raise FriendrecError("decoder_hidden, decoder_layers and memory must be at least 1")


def _check_not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise FriendrecError(f"{name} {value} must not be negative")
