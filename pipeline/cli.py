"""The command line: `friendrec VERB ...`, one module of this package a verb."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType, ModuleType
from typing import Any

from friendrec import __version__
from friendrec.errors import FriendrecError
from friendrec.pipeline.arguments import did_you_mean, parse_options

JOBS = (
    "simulate", "prepare", "train", "export", "tokenize", "index", "update", "evaluate", "recommend", "compare",
    "frontier", "insight", "pipeline",
)  # fmt: skip
"""Verbs with a TorchX component."""
VERBS = (*JOBS, "show", "presets")
USER_MISTAKE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 2 after a user's mistake, 130 after Ctrl-C, 143 after SIGTERM."""
    signal.signal(signal.SIGTERM, _terminate)
    return guarded(_run, sys.argv[1:] if argv is None else argv)


def guarded(run: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run with a user's mistakes told in one line."""
    try:
        return run(argv)
    except FriendrecError as error:
        _let_rank_zero_speak()
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `friendrec --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
    elif argv[0] == "--version":
        print(f"friendrec {__version__}")
    else:
        module, options = read_verb(argv)
        module.main(options)
    return 0


def read_verb(argv: Sequence[str]) -> tuple[ModuleType, Any]:
    """The module and the options of `VERB ...`: by its own `parse(argv)` where it has one, else `<Verb>Options`."""
    verb, rest = (argv[0], argv[1:]) if argv else ("", [])
    if verb not in VERBS:
        raise FriendrecError(f"there is no verb {verb!r}: {did_you_mean(verb, VERBS)}")
    module = _module(verb)
    try:
        return module, _parse(verb, module, rest)
    except SystemExit:  # --help was printed
        if verb in JOBS:
            separator = "" if verb == "pipeline" else " --"
            print(f"as a job:\n  torchx run -s local_cwd torchx_components/components.py:{verb}{separator} ...")
        raise


def _parse(verb: str, module: ModuleType, argv: Sequence[str]) -> Any:
    if hasattr(module, "parse"):
        return module.parse(list(argv))
    kind, text = getattr(module, f"{verb.capitalize()}Options"), module.__doc__ or ""
    return parse_options(kind, argv, prog=f"friendrec {verb}", description=text, examples=module.EXAMPLES)


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {_summary(verb)}" for verb in VERBS]
    return "\n".join(
        [
            "usage: friendrec VERB [options]",
            "",
            "Friend recommendation on TorchRec, from a log of who did what to whom.",
            "",
            *lines,
            "",
            "`friendrec VERB --help` explains a verb with examples.",
        ]
    )


def _summary(verb: str) -> str:
    return (_module(verb).__doc__ or "").strip().partition("\n")[0]


def _module(verb: str) -> ModuleType:
    return import_module(f"friendrec.pipeline.{verb}")


def _terminate(signum: int, frame: FrameType | None) -> None:
    """End as after an exception, so that no half-made output stays behind."""
    sys.exit(128 + signum)


def _let_rank_zero_speak() -> None:
    """Ranks share most mistakes: rank 0 says it and its end takes the others down before they repeat it."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)


if __name__ == "__main__":
    sys.exit(main())
