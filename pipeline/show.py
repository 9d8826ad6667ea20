"""Show what a directory is: made from what, by which command, when, and what is in it.

For everything that a verb publishes, here or behind a URL; for a run that is not finished, how far it is; and for the
directory of a pipeline.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.filesize import decimal as size

from friendrec.errors import FriendrecError
from friendrec.pipeline.publish import noun

if TYPE_CHECKING:
    from rich.console import Console

    from friendrec.pipeline.lineage import Published

EXAMPLES = """
friendrec show RUN
friendrec show RUN --verify
friendrec show s3://bucket/embeddings
"""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    directory: Annotated[str, tyro.conf.Positional]
    """Directory or URL that a verb made with --out."""
    verify: bool = False
    """Read every file and compare checksums, those of the raw log included; without it sizes are compared."""


def main(options: ShowOptions) -> None:
    """Print it, as plain lines and tables."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    place = Path(options.directory)
    unmade = "://" not in options.directory and place.is_dir() and not (place / "manifest.json").exists()
    if unmade and (place / "config.json").exists():
        _show_unfinished(console, place)
    elif unmade and (place / "pipeline.json").exists():
        _show_pipeline(console, place)
    else:
        _show_published(console, options)


def _show_published(console: "Console", options: ShowOptions) -> None:
    from friendrec.pipeline.description import Description, describe_contents
    from friendrec.pipeline.lineage import look

    published = look(options.directory)
    manifest = published.manifest
    damage = published.damage(options.verify)
    console.print(f"{options.directory}: {noun(published.manifest.kind)}")
    contents = Description({}) if damage else describe_contents(published)
    whole = "checksums agree" if options.verify else "sizes agree"
    about = {
        "made": f"{manifest.created} by {shlex.join(manifest.command)}",
        "files": f"{len(manifest.files)}, {size(published.bytes)}: "
        + (f"damaged, {damage}; make it again" if damage else whole),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    _print_facts(console, contents.facts | about)
    for table in contents.tables:
        console.print()
        console.print(table)
    if manifest.inputs:
        console.print("\nmade from")
    for line in _lineage(published, options.verify, set()):
        console.print(line)


def _lineage(published: "Published", verify: bool, told: set[str], depth: int = 1) -> Iterator[str]:
    """One line an input, what that was made from below it, as far back as it is still there; each once."""
    from friendrec.pipeline.lineage import sources

    for source in sources(published, verify):
        line = f"{'  ' * depth}{source.name}: {source.path}, {source.state}"
        if source.path in told:
            yield f"{line}, see above"
        elif source.published is None:
            yield line
        else:
            manifest = source.published.manifest
            yield f"{line}: {noun(manifest.kind)}, made {manifest.created} by {shlex.join(manifest.command)}"
            if source.state == "unchanged":
                yield from _lineage(source.published, verify, told, depth + 1)
        told.add(source.path)


def _show_unfinished(console: "Console", place: Path) -> None:
    """A run without a manifest: its last checkpoint, and how to go on."""
    from friendrec.pipeline.description import changed_settings, epochs_table, plan_table

    try:
        config = json.loads((place / "config.json").read_text())["config"]
        training, preset = config["training"], config["preset"]
    except (ValueError, KeyError, TypeError) as error:
        raise FriendrecError(f"{place} has a config.json that is not a run's: check the path") from error
    progress = _progress(place)
    reached = (
        f"step {progress['step']:,} in epoch {progress['epoch'] + 1} of {training['epochs']}, after "
        f"{progress['seconds'] / 60:.1f} of at most {training['max_minutes']:g} minutes"
        if progress
        else "no checkpoint yet"
    )
    console.print(f"{place}: a run that is not finished, or still trains")
    facts = {"preset": preset, "settings": changed_settings(config), "checkpoint": reached}
    if progress.get("best_step"):
        facts["best"] = f"step {progress['best_step']:,}, live {training['stop_on']} {progress['best_recall']:.3f}"
    facts["remedy"] = f"friendrec train {preset} --data DATA --out {place} --resume, with the options of before"
    _print_facts(console, facts)
    if (place / "metrics.jsonl").exists():
        whole = [line for line in (place / "metrics.jsonl").read_text().splitlines(keepends=True) if line[-1] == "\n"]
        console.print()
        console.print(epochs_table(whole, progress.get("best_step", 0)))
    if (place / "plan.json").exists():
        console.print()
        console.print(plan_table(json.loads((place / "plan.json").read_text())))


def _progress(place: Path) -> dict[str, Any]:
    """What the newest complete checkpoint says; nothing where there is none. Read without torch."""
    steps = {path: path.parent.name.removeprefix("step-") for path in place.glob("checkpoints/step-*/checkpoint.json")}
    newest = max(
        (path for path, step in steps.items() if step.isdigit()), key=lambda path: int(steps[path]), default=None
    )
    found: dict[str, Any] = json.loads(newest.read_text())["extra"]["progress"] if newest else {}
    return found


def _show_pipeline(console: "Console", place: Path) -> None:
    """Which stages are done, and with what options it was begun."""
    from friendrec.pipeline.lineage import look

    console.print(f"{place}: of friendrec pipeline")
    settings = json.loads((place / "pipeline.json").read_text())
    facts = {name.replace("_", "-"): str(value) for name, value in settings.items() if name != "interactions"}
    made = ("base", "embeddings", "stu", "run") if settings.get("preset") == "stu" else ("run", "embeddings")
    for name in ("data", *made, "index", "report", "recommendations"):
        try:
            facts[name] = f"made {look(str(place / name)).manifest.created}"
        except FriendrecError:
            facts[name] = "not finished: the same command goes on"
    _print_facts(console, facts)


def _print_facts(console: "Console", facts: dict[str, str]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(f"  {name:{width}}  {value}")
