"""The steps of the climb that `friendrec compare` sets side by side, one run a row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from friendrec.errors import FriendrecError
from friendrec.pipeline.arguments import comma_list, did_you_mean


@dataclass(frozen=True)
class Row:
    """A step of the climb: a preset with some fields changed, and in words what it adds to the row before.

    `codes_of` names the row whose embeddings are tokenized for it, where it writes codes; that row is the one before.
    """

    name: str
    adds: str
    preset: str
    overrides: Mapping[str, str | bool] = field(default_factory=dict)
    codes_of: str = ""

    @property
    def flags(self) -> list[str]:
        """The overrides as options of `friendrec train`."""
        names = {name: name.replace("_", "-") for name in self.overrides}
        return [
            f"--{'' if value else 'no-'}{names[name]}" if isinstance(value, bool) else f"--{names[name]}={value}"
            for name, value in self.overrides.items()
        ]


_PLAIN: dict[str, str | bool] = {
    "history_encoder": "none", "interaction": "none", "temporal": False, "copy_term": False,
}  # fmt: skip
_HISTORY = _PLAIN | {"history_encoder": "pooled_attention"}
ROWS = (
    Row("id_dot_product", "a product of two ids' vectors, taught by each user's last event", "two_tower_moe", _PLAIN),
    Row("history", "pooled attention over what the actor did before", "two_tower_moe", _HISTORY),
    Row("mlp", "an MLP over id, history and action", "two_tower_moe", _HISTORY | {"interaction": "mlp"}),
    Row("moe", "four MLPs and a gate in its place", "two_tower_moe", _HISTORY | {"interaction": "moe"}),
    Row(
        "temporal", "every event is an example, not each user's last alone", "two_tower_moe",
        {"history_encoder": "pooled_attention", "copy_term": False},
    ),
    Row(
        "copy_term", "a learned bonus for the actor's own contacts", "two_tower_moe",
        {"history_encoder": "pooled_attention"},
    ),
    Row("transformer", "a transformer over the history: the preset two_tower_moe", "two_tower_moe"),
    Row("clusters", "clusters inside both towers: the preset two_tower_clusters", "two_tower_clusters"),
    Row(
        "stu", "codes of the transformer's embeddings in place of ids, and a decoder that writes them: the preset stu",
        "stu", codes_of="transformer",
    ),
)  # fmt: skip
"""Each differs from the one before in one field, `stu` in the whole preset; a later phase appends its own."""


def chosen_rows(names: str) -> list[Row]:
    """The rows of those names, and those whose codes they write, in their own order; all where none is named."""
    known = [row.name for row in ROWS]
    wanted = comma_list(names) or known
    for name in wanted:
        if name not in known:
            raise FriendrecError(f"--rows has no row {name!r}: {did_you_mean(name, known)}")
    needed = {*wanted, *(row.codes_of for row in ROWS if row.name in wanted)}
    return [row for row in ROWS if row.name in needed]


def rows_before(rows: list[Row]) -> dict[str, str]:
    """The name of the row that each is compared with: the one above, or whose codes it writes; the first has none."""
    above = {row.name: before.name for before, row in pairwise(rows)}
    return above | {row.name: row.codes_of for row in rows if row.codes_of}
