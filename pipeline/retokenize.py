"""Tokenizing again, from the tokens of before: who keeps a code, and what codebooks made anew would be worth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from friendrec.errors import FriendrecError
from friendrec.models.alignment import keep_codes, realign
from friendrec.models.codes import unique_codes
from friendrec.models.rqvae import RqVae, continue_rqvae
from friendrec.models.tokenizer import Codebooks, Tokenizer, Tokens, Vectors
from friendrec.models.tokenizer_config import TokenizerConfig
from friendrec.models.trie import NO_TOKEN
from friendrec.pipeline.publish import open_published
from friendrec.pipeline.retrieval.files import UserIds
from friendrec.pipeline.token_report import describe_tokens
from friendrec.pipeline.tokens import StuTable, read_tokens, rows_in


def load_tokenizer(directory: Path, method: str) -> Tokenizer:
    """The tokenizer of a directory that the caller has opened, of `manifest.extra["method"]`."""
    path = directory / "codebooks.npz"
    return RqVae.load(path) if method == "rqvae" else Codebooks.load(path)


def open_earlier(source: str, config: TokenizerConfig, dim: int) -> tuple[StuTable, Tokenizer]:
    """The tokens of before and what made them, for vectors of `dim` dimensions."""
    directory, _ = open_published(source, "stu")
    table, manifest = read_tokens(source)
    method, shape = manifest.extra["method"], (manifest.extra["num_codebooks"], manifest.extra["codebook_size"])
    if method != config.method:
        raise FriendrecError(f"{source} was made by {method}: pass --method {method}, or leave out --start-from")
    if (config.num_codebooks, config.codebook_size or shape[1]) != shape:
        raise FriendrecError(
            f"{source} has {shape[0]} codebooks of {shape[1]} tokens: "
            f"pass --num-codebooks {shape[0]} --codebook-size {shape[1]}, or leave out --start-from"
        )
    tokenizer = load_tokenizer(directory, method)
    width = tokenizer.decode(table.tokens[:1, : shape[0]]).shape[1]
    if width != dim:
        raise FriendrecError(f"{source} is of vectors of {width} dimensions, not {dim}: leave out --start-from")
    return table, tokenizer


def codes_from_before(
    config: TokenizerConfig,
    earlier: tuple[StuTable, Tokenizer],
    user_ids: UserIds,
    vectors: Vectors,
    margin: float,
    after_step: Callable[[], object],
) -> tuple[Tokenizer, Tokens, NDArray[np.bool_]]:
    """The tokenizer of before, moved to where the vectors `[N, D]` are, codes for all, and who keeps the old one."""
    table, tokenizer = earlier
    old = codes_of_users(table, user_ids)
    if (old[:, 0] == NO_TOKEN).all():
        raise FriendrecError("none of the users of --start-from is one of the embeddings': leave out --start-from")
    if isinstance(tokenizer, Codebooks):
        realigned = realign(tokenizer, vectors, old, margin)
        after_step()
        return realigned
    assert isinstance(tokenizer, RqVae)
    tokenizer = continue_rqvae(tokenizer, vectors, old, config.seed, config.rqvae, after_step)
    return tokenizer, *keep_codes(tokenizer, vectors, old, margin)


def codes_of_users(table: StuTable, user_ids: UserIds) -> Tokens:
    """The codes of these users, `[N, L]`; NO_TOKEN throughout where the table has none."""
    rows = rows_in(table, user_ids)
    return np.where(rows[:, None] >= 0, table.tokens[rows], np.int32(NO_TOKEN))


def describe_from_scratch(
    made: tuple[Tokenizer, Tokens], user_ids: UserIds, vectors: Vectors, old: StuTable
) -> dict[str, Any]:
    """What codes made without those of before are worth, and how many users would have to change theirs."""
    tokenizer, tokens = made
    table = StuTable(user_ids, unique_codes(tokenizer, vectors, tokens), ())
    report = describe_tokens(tokenizer, vectors, tokens, table, old)
    names = ("churn", "churn_of_levels", "reconstruction_error", "neighbour_preservation")
    return {name: report[name] for name in names}
