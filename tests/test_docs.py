"""The pages that are made from the code hold all of it; `make docs` checks the links."""

import html
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from friendrec.pipeline import cli


@pytest.fixture(scope="module")
def generate(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", repository / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_no_error_of_the_code_is_left_out(generate: ModuleType, repository: Path) -> None:
    """As many messages as the source has calls, and each file has its stage."""
    found = list(generate.messages())
    for package in generate.PACKAGES:
        for path in (repository / package).rglob("*.py"):
            calls = re.findall(r"(?<!class )\b(?:FriendrecError|Correctable)\(", path.read_text())
            file = path.relative_to(repository).as_posix()
            assert sum(message.file == file for message in found) == len(calls), file
    assert {generate.stage_of(message.file) for message in found} == set(generate.STAGES)


@pytest.mark.parametrize(
    ("argv", "stage", "remedy"),
    [
        (["trian"], "the command line", "did you mean train?"),
        (["train", "two_tower_mlp", "--data=d", "--out=s3://b/run"], "train", "checkpoints need a directory"),
        (["prepare", "--interactions={log}", "--out={out}"], "prepare", "run friendrec prepare"),
        (["prepare", "--interactions={log}", "--splits=1", "--out={out}"], "prepare", "pass one like 0.8,0.1,0.1"),
        (["show", "{out}"], "files and directories, any command", "check the path"),
        (["index", "--embeddings=e", "--nprobe=3", "--out={out}"], "index", "leave it out, or pass --kind ivf"),
        (["evaluate", "--data=d", "--out={out}"], "evaluate", "pass --run RUN"),
    ],
)
def test_what_a_user_sees_stands_in_the_catalogue(
    generate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], stage: str, remedy: str
) -> None:
    log = tmp_path / "log.parquet"
    pq.write_table(pa.table({"src": [1], "dst": [2], "action": ["a"], "timestamp": [1]}), log)
    assert cli.main([word.format(log=log, out=tmp_path / "out") for word in argv]) == 2
    said = capsys.readouterr().err.removeprefix("error: ").strip()
    assert remedy in said
    page = html.unescape(generate.error_catalogue()).replace("\\", "")
    rows = page.partition(f"\n## {stage}\n")[2].partition("\n## ")[0].splitlines()[4:]
    patterns = [re.escape(row.strip("| ")).replace(r"\ \|\ ", r"\W*") for row in rows]
    patterns = [re.sub(r"<[^>]+>", ".*", pattern.replace(r"\ ", " ")) for pattern in patterns]
    shown = [pattern.replace("run the command that is shown", "run friendrec .*") for pattern in patterns]
    assert any(re.fullmatch(pattern, said) for pattern in shown), (said, shown)


def test_every_verb_and_module_is_in_the_reference(generate: ModuleType, repository: Path) -> None:
    commands = generate.command_line()
    for verb in cli.VERBS:
        assert f"\n## {verb}\n" in commands
        for line in cli._module(verb).EXAMPLES.strip().splitlines():
            assert line in commands
    for package in generate.PACKAGES:
        named = set(re.findall(r"^::: (\S+)$", generate.reference(package), re.MULTILINE))
        modules = {path.relative_to(repository) for path in (repository / package).rglob("*.py")}
        expected = {".".join(["friendrec", *path.with_suffix("").parts]) for path in modules if path.stem != "__init__"}
        assert named == expected - {"friendrec.pipeline.api"}


def test_links_to_sources_become_links_to_the_reference(generate: ModuleType) -> None:
    from types import SimpleNamespace

    page = SimpleNamespace(file=SimpleNamespace(src_uri="a/b.md"))
    text = "see [`losses`](../models/losses.py), [x](models/y.md) and [web](https://a.b/models/c.py)"
    linked = generate.on_page_markdown(text, page)
    assert "(../reference/models.md#friendrec.models.losses)" in linked
    assert "[x](models/y.md) and [web](https://a.b/models/c.py)" in linked
