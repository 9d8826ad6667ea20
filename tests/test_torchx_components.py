"""Every verb is a TorchX job that renders, and runs for real on this machine with two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from friendrec.pipeline.cli import VERBS

ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def torchx(repository: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "torchx.cli.main", *argv],
        capture_output=True, text=True, cwd=repository, env=ENVIRONMENT, check=False,
    )  # fmt: skip


def test_all_components_are_valid_and_none_is_missing(repository: Path) -> None:
    from torchx.specs.file_linter import validate

    path = repository / "torchx_components" / "components.py"
    for verb in VERBS:
        assert validate(str(path), verb) == []


def test_components_import_nothing_of_the_project(repository: Path) -> None:
    source = (repository / "torchx_components" / "components.py").read_text()
    assert "import friendrec" not in source
    assert "from friendrec" not in source


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["prepare", "--", "--interactions", "log", "--out", "data"], ["friendrec", "prepare"]),
        (["train", "--nproc", "2", "--", "two_tower_mlp", "--data", "data"], ["friendrec.pipeline.launch", "--nproc"]),
        (["pipeline", "--interactions", "log", "--out", "work", "--", "--train-args", "x"], ["friendrec", "pipeline"]),
    ],
)
def test_dry_run_shows_the_command(repository: Path, argv: list[str], command: list[str]) -> None:
    components = "torchx_components/components.py"
    verb, *rest = argv
    result = torchx(repository, "run", "-s", "local_cwd", "--dryrun", f"{components}:{verb}", *rest)
    assert result.returncode == 0, result.stderr
    expected = ", ".join(repr(word) for word in ["python", "-P", "-m", *command])
    assert expected in " ".join(result.stdout.split())
    for word in rest:
        assert word == "--" or repr(word) in result.stdout


def test_several_machines_meet_at_the_first() -> None:
    from friendrec.torchx_components.components import train

    app = train("two_tower_mlp", nproc=4, nnodes=2, max_restarts=3, env={"A": "b"})
    role = app.roles[0]
    assert (role.num_replicas, role.max_retries, role.env["A"]) == (2, 3, "b")
    assert role.args[role.args.index("--rdzv-endpoint") + 1] == "$$${rank0_env}:29500"
    assert role.args[-1] == "--resume"  # a restart goes on at the last checkpoint


def test_installed_jobs_are_listed_beside_the_builtins(repository: Path) -> None:
    listed = torchx(repository, "builtins").stdout
    for verb in VERBS:
        assert f" friendrec.{verb}\n" in listed
    assert " dist.ddp\n" in listed


def test_a_job_runs_here_and_fails_with_the_verb(repository: Path, tmp_path: Path) -> None:
    arguments = ["run", "-s", "local_cwd", "torchx_components/components.py:simulate", "--"]
    log = str(tmp_path / "log")
    done = torchx(repository, *arguments, "--users", "50", "--events", "200", "--out", log)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log" / "manifest.json").is_file()
    failed = torchx(repository, *arguments, "--users", "0", "--out", log)
    assert failed.returncode == 1
    assert "error: " in failed.stderr
    assert "Traceback" not in failed.stderr
