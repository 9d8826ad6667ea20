"""Give every user a code of few tokens, learned from exported embeddings: a social tokenized user ID (STU).

Near target vectors begin with the same tokens, and no two users share a code. The directory holds tokens.parquet,
codebooks.npz, with which more vectors are tokenized the same way, and report.json.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from friendrec.errors import FriendrecError
from friendrec.models.tokenizer_config import TokenizerConfig
from friendrec.pipeline.publish import is_finished, open_published, publish

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.progress import Progress

    from friendrec.models.tokenizer import Tokenizer, Tokens, Vectors
    from friendrec.pipeline.retrieval.files import UserIds
    from friendrec.pipeline.tokens import StuTable

    Earlier = tuple[StuTable, Tokenizer]

EXAMPLES = """
friendrec tokenize --embeddings EMBEDDINGS --out STU
friendrec tokenize --embeddings EMBEDDINGS --method rqvae --num-codebooks 4 --codebook-size 128 --out STU
friendrec tokenize --embeddings NEWER_EMBEDDINGS --start-from STU --out NEWER_STU
friendrec tokenize --embeddings EMBEDDINGS --data DATA --newcomers --out STU
"""


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions(TokenizerConfig):
    """Whose vectors become codes, how, starting from what."""

    embeddings: str
    """Directory or URL that `friendrec export` made; the target vectors are tokenized, without their last component,
    the bias."""
    start_from: str | None = None
    """Earlier tokens (what `friendrec tokenize` made): its codebooks move to where the vectors are now, and users keep
    their codes where these still fit; the report tells how many changed, and what new codebooks would be worth."""
    margin: float = 0.25
    """--start-from: a user's code changes only where another lowers the user's squared error by more than this share.
    Raise it to change fewer, lower it to lie nearer to the vectors."""
    data: str | None = None
    """Prepared data of the embeddings, which --newcomers needs."""
    newcomers: bool = False
    """Give codes to users of the data who were not trained too, from their profile or first events."""
    out: str
    """Directory or URL to create."""


@dataclass(frozen=True)
class Draft:
    """Codes of the embeddings' users that may still be shared."""

    tokenizer: "Tokenizer"
    tokens: "Tokens"  # [U, L], or [U, L + 1] where the fixed come from a table with a level of disambiguation
    fixed: "NDArray[np.bool_]"  # [U] users whose code stays as it is


def main(options: TokenizeOptions) -> None:
    """Publish the codes at `options.out`, or find them there already."""
    _check(options)
    named = {"embeddings": options.embeddings, "start_from": options.start_from, "data": options.data}
    inputs = {name: path for name, path in named.items() if path is not None}
    if is_finished(options.out, kind="stu", options=options, inputs=inputs):
        print(f"{options.out} holds these tokens already.")
        return
    import json

    from rich.console import Console
    from rich.progress import Progress

    from friendrec.models.codes import unique_codes
    from friendrec.pipeline.token_report import as_table, describe_tokens
    from friendrec.pipeline.tokens import TOKENS, StuTable, write_tokens

    user_ids, vectors = read_target_vectors(options.embeddings)
    earlier = _open_earlier(options, vectors.shape[1])
    old = earlier[0] if earlier else None
    extra: dict[str, object] = {}
    with (
        publish(options.out, kind="stu", options=options, inputs=inputs, extra=extra) as attempt,
        Progress() as progress,
    ):
        draft = first_codes(options, earlier, user_ids, vectors, progress)
        tokenizer = draft.tokenizer
        codes = unique_codes(tokenizer, vectors, draft.tokens, draft.fixed)
        table = StuTable(user_ids, codes, sizes_of(tokenizer, codes))
        report = describe_tokens(tokenizer, vectors, draft.tokens, table, old)
        if old is not None:
            report["from_scratch"] = from_scratch(options, tokenizer.sizes[0], old, user_ids, vectors, progress)
        if options.data is not None:
            table, report["newcomers"] = with_newcomers(options, options.data, tokenizer, table, vectors, old)
        report["sizes"] = list(table.sizes)
        write_tokens(attempt / TOKENS, table.user_ids, table.tokens)
        tokenizer.save(attempt / "codebooks.npz")
        (attempt / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        extra |= {
            "sizes": list(table.sizes),
            "num_codebooks": len(tokenizer.sizes),
            "codebook_size": tokenizer.sizes[0],
            "method": options.method,
        }
    Console().print(as_table(report))
    num = len(table.user_ids)
    print(f"{options.out}: {num:,} users, {' × '.join(map(str, table.sizes))} tokens, no code shared")


def _check(options: TokenizeOptions) -> None:
    if options.newcomers and options.data is None:
        raise FriendrecError("--newcomers needs --data: pass the prepared data of the embeddings")
    if options.data is not None and not options.newcomers:
        raise FriendrecError("--data is read for newcomers only: pass --newcomers too, or leave it out")
    if options.balanced and options.start_from is not None:
        raise FriendrecError("--balanced shapes new codebooks, --start-from keeps the old ones: leave one out")
    if not 0 <= options.margin < 1:
        raise FriendrecError(f"--margin {options.margin}: give a share from 0 to below 1")


def read_target_vectors(embeddings: str) -> "tuple[UserIds, Vectors]":
    """User ids `[U]` and target vectors `[U, D]` without the bias."""
    import numpy as np

    from friendrec.pipeline.embeddings import read_embeddings

    user_ids, vectors = read_embeddings(open_published(embeddings, "embeddings")[0], "target")
    if not np.isfinite(vectors).all():
        raise FriendrecError(f"{embeddings} holds vectors that are not finite: train and export again")
    return user_ids, np.ascontiguousarray(vectors[:, :-1])


def _open_earlier(options: TokenizeOptions, dim: int) -> "Earlier | None":
    if options.start_from is None:
        return None
    from friendrec.pipeline.retokenize import open_earlier

    return open_earlier(options.start_from, options, dim)


def first_codes(
    options: TokenizeOptions, earlier: "Earlier | None", user_ids: "UserIds", vectors: "Vectors", progress: "Progress"
) -> Draft:
    """Codes of the embeddings' users by new codebooks, or by those of earlier tokens."""
    import numpy as np

    if earlier is None:
        made = train(options, vectors, options.size_for(len(vectors)), progress)
        return Draft(*made, np.zeros(len(vectors), bool))
    from friendrec.pipeline.retokenize import codes_from_before

    steps = options.rqvae.steps if options.method == "rqvae" else 1
    task = progress.add_task("moving the codebooks", total=steps)
    advance = partial(progress.advance, task)
    return Draft(*codes_from_before(options, earlier, user_ids, vectors, options.margin, advance))


def train(options: TokenizeOptions, vectors: "Vectors", size: int, progress: "Progress") -> "tuple[Tokenizer, Tokens]":
    """A new tokenizer of `size` tokens a level, and the codes of the vectors."""
    fit = train_rqvae if options.method == "rqvae" else train_rqkmeans
    return fit(options, vectors, size, progress)


def train_rqkmeans(
    options: TokenizeOptions, vectors: "Vectors", size: int, progress: "Progress"
) -> "tuple[Tokenizer, Tokens]":
    """Residual k-means on all users."""
    from friendrec.models.tokenizer import fit_residual_kmeans

    task = progress.add_task("tokenizing", total=options.num_codebooks)
    return fit_residual_kmeans(
        vectors, options.num_codebooks, size, options.seed, options.balanced, lambda: progress.advance(task)
    )


def train_rqvae(
    options: TokenizeOptions, vectors: "Vectors", size: int, progress: "Progress"
) -> "tuple[Tokenizer, Tokens]":
    """Codebooks trained with an encoder and a decoder, from k-means."""
    from friendrec.models.rqvae import fit_rqvae

    task = progress.add_task("training", total=options.rqvae.steps)
    tokenizer = fit_rqvae(
        vectors, options.num_codebooks, size, options.seed, options.rqvae, lambda: progress.advance(task)
    )
    return tokenizer, tokenizer.encode(vectors)


def from_scratch(
    options: TokenizeOptions, size: int, old: "StuTable", user_ids: "UserIds", vectors: "Vectors", progress: "Progress"
) -> dict[str, Any]:
    """What keeping the earlier codes costs: the figures of codes that are made without them."""
    from friendrec.pipeline.retokenize import describe_from_scratch

    made = train(options, vectors, min(size, len(vectors)), progress)
    return describe_from_scratch(made, user_ids, vectors, old)


def with_newcomers(
    options: TokenizeOptions,
    data: str,
    tokenizer: "Tokenizer",
    table: "StuTable",
    vectors: "Vectors",
    old: "StuTable | None",
) -> "tuple[StuTable, dict[str, Any]]":
    """The table with the data's users who were not trained, in vocabulary order; nobody else's code changes."""
    import numpy as np

    from friendrec.datasets.prepared import load_prepared
    from friendrec.models.placement import codes_in_turn, widened
    from friendrec.models.trie import NO_TOKEN
    from friendrec.pipeline.first_events import vectors_of_newcomers
    from friendrec.pipeline.retokenize import codes_of_users
    from friendrec.pipeline.tokens import StuTable

    prepared = load_prepared(open_published(data, "data")[0])
    if not np.array_equal(table.user_ids, prepared.user_ids[: prepared.num_train_users]):
        raise FriendrecError(f"{options.embeddings} holds other users than {data}: export them for this data")
    newcomers = prepared.user_ids[prepared.num_train_users :]
    found, regression = vectors_of_newcomers(prepared, vectors)
    before = np.full((len(newcomers), 1), NO_TOKEN, np.int32) if old is None else codes_of_users(old, newcomers)
    added = codes_in_turn(tokenizer, found, table.tokens, before)
    codes = np.concatenate([widened(table.tokens, added.shape[1]), added])
    figures = {"users": len(newcomers), "penalty": regression.penalty, "explained": regression.explained}
    return StuTable(prepared.user_ids, codes, sizes_of(tokenizer, codes)), figures


def sizes_of(tokenizer: "Tokenizer", codes: "Tokens") -> tuple[int, ...]:
    """Tokens of each level of the codes; of that of disambiguation as many as its largest group has users."""
    sizes = tokenizer.sizes
    return sizes if codes.shape[1] == len(sizes) else (*sizes, max(int(codes[:, -1].max()) + 1, 1))
