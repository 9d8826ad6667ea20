"""Command-line arguments: from an options dataclass to `--help`, and from a mistake to one line with the remedy."""

import difflib
from collections.abc import Iterable, Sequence
from functools import partial
from textwrap import indent
from typing import Any, TypeVar

import tyro
import tyro.extras
from tyro import _errors as mistakes  # private, which is why pyproject.toml pins tyro

from friendrec.errors import FriendrecError

Options = TypeVar("Options")


def parse_options(
    kind: type[Options],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    examples: str,
    default: Options | None = None,
) -> Options:
    """Read `argv` into `kind`. `--help` prints and exits; a mistake raises a FriendrecError of one line."""
    start: Any = tyro.MISSING_NONPROP if default is None else default
    with mistakes.on_parse_error(partial(_explain, kind, start)):
        try:
            return tyro.cli(kind, args=argv, prog=prog, description=description, default=start)
        except SystemExit:
            print(f"examples:\n{indent(examples.strip(), '  ')}")
            raise


def comma_list(text: str) -> list[str]:
    """`"follow,message"` -> `["follow", "message"]`."""
    return [part.strip() for part in text.split(",") if part.strip()]


def comma_map(text: str, option: str) -> dict[str, str]:
    """`"request=history,accept=target"` -> `{"request": "history", "accept": "target"}`."""
    pairs = [part.partition("=") for part in comma_list(text)]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise FriendrecError(f"{option} {text}: expected name=value pairs such as {option} a=b,c=d")
    return {name.strip(): value.strip() for name, _, value in pairs}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The closest known word as a remedy, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"


def _explain(kind: type, start: Any, event: mistakes.ParseErrorEvent) -> None:
    remedy = f"see `{event.prog} --help`"
    match event:
        case mistakes.UnrecognizedArgs(tokens=[token, *_]) | mistakes.MissingArgs(unrecognized_tokens=[token, *_]):
            if token.startswith("-"):
                remedy = did_you_mean(token.partition("=")[0].replace("_", "-"), _option_names(kind, start))
            raise FriendrecError(f"`{event.prog}` has no argument {token}: {remedy}")
        case mistakes.MissingArgs(missing_arguments=missing):
            names = " and ".join(_name(context.arg) for context in missing)
            raise FriendrecError(f"`{event.prog}` needs {names}: {remedy}")
        case mistakes.InvalidChoice(argument=argument, value=value, choices=choices):
            raise FriendrecError(f"{_name(argument)} cannot be {value}: {did_you_mean(value, choices)}")
        case mistakes.BadValue(argument=argument):
            name = _name(argument)
            raise FriendrecError(f"{name} needs a value ({name}=VALUE where it begins with a dash): {remedy}")
        case mistakes.InstantiationFailure(argument=argument, message=message):
            place = f"{_name(argument)}: " if argument else ""
            raise FriendrecError(f"{place}{' '.join(message.split())}: {remedy}")


def _name(argument: Any) -> str:
    """`--train-until`, or `PRESET` for a positional argument."""
    name: str = argument.display_name()
    return name if name.startswith("-") else name.upper()


def _option_names(kind: type, start: Any) -> list[str]:
    actions = tyro.extras.get_parser(kind, default=start)._actions
    return [name for action in actions for name in action.option_strings if name.startswith("--")]
