"""Pages of the documentation that are made from the code and the repository whenever the site is built.

A hook of MkDocs: `on_files` adds the pages, `on_page_markdown` turns links to source files into links to the reference.
"""

import ast
import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import griffe

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("datasets", "models", "sharding", "pipeline", "torchx_components")
STAGES = {
    "the command line": ("pipeline/arguments", "pipeline/cli", "pipeline/launch", "pipeline/times"),
    "files and directories, any command": (
        "pipeline/publish", "pipeline/manifest", "pipeline/lineage", "pipeline/given",
    ),
    "simulate": ("pipeline/simulate", "datasets/simulator", "datasets/reference_log"),
    "prepare": (
        "pipeline/prepare", "datasets/schema", "datasets/cleaning", "datasets/profiles", "datasets/preparation",
        "datasets/engine", "datasets/layout",
    ),
    "train": (
        "pipeline/train", "pipeline/job", "pipeline/config", "pipeline/validation", "pipeline/initial", "models/config",
        "sharding/", "datasets/config", "datasets/reader", "datasets/packing",
    ),
    "export, recommend and the Python API": (
        "pipeline/export", "pipeline/recommend", "pipeline/inference", "pipeline/api", "pipeline/embedding",
        "models/sampling",
    ),
    "tokenize": ("pipeline/token", "pipeline/retokenize", "models/tokenizer", "models/rqvae"),
    "index": ("pipeline/index", "pipeline/build_clusters", "pipeline/retrieval/", "models/trie"),
    "update": ("pipeline/update", "pipeline/revision"),
    "frontier": (
        "pipeline/frontier", "pipeline/evaluation/frontier", "pipeline/evaluation/races",
        "pipeline/evaluation/contenders", "pipeline/evaluation/beams",
    ),
    "insight": ("pipeline/insight", "pipeline/evaluation/insight", "pipeline/evaluation/reduced"),
    "evaluate": ("pipeline/evaluate", "pipeline/evaluation/", "datasets/oracle"),
    "compare": ("pipeline/compare", "pipeline/climb", "pipeline/cells"),
    "pipeline": ("pipeline/pipeline",),
    "show": ("pipeline/show", "pipeline/description"),
}  # fmt: skip
"""Where the error catalogue puts the messages of a file: the first prefix that fits."""


NO_REMEDY = ("a", "an", "and", "each", "it", "its", "none", "table", "the", "they", "torch", "user")
"""With what no remedy begins."""


@dataclass(frozen=True)
class Message:
    """A message that a user may see, `<name>` standing for what is filled in."""

    file: str
    text: str
    correctable: bool

    @property
    def cause_and_remedy(self) -> tuple[str, str]:
        """The remedy is what follows the last colon or semicolon; the command line adds it to what it can correct."""
        if self.correctable:
            return self.text, "run the command that is shown"
        breaks = list(re.finditer(r"[:;] ", self.text))
        while breaks and re.split(r"\W", self.text[breaks[-1].end() :])[0] in NO_REMEDY:
            breaks.pop()
        return (self.text[: breaks[-1].start()], self.text[breaks[-1].end() :]) if breaks else (self.text, "")


class Doctests(griffe.Extension):
    """Fences `>>> …` in docstrings as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(^>>> .*(?:\n.+)*)", r"```python\n\1\n```", obj.docstring.value, flags=re.M)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no one writes by hand."""
    from mkdocs.structure.files import File

    pages = {
        "index.md": _at_root((REPOSITORY / "README.md").read_text()),
        "contributing.md": _at_root((REPOSITORY / "CONTRIBUTING.md").read_text()),
        "changelog.md": (REPOSITORY / "CHANGELOG.md").read_text(),
        "cli.md": command_line(),
        "errors.md": error_catalogue(),
        **{f"reference/{package}.md": reference(package) for package in PACKAGES},
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a source file becomes one to its place in the reference: `../models/losses.py`."""
    up = "../" * page.file.src_uri.count("/")

    def link(match: re.Match[str]) -> str:
        path = PurePosixPath(match[1])
        return f"]({up}reference/{path.parts[0]}.md#friendrec.{'.'.join(path.with_suffix('').parts)})"

    return re.sub(rf"\]\((?:\.\./)?((?:{'|'.join(PACKAGES)})/[\w/]+\.py)\)", link, markdown)


def command_line() -> str:
    """`--help` of every verb, as it is printed."""
    from friendrec.pipeline.cli import VERBS

    parts = ["# Command line", "```text", _help(), "```"]
    for verb in VERBS:
        parts += [f"## {verb}", "```text", _help(verb), "```"]
    return "\n\n".join(parts).replace("```text\n\n", "```text\n").replace("\n\n```", "\n```")


def error_catalogue() -> str:
    """Every message of a `FriendrecError` in the code, by the command that gives it."""
    found: dict[str, list[Message]] = {stage: [] for stage in STAGES}
    for message in messages():
        found[stage_of(message.file)].append(message)
    parts = [
        "# Error messages",
        "What a command, or a call from Python, refuses: one line, exit code 2, nothing half made left behind. "
        "Made from the code; `<…>` stands for what is filled in.",
    ]
    for stage, own in found.items():
        rows = [f"| {_cell(cause)} | {_cell(remedy)} |" for cause, remedy in (m.cause_and_remedy for m in own)]
        if rows:
            parts += [
                f"## {stage}",
                "\n".join(["| what is wrong | what to do |", "| --- | --- |", *dict.fromkeys(rows)]),
            ]
    return "\n\n".join(parts)


def reference(package: str) -> str:
    """The docstrings of every module of a package."""
    modules = sorted(path for path in (REPOSITORY / package).rglob("*.py") if path.stem != "__init__")
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in modules]
    names = [name for name in names if name != "pipeline.api"]  # it has a page of its own, python.md
    return "\n\n".join([f"# friendrec.{package}", *(f"::: friendrec.{name}" for name in names)])


def messages() -> Iterator[Message]:
    """Every error that the code can raise, in order of file and line."""
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            file = path.relative_to(REPOSITORY).as_posix()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and _called(node.func) in ("FriendrecError", "Correctable"):
                    yield Message(file, _text(node.args[0]), _called(node.func) == "Correctable")


def stage_of(file: str) -> str:
    """The heading of the catalogue for a file; KeyError for one that STAGES forgets."""
    for stage, prefixes in STAGES.items():
        if file.startswith(prefixes):
            return stage
    raise KeyError(f"{file} raises errors and is in no stage of {Path(__file__).name}")


def _called(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else ""


def _text(node: ast.expr) -> str:
    """A message as it is written, what is computed in angle brackets."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value)
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else "…"
    return f"<{name.replace('_', ' ')}>"


def _cell(text: str) -> str:
    """As text in a cell of a table, not as markup."""
    return re.sub(r"([\\`*_|\[\]{}])", r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")


def _help(*verb: str) -> str:
    from friendrec.pipeline.cli import main, read_verb

    text = io.StringIO()
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        read_verb([*verb, "--help"]) if verb else main(["--help"])
    return text.getvalue().rstrip()


def _at_root(markdown: str) -> str:
    """A page of the repository's root: links are relative to it, and those to no page and no source file go."""
    markdown = re.sub(r"\]\(docs/", "](", markdown)
    markdown = re.sub(r"\]\((CONTRIBUTING|CHANGELOG)\.md\)", lambda match: f"]({match[1].lower()}.md)", markdown)
    return re.sub(rf"\[([^\]]+)\]\((?!https?:|[\w#]+\.md|(?:{'|'.join(PACKAGES)})/[\w/]+\.py)[^)]+\)", r"\1", markdown)
