"""What a table of tokens is worth: codebooks used, collisions, errors, neighbours, changes since an earlier one."""

from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from friendrec.models.alignment import changed_share
from friendrec.models.codes import code_numbers, num_sharing
from friendrec.models.tokenizer import Tokenizer, Tokens, Vectors
from friendrec.models.trie import NO_TOKEN
from friendrec.pipeline.tokens import StuTable, rows_in

if TYPE_CHECKING:
    from rich.table import Table

NEIGHBOURS = 10
TOO_MUCH = 1.25
"""Error that kept codes leave, as a multiple of that of new ones, from which on keeping them is advised against."""
SAMPLE = 2000
"""Users whose neighbours are looked at."""


def describe_tokens(
    tokenizer: Tokenizer, vectors: Vectors, before: Tokens, table: StuTable, old: StuTable | None
) -> dict[str, Any]:
    """Plain numbers on the codes of `vectors` `[U, D]`: `before` they were made unique, `[U, L]`, and after.

    Errors are relative to the variance of the vectors. Neighbours are the 10 nearest by Euclidean distance: it bounds
    by how much the score of two users may differ for any query, and is what the tokenizer keeps small.
    """
    codes, num_levels = table.tokens, len(tokenizer.sizes)
    shared_by_chance = np.bincount(codes[:, 0]) / len(codes)
    report: dict[str, Any] = {
        "users": len(codes),
        "sizes": list(table.sizes),
        "levels": [_describe_level(tokenizer, vectors, codes, level) for level in range(num_levels)],
        "collision_rate_before": num_sharing(before) / len(codes),
        "collision_rate_after": num_sharing(codes) / len(codes),
        "moved_users": int((before[:, :num_levels] != codes[:, :num_levels]).any(axis=1).sum()),
        "disambiguated_users": int((codes[:, num_levels:] != NO_TOKEN).sum()),
        "reconstruction_error_before": _error(tokenizer, vectors, before[:, :num_levels]),
        "reconstruction_error": _error(tokenizer, vectors, codes[:, :num_levels]),
        "neighbour_preservation": neighbour_preservation(vectors, codes[:, 0]),
        "neighbour_preservation_by_chance": float(np.square(shared_by_chance).sum()),
    }
    if old is not None:
        report |= churn(old, table)
    return report


def churn(old: StuTable, new: StuTable) -> dict[str, Any]:
    """How many users both tables have, and the share of them whose code, or token of a level, is another one."""
    rows = rows_in(old, new.user_ids)
    both = rows >= 0
    whole, levels = changed_share(old.tokens[rows[both]], new.tokens[both])
    return {"common_users": int(both.sum()), "churn": whole, "churn_of_levels": levels}


def neighbour_preservation(vectors: Vectors, first: np.ndarray) -> float:
    """Share of a user's 10 nearest others that have its `first` token `[U]`, over a sample of users."""
    sample = np.random.default_rng(0).permutation(len(vectors))[:SAMPLE]
    wanted = min(NEIGHBOURS + 1, len(vectors))
    _, near = faiss.knn(vectors[sample], vectors, wanted)
    others = near != sample[:, None]
    others &= np.cumsum(others, axis=1) <= NEIGHBOURS  # where equals hide the user itself
    same = (first[near] == first[sample][:, None]) & others
    return float(same.sum() / max(others.sum(), 1))


def as_table(report: dict[str, Any]) -> "Table":
    """The report as it is printed."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("level", "tokens", "used", "perplexity", "fullest prefix", "error left", box=SIMPLE)
    for number, level in enumerate(report["levels"]):
        table.add_row(
            str(number),
            str(level["tokens"]),
            f"{level['utilisation']:.1%}",
            f"{level['perplexity']:.1f}",
            str(level["fullest_prefix"]),
            f"{level['reconstruction_error']:.3f}",
        )
    table.caption = caption(report)
    table.caption_justify = "left"
    return table


def caption(report: dict[str, Any]) -> str:
    """What is told of all levels together, a line each."""
    lines = [
        f"{report['collision_rate_before']:.2%} of users shared a code, {report['collision_rate_after']:.2%} do after "
        f"{report['moved_users']:,} moved and {report['disambiguated_users']:,} were numbered",
        f"{report['neighbour_preservation']:.1%} of the 10 nearest have a user's first token "
        f"({report['neighbour_preservation_by_chance']:.1%} by chance)",
    ]
    if "churn" in report:
        lines.append(f"{report['churn']:.2%} of the users of before have another code")
    if "from_scratch" in report:
        fresh = report["from_scratch"]
        lines.append(
            f"{report['reconstruction_error']:.1%} of the variance is left; new codebooks would leave "
            f"{fresh['reconstruction_error']:.1%} and change {fresh['churn']:.2%} of the codes"
        )
        if report["reconstruction_error"] > TOO_MUCH * fresh["reconstruction_error"]:
            lines.append("the vectors have moved too far for the codes of before: better tokenize without --start-from")
    if "newcomers" in report:
        late = report["newcomers"]
        lines.append(
            f"{late['users']:,} newcomers have codes, by what explains {late['explained']:.1%} of late users' vectors"
        )
    return "\n".join(lines)


def _describe_level(tokenizer: Tokenizer, vectors: Vectors, codes: Tokens, level: int) -> dict[str, Any]:
    size, counts = tokenizer.sizes[level], np.bincount(codes[:, level])
    share = counts[counts > 0] / len(codes)
    return {
        "tokens": size,
        "utilisation": int((counts > 0).sum()) / size,
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
        "fullest_prefix": int(np.bincount(code_numbers(codes[:, : level + 1])).max()),
        "reconstruction_error": _error(tokenizer, vectors, codes[:, : level + 1]),
    }


def _error(tokenizer: Tokenizer, vectors: Vectors, tokens: Tokens) -> float:
    """Mean squared error of what the tokens stand for, relative to the variance of the vectors; 0 where that is 0."""
    variance = np.square(vectors - vectors.mean(axis=0), dtype=np.float64).sum()
    error = np.square(vectors - tokenizer.decode(tokens), dtype=np.float64).sum()
    return float(error / variance) if variance else 0.0
