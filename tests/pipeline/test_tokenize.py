"""The `tokenize` verb: embeddings in, a table of unique codes and a report out."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from friendrec.errors import FriendrecError
from friendrec.models.tokenizer import Codebooks
from friendrec.models.trie import NO_TOKEN
from friendrec.pipeline import tokenize
from friendrec.pipeline.cli import main as friendrec
from friendrec.pipeline.embeddings import write_part
from friendrec.pipeline.publish import open_published, publish
from friendrec.pipeline.tokenize import TokenizeOptions
from friendrec.pipeline.tokens import read_tokens

USERS = np.array([f"user{row}" for row in range(240)], object)
TARGETS = np.random.default_rng(0).standard_normal((240, 5)).astype(np.float32)
TARGETS[:, :2] *= 3
VECTORS = TARGETS[:, :-1]


def embeddings_of(path: Path, targets: np.ndarray, queries: np.ndarray | None = None) -> str:
    """What export would publish: two parts where there are two users, the last component being the bias."""
    queries = -targets if queries is None else queries
    with publish(path, kind="embeddings", options=None, inputs={}) as attempt:
        for rank, rows in enumerate(np.array_split(np.arange(len(targets)), min(2, len(targets)))):
            write_part(attempt / f"part-{rank}.parquet", USERS[rows], queries[rows], targets[rows], "float32")
    return str(path)


@pytest.fixture
def embeddings(tmp_path: Path) -> str:
    return embeddings_of(tmp_path / "embeddings", TARGETS)


def run(embeddings: str, out: Path, **options: Any) -> dict[str, Any]:
    """Tokenize, and give the report."""
    tokenize.main(TokenizeOptions(embeddings=embeddings, out=str(out), **options))
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


@pytest.mark.parametrize("num_codebooks", [1, 2, 3, 4])
def test_every_user_has_a_code_of_its_own(
    num_codebooks: int, embeddings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(embeddings, tmp_path / "stu", num_codebooks=num_codebooks, codebook_size=16)
    run(embeddings, tmp_path / "stu", num_codebooks=num_codebooks, codebook_size=16)  # not made twice, nor refused
    assert "holds these tokens already" in capsys.readouterr().out
    table, manifest = read_tokens(tmp_path / "stu")
    codebooks = Codebooks.load(open_published(tmp_path / "stu", "stu")[0] / "codebooks.npz")
    natural = [tuple(code) for code in codebooks.encode(VECTORS).tolist()]
    assert table.user_ids.tolist() == USERS.tolist()
    assert len(set(map(tuple, table.tokens.tolist()))) == 240
    assert report["collision_rate_after"] == 0
    sharing = {code: count for code, count in Counter(natural).items() if count > 1}
    assert report["collision_rate_before"] == pytest.approx(sum(sharing.values()) / 240)
    shape = {"num_codebooks": num_codebooks, "codebook_size": 16, "method": "rqkmeans"}
    assert manifest.extra == {"sizes": list(table.sizes)} | shape
    if num_codebooks == 1:  # 240 users, 16 codes
        assert table.sizes == (16, max(sharing.values()))
        numbered = table.tokens[:, 1] != NO_TOKEN
        assert numbered.tolist() == [code in sharing for code in natural]
        assert report["disambiguated_users"] == sum(numbered) and report["moved_users"] == 0
    else:
        assert table.sizes == (16,) * num_codebooks and report["disambiguated_users"] == 0
        changed = (table.tokens != np.array(natural)).any(axis=1)
        assert report["moved_users"] == changed.sum() <= sum(sharing.values())
    assert min(level["utilisation"] for level in report["levels"]) >= 0.95


def test_the_report_says_what_the_codes_are_worth(
    embeddings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(embeddings, tmp_path / "stu", num_codebooks=2, codebook_size=32)
    tokens = read_tokens(tmp_path / "stu")[0].tokens
    codebooks = Codebooks.load(tmp_path / "stu" / "codebooks.npz")
    variance = sum(((vector - VECTORS.mean(axis=0)) ** 2).sum() for vector in VECTORS)
    for level, said in enumerate(report["levels"]):
        used = Counter(tokens[:, level].tolist())
        assert said["tokens"] == 32 and said["utilisation"] == len(used) / 32
        entropy = -sum(n / 240 * math.log(n / 240) for n in used.values())
        assert said["perplexity"] == pytest.approx(math.exp(entropy))
        assert said["fullest_prefix"] == max(Counter(tuple(c[: level + 1]) for c in tokens.tolist()).values())
        left = VECTORS - codebooks.decode(tokens[:, : level + 1])
        assert said["reconstruction_error"] == pytest.approx((left**2).sum() / variance, rel=1e-4)
    kept = []
    for user, vector in enumerate(VECTORS):
        nearest = np.argsort(((VECTORS - vector) ** 2).sum(axis=1))
        kept += [tokens[other, 0] == tokens[user, 0] for other in nearest[nearest != user][:10]]
    assert report["neighbour_preservation"] == pytest.approx(np.mean(kept))
    alike = [tokens[a, 0] == tokens[b, 0] for a in range(240) for b in range(240)]
    assert report["neighbour_preservation_by_chance"] == pytest.approx(np.mean(alike))
    printed = capsys.readouterr().out
    assert "perplexity" in printed and f"{np.mean(kept):.1%} of the 10 nearest" in printed


def test_codes_depend_on_target_vectors_and_seed_alone(embeddings: str, tmp_path: Path) -> None:
    other = TARGETS.copy()
    other[:, -1] += 5  # the bias
    same = embeddings_of(tmp_path / "same", other, np.zeros_like(TARGETS))
    for name, source, seed in (("a", embeddings, 0), ("b", embeddings, 0), ("c", same, 0), ("d", embeddings, 1)):
        run(source, tmp_path / name, seed=seed)
    for file in ("tokens.parquet", "codebooks.npz", "report.json"):
        a, b, c, d = ((tmp_path / name / file).read_bytes() for name in "abcd")
        assert a == b == c != d


def test_a_balanced_level_has_no_crowded_token(embeddings: str, tmp_path: Path) -> None:
    fullest = {}
    for balanced in (False, True):
        report = run(embeddings, tmp_path / f"stu-{balanced}", codebook_size=16, balanced=balanced)
        fullest[balanced] = report["levels"][0]["fullest_prefix"]
    assert fullest[True] <= math.ceil(1.1 * 240 / 16) < fullest[False]


@pytest.mark.parametrize(("users", "size"), [(1, 1), (5, 2), (40, 8), (240, 32)])
def test_few_users_have_codes_too(users: int, size: int, tmp_path: Path) -> None:
    few = embeddings_of(tmp_path / "few", TARGETS[:users])
    run(few, tmp_path / "stu")
    table, _ = read_tokens(tmp_path / "stu")
    assert table.sizes == (size,) * 3 and len(np.unique(table.tokens, axis=0)) == users
    with pytest.raises(FriendrecError, match=f"more than the {users} users: pass --codebook-size {size}, or leave"):
        run(few, tmp_path / "large", codebook_size=users + 1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("--num-codebooks 0", "--num-codebooks 0: give a number from 1 to 8"),
        ("--num-codebooks 9", "--num-codebooks 9: give a number from 1 to 8"),
        ("--codebook-size 0", "--codebook-size 0: give a number from 1 to 65536"),
        ("--codebook-size 1000", "--codebook-size 1000 is more than the 240 users: pass --codebook-size 32, or leave"),
        ("--method kmeans", "--method cannot be kmeans: did you mean rqkmeans?"),
        ("--method rqvae --balanced", "--balanced means nothing to rqvae"),
        ("--newcomers", "--newcomers needs --data: pass the prepared data"),
        ("--data {embeddings}", "--data is read for newcomers only"),
        ("--balanced --start-from {embeddings}", "--balanced shapes new codebooks"),
        ("--start-from {embeddings}", "is embeddings, expected a table of tokenized users"),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_published(
    parameters: str, message: str, embeddings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = parameters.format(embeddings=embeddings).split()
    assert friendrec(["tokenize", "--embeddings", embeddings, "--out", str(tmp_path / "stu"), *asked]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings"]


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    spoilt = TARGETS.copy()
    spoilt[17, 2] = np.inf
    with pytest.raises(FriendrecError, match="not finite"):
        run(embeddings_of(tmp_path / "embeddings", spoilt), tmp_path / "stu")


def test_something_else_than_embeddings_is_refused(embeddings: str, tmp_path: Path) -> None:
    run(embeddings, tmp_path / "stu")
    with pytest.raises(FriendrecError, match="is a table of tokenized users, expected embeddings"):
        run(str(tmp_path / "stu"), tmp_path / "again")
