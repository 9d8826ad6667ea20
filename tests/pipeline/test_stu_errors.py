"""Mistakes with tokens, from tokenize to recommend: one line with the remedy, exit code 2, nothing half-made."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.pipeline.publish import publish
from friendrec.pipeline.tokens import read_tokens, write_tokens
from tests.pipeline.test_stage_errors import refusal, times
from tests.training import (
    SMALL_STU,
    export_run,
    index_embeddings,
    publish_data,
    tokenize_embeddings,
    train_run,
    train_stu_run,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain up to the index of a two-tower (`base`) and of an STU run; `other` data; `others`, other tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    data = publish_data(folder / "data")
    other = publish_data(folder / "other", users=130, seed=1)
    train_run(data, folder / "base", "--epochs=1", "--workers=0")
    export_run(run=str(folder / "base"), data=str(data), out=str(folder / "embeddings"))
    index_embeddings(folder / "embeddings", folder / "vectors")
    tokenize_embeddings(folder / "embeddings", folder / "stu")
    tokenize_embeddings(folder / "embeddings", folder / "others", codebook_size=16)
    train_stu_run(data, folder / "stu", folder / "run", "--epochs=1", "--workers=0")
    train_run(other, folder / "other-run", "--epochs=1", "--workers=0")
    for name in ("stu", "others"):
        assert cli_index(folder / name, folder / f"index-{name}") == 0
    return folder


def cli_index(tokens: Path, out: Path) -> int:
    from friendrec.pipeline import cli

    return cli.main(["index", "--kind=stu", f"--tokens={tokens}", f"--out={out}"])


def publish_vectors(out: Path, **columns: Any) -> None:
    """Embeddings as only another program would write them."""
    with publish(out, kind="embeddings", options={}, inputs={}, extra={"dimensions": 3}) as attempt:
        pq.write_table(pa.table(columns), attempt / "part-0.parquet")


VECTORS: dict[str, dict[str, Any]] = {
    "nobody": {"user_id": pa.array([], pa.int64()), "target": pa.array([], pa.list_(pa.float32(), 3))},
    "infinite": {"user_id": [1, 2, 3], "target": [[1.0, 2.0, 0.0], [np.inf, 1.0, 0.0], [0.0, np.nan, 0.0]]},
    "nameless": {"id": [1, 2, 3], "target": [[1.0, 2.0, 0.0]] * 3},
    "twice": {"user_id": [1, 1, 2], "target": [[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [3.0, 1.0, 0.0]]},
}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--embeddings={folder}/none", "none does not exist: pass --embeddings what `friendrec export` made"),
        ("--embeddings={folder}", "has no manifest.json"),
        ("--embeddings={base}", "is a run, expected embeddings"),
        ("", "`friendrec tokenize` needs --embeddings"),
        ("--embeddings={embeddings} --codebook-size=1000", "--codebook-size 1000 is more than the 138 users: pass"),
        ("--embeddings={embeddings} --codebook-size=0", "--codebook-size 0: give a number from 1"),
        ("--embeddings={embeddings} --codebook-size=ten", "--codebook-size"),
        ("--embeddings={embeddings} --num-codebooks=0", "--num-codebooks 0: give a number from 1 to 8"),
        ("--embeddings={embeddings} --method=kmeans", "--method cannot be kmeans"),
        ("--embeddings={embeddings} --newcomers", "--newcomers needs --data"),
        ("--embeddings={embeddings} --start-from={base}", "is a run, expected a table of tokenized users"),
        ("--embeddings={truncated}", "part-0.parquet is damaged"),
        ("--embeddings={nobody}", "holds no users with target vectors of one length"),
        ("--embeddings={infinite}", "holds vectors that are not finite"),
        ("--embeddings={nameless}", "holds no users with target vectors"),
        ("--embeddings={twice}", "two vectors of a user"),
    ],
)
def test_tokenize(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, line: str) -> None:
    names = {name: folder / name for name in ("base", "embeddings")} | {"folder": folder}
    for name, columns in VECTORS.items():
        if f"{{{name}}}" in argv:
            publish_vectors(tmp_path / name, **columns, query=columns["target"])
    if "{truncated}" in argv:
        cut(shutil.copytree(folder / "embeddings", tmp_path / "truncated") / "part-0.parquet")
    made = {name: tmp_path / name for name in (*VECTORS, "truncated")}
    before = times(folder)
    said = refusal(capsys, "tokenize", *argv.format(**names, **made).split(), f"--out={tmp_path / 'out'}")
    assert line.lower() in said.lower()
    assert not (tmp_path / "out").exists()
    assert times(folder) == before


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def publish_tokens(folder: Path, out: Path, **change: Any) -> None:
    """The tokens of the folder with something changed, the checksums right."""
    table, manifest = read_tokens(folder / "stu")
    users, tokens = table.user_ids.copy(), table.tokens.copy()
    match change:
        case {"code": code}:
            tokens[1] = tokens[0] if code is None else code
        case {"users": count}:
            users, tokens = users[:count], tokens[:count]
        case {"levels": levels}:
            tokens = tokens[:, :levels]
    extra = manifest.extra | {"sizes": change.get("sizes", manifest.extra["sizes"])}
    with publish(out, kind="stu", options={}, inputs={}, extra=extra) as attempt:
        if "columns" in change:
            pq.write_table(pa.table({"user_id": users, change["columns"]: users}), attempt / "tokens.parquet")
        elif not change.get("empty"):
            write_tokens(attempt / "tokens.parquet", users, tokens)
        (attempt / "report.json").write_text("{}")


TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "twins": ({"code": None}, "share a code"),
    "beyond": ({"code": [0, 8, 0]}, "tokens"),
    "negative": ({"code": [0, -2, 0]}, "tokens"),
    "broken": ({"code": [0, -1, 0]}, "tokens"),
    "levels": ({"levels": 2}, "tokens"),
    "sizeless": ({"sizes": None}, "tokens.parquet"),
    "nobody": ({"users": 0}, "users"),
    "few": ({"users": 20}, "users"),
    "strange": ({"columns": "codes"}, "tokens"),
    "empty": ({"empty": True}, "tokens.parquet"),
}
"""Hostile tables, whose manifests are in order, and a word of what is said."""


READERS = ("train stu --data={data} --tokens={tokens}", "index --kind=stu --tokens={tokens}")


@pytest.mark.parametrize(
    ("table", "verb"),
    [(table, verb) for table in TABLES for verb in READERS if (table, verb) != ("few", READERS[1])],
)  # an index may be of some users
def test_hostile_tokens(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, verb: str
) -> None:
    change, word = TABLES[table]
    publish_tokens(folder, tmp_path / "tokens", **change)
    argv = [*verb.format(data=folder / "data", tokens=tmp_path / "tokens").split(), f"--out={tmp_path / 'out'}"]
    said = refusal(capsys, *argv, *(SMALL_STU if verb.startswith("train") else ()))
    assert word in said
    assert str(tmp_path / "tokens") in said
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("train stu --data={data}", "preset stu needs --tokens STU: what friendrec tokenize makes"),
        (
            "train stu --data={data} --tokens={folder}/none",
            "none does not exist: check the path",
        ),
        ("train stu --data={data} --tokens={embeddings}", "is embeddings, expected a table of tokenized users"),
        ("train stu --data={data} --tokens={truncated}", "tokens.parquet is damaged"),
        ("train stu --data={other} --tokens={stu}", "holds other users than the prepared data"),
        ("train stu --data={data} --tokens={stu} --init-from={embeddings}", "no user table"),
        ("train stu --data={data} --tokens={stu} --uniform-negatives=4 --negatives=mixed", "not for preset stu"),
        ("train stu --data={data} --tokens={stu} --decoder=mlp", "--decoder cannot be mlp"),
        ("train stu --data={data} --tokens={stu} --memory=0", "memory must be at least 1"),
        ("train stu --data={data} --tokens={others} --out={run}", "already holds a run, of other config or data"),
        ("train two_tower_mlp --data={data} --tokens={stu}", "--tokens is for preset stu: leave it out"),
        ("index --kind=stu", "pass --tokens STU"),
        ("index --kind=stu --embeddings={embeddings} --tokens={stu}", "and no --embeddings"),
        ("index --kind=stu --tokens={embeddings}", "is embeddings, expected a table of tokenized users"),
        ("index --kind=stu --tokens={truncated}", "tokens.parquet is damaged"),
        ("index --kind=stu --tokens={stu} --nprobe=3", "pass --kind ivf"),
        ("index --kind=stu --tokens={stu} --beam-width=0", "--beam-width 0: give a positive number"),
        ("index --kind=exact --tokens={stu}", "--tokens"),
        ("export --run={run} --data={data}", "writes codes of users and has no vectors"),
        ("evaluate --run={run} --data={other}", "was trained on data with another vocabulary than"),
        ("evaluate --run={run} --data={data} --index={vectors}", "holds vectors, and"),
        (
            "evaluate --run={run} --data={data} --index={index-others}",
            "holds other codes than the run was trained with",
        ),
        ("evaluate --run={base} --data={data} --index={index-stu}", "holds codes"),
        ("evaluate --run={uncoded} --data={data}", "lacks tokens.parquet"),
        ("evaluate --run={run} --data={data} --also={folder}/none", "none does not exist"),
        ("evaluate --run={run} --data={data} --also={other-run}", "was trained on data with another vocabulary than"),
        ("evaluate --data={data} --baselines --also={base}", "--run"),
        ("recommend --run={run} --data={data} --index={vectors}", "holds vectors, and"),
        ("recommend --run={run} --data={data} --index={index-stu} --temperature=0", "temperature"),
        ("recommend --run={run} --data={data} --index={index-stu} --nucleus=2", "nucleus"),
        ("recommend --run={base} --data={data} --index={vectors} --seed=1", "which only an STU run writes"),
    ],
)
def test_what_follows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, line: str) -> None:
    names: dict[str, Path] = {path.name: path for path in folder.iterdir()} | {"folder": folder}
    if "{truncated}" in argv:
        names["truncated"] = Path(shutil.copytree(folder / "stu", tmp_path / "truncated"))
        cut(names["truncated"] / "tokens.parquet")
    if "{uncoded}" in argv:
        names["uncoded"] = Path(shutil.copytree(folder / "run", tmp_path / "uncoded"))
        (names["uncoded"] / "tokens.parquet").unlink()
    before = times(folder)
    out = () if "--out" in argv else (f"--out={tmp_path / 'out'}",)
    assert line.lower() in refusal(capsys, *argv.format(**names).split(), *out).lower()
    assert [path for path in tmp_path.iterdir() if "out" in path.name] == []
    assert times(folder) == before


def test_an_unfinished_run_is_taken_up_with_the_same_tokens_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    (run / "manifest.json").unlink()
    argv = ["train", "stu", f"--data={folder / 'data'}", f"--out={run}", *SMALL_STU, "--epochs=1", "--workers=0"]
    said = refusal(capsys, *argv, f"--tokens={folder / 'others'}", "--resume")
    assert "begun with another config or data" in said
