"""The command line answers fast, explains itself, and tells a mistake in one line with its remedy."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
import tyro

from friendrec.errors import FriendrecError
from friendrec.pipeline import cli
from friendrec.pipeline.arguments import comma_list, comma_map, did_you_mean, parse_options


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    preset: Annotated[Literal["two_tower_mlp", "stu"], tyro.conf.Positional] = "stu"
    """What to make."""
    train_until: int
    """End of the train period. Unit: seconds."""
    rate: float = 0.1
    """Unit: none."""
    resume: bool = False
    """Go on."""


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Nested:
    inner: Annotated[Inner, tyro.conf.OmitArgPrefixes]


def parse(*argv: str) -> PrepareOptions:
    return parse_options(PrepareOptions, argv, prog="friendrec prepare", description="Prepare.", examples="\nex 1\n")


def test_dashes_and_underscores_are_the_same() -> None:
    expected = PrepareOptions(train_until=3, rate=1e-3, resume=True)
    assert parse("--train-until", "3", "--rate", "1e-3", "--resume") == expected
    assert parse("--train_until=3", "--rate=1e-3", "--resume") == expected


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--train-untill", "3"], "`friendrec prepare` has no argument --train-untill: did you mean --train-until?"),
        (["--train-until", "3", "--rat=2"], "`friendrec prepare` has no argument --rat=2: did you mean --rate?"),
        (["--train-until", "3", "stu", "x"], "`friendrec prepare` has no argument x: see `friendrec prepare --help`"),
        ([], "`friendrec prepare` needs --train-until: see `friendrec prepare --help`"),
        (
            ["--train-until"],
            "--train-until needs a value (--train-until=VALUE where it begins with a dash): "
            "see `friendrec prepare --help`",
        ),
        (["two_tower", "--train-until", "3"], "PRESET cannot be two_tower: did you mean two_tower_mlp?"),
        (
            ["--train-until", "soon"],
            "--train-until: invalid literal for int() with base 10: 'soon': see `friendrec prepare --help`",
        ),
    ],
)
def test_mistakes_are_one_line(argv: list[str], line: str) -> None:
    with pytest.raises(FriendrecError) as raised:
        parse(*argv)
    assert str(raised.value) == line


def test_help_shows_fields_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse("--help")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "Unit: seconds" in text
    assert text.endswith("examples:\n  ex 1\n")


def test_comma_strings() -> None:
    assert comma_list("follow, message,") == ["follow", "message"]
    assert comma_map("request=history, accept=target", "--roles") == {"request": "history", "accept": "target"}
    for text in ("request", "=history", "request="):
        with pytest.raises(FriendrecError, match="expected name=value pairs such as --roles a=b,c=d"):
            comma_map(text, "--roles")


def test_nested_config_is_known_to_the_remedy() -> None:
    default = Nested(inner=Inner(rate=0.5))

    def nested(*argv: str) -> Nested:
        return parse_options(Nested, argv, prog="x", description="", examples="", default=default)

    assert nested("--rate", "1") == Nested(inner=Inner(rate=1.0))
    assert nested() == default
    with pytest.raises(FriendrecError, match=r"did you mean --rate\?"):
        nested("--ratte", "1")


def test_did_you_mean() -> None:
    assert did_you_mean("evalute", cli.VERBS) == "did you mean evaluate?"
    assert did_you_mean("xyz", ["index", "train"]) == "choose one of index, train"


def failing(error: BaseException) -> ModuleType:
    module = ModuleType("prepare", "Prepare.")

    def main(options: PrepareOptions) -> None:
        raise error

    vars(module).update(PrepareOptions=PrepareOptions, EXAMPLES="", main=main)
    return module


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["prepare", "--train-until", "3"]
    monkeypatch.setattr(cli, "_module", lambda verb: failing(FriendrecError("no such log: pass --interactions")))
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == "error: no such log: pass --interactions\n"
    monkeypatch.setattr(cli, "_module", lambda verb: failing(KeyboardInterrupt()))
    assert cli.main(argv) == 130
    monkeypatch.setattr(cli, "_module", lambda verb: failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not dressed up as the user's
        cli.main(argv)


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian", "--x"]) == 2
    assert capsys.readouterr().err == "error: there is no verb 'trian': did you mean train?\n"


SLOW = {"torch", "torchrec", "faiss", "numba", "matplotlib", "torchx", "pymilvus"}
"""Whose import alone takes a good part of a second."""


def friendrec(*argv: str, cwd: Path | None = None) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run the command in a process of its own; what it says on stderr, and the packages that it imports."""
    command = [sys.executable, "-P", "-X", "importtime", "-m", "friendrec", *argv]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    lines = result.stderr.splitlines(keepends=True)
    imports = [line for line in lines if line.startswith("import time:")]
    result.stderr = "".join(line for line in lines if line not in imports)
    return result, {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}


def test_overview_names_every_verb_and_imports_nothing_slow() -> None:
    result, imported = friendrec("--help")
    assert result.returncode == 0, result.stderr
    for verb in cli.VERBS:
        assert f"\n  {verb} " in result.stdout
    assert "friendrec" in imported
    assert not SLOW & imported


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_verb(verb: str) -> None:
    result, imported = friendrec(verb, "--help")
    assert result.returncode == 0, result.stderr
    assert re.search(rf"^examples:\n  friendrec {verb}\b", result.stdout, re.MULTILINE)
    assert ("torchx run" in result.stdout) == (verb in cli.JOBS)
    assert not SLOW & imported


def test_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -P -m friendrec --help | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""


def test_mistake_in_a_process_has_no_traceback(tmp_path: Path) -> None:
    result, imported = friendrec("pipeline", "--interactions", str(tmp_path / "no.parquet"), "--out", "x", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path}/no.parquet does not exist: check --interactions\n"
    assert not SLOW & imported
    assert not list(tmp_path.iterdir())
