"""The latest events of each query's history one by one, for a decoder to attend to.

E packed events, B queries, R = size latest events, M = R + 1 places, D dimensions.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from friendrec.datasets.batch import Context
from friendrec.models.features import Slots
from friendrec.models.transformer import take


class Memory(nn.Module):
    """An event as a vector: partner, kind, gap to the event before, age at the query, place from the latest.

    A learned place that is always there stands before the events, for who has none.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.time = nn.Linear(2, dim)
        self.position = nn.Parameter(torch.zeros(size, dim))
        self.nothing = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, context: Context, slots: Slots) -> tuple[Tensor, Tensor]:
        """Vectors `[B, M, D]`, the latest event at place 1, and where one stands, `[B, M]` bool."""
        last_B = torch.searchsorted(context.event_position, context.window_end - 1)  # among the packed events
        older_R = torch.arange(self.size, device=last_B.device)
        stands_BR = older_R < (context.window_end - context.window_begin)[:, None]
        # One event more than there are: what a hidden place reads.
        event_BR = (last_B[:, None] - older_R).masked_fill(~stands_BR, len(context.event_user))
        content_ED = slots.user.index_select(0, context.event_user) + slots.event.index_select(0, context.event_kind)
        content_BRD = take(pad(content_ED, (0, 0, 0, 1)), event_BR)
        events_BRD = content_BRD + self.time(_times(context, event_BR)) + self.position
        places_BMD = torch.cat([self.nothing.expand(len(last_B), 1, -1), events_BRD], dim=1)
        return self.norm(places_BMD), pad(stands_BR, (1, 0), value=True)


def _times(context: Context, event_BR: Tensor) -> Tensor:
    """Gap to the event before and age at the query, 0.1 · log1p(seconds) both, `[B, R, 2]`."""
    time_E, gap_E = pad(context.event_time, (0, 1)), pad(context.event_gap, (0, 1))
    seconds_B1 = torch.expm1(10 * context.clock[:, :1].double())  # since the latest event
    age_BR = seconds_B1 + 1e-6 * (time_E[event_BR[:, :1]] - time_E[event_BR])
    return torch.stack([gap_E[event_BR], 0.1 * torch.log1p(age_BR.clamp(min=0)).to(gap_E)], dim=2)
