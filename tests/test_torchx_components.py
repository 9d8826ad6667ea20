"""Every verb is a TorchX job: it renders for this machine, Slurm and Kubernetes, runs here, and survives a death."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from friendrec.pipeline.arguments import parse_options
from friendrec.pipeline.cli import JOBS
from friendrec.pipeline.launch import LaunchOptions

ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
COMPONENTS = "torchx_components/components.py"
OPTIONS = ["--image", "registry/friendrec:1", "--cpu", "3", "--memMB", "5000", "--env", "A=b,C=d"]
SEVERAL = {"train": (2, 2), "export": (1, 3), "index": (1, 3), "evaluate": (1, 3), "recommend": (1, 3)}
"""Machines and processes a machine that are asked for."""


def torchx(repository: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchx_command(*argv), capture_output=True, text=True, cwd=repository, env=ENVIRONMENT, check=False
    )


def torchx_command(*argv: str) -> list[str]:
    return [sys.executable, "-P", "-m", "torchx.cli.main", *argv]


def arguments(verb: str) -> list[str]:
    """What stands after `torchx run COMPONENTS:verb`."""
    nodes, processes = SEVERAL.get(verb, (1, 1))
    argv = [*OPTIONS, *(["--nnodes", str(nodes)] if nodes > 1 else [])]
    argv += ["--nproc", str(processes)] if verb in SEVERAL else []
    argv += ["--interactions", "log", "--out", "work"] if verb == "pipeline" else []
    return [*argv, "--", "--option", "of the verb"]


def dry_run(repository: Path, verb: str, scheduler: str, **cfg: str) -> str:
    """The request as text, as `torchx run --dryrun` prints it."""
    from torchx.runner import get_runner

    with get_runner() as runner:
        component = f"{repository / COMPONENTS}:{verb}"
        return str(runner.dryrun_component(component, arguments(verb), scheduler, cfg).request)


def on_kubernetes(repository: Path, verb: str) -> list[dict[str, Any]]:
    """The container of each machine."""
    job = yaml.safe_load(dry_run(repository, verb, "kubernetes", queue="default"))
    assert [task["replicas"] for task in job["spec"]["tasks"]] == [1] * len(job["spec"]["tasks"])
    return [container for task in job["spec"]["tasks"] for container in task["template"]["spec"]["containers"]]


def on_slurm(repository: Path, verb: str) -> tuple[list[list[str]], list[list[str]]]:
    """The resources and the words of `srun` for each machine."""
    script = dry_run(repository, verb, "slurm")
    resources = re.findall(r"^#SBATCH (--job-name.*)$", script, re.MULTILINE)
    command = script.partition("\nsrun ")[2].partition("\nexitcode")[0]
    return [shlex.split(line) for line in resources], [shlex.split(part) for part in command.split(" :\\\n")]


def launched(command: list[str], verb: str) -> tuple[LaunchOptions | None, list[str]]:
    """The launcher's options, if it is started, and the options of the verb, from a whole command."""
    start = command.index("python")
    assert command[start : start + 3] == ["python", "-P", "-m"]
    module, *words = command[start + 3 :]
    if module == "friendrec":
        assert words[0] == verb
        return None, words[1:]
    assert module == "friendrec.pipeline.launch"
    split = words.index("--")
    assert words[split + 1] == verb
    options = parse_options(LaunchOptions, words[:split], prog="launch", description="", examples="")
    return options, words[split + 2 :]


def assert_launched_as_asked(command: list[str], verb: str) -> None:
    options, words = launched(command, verb)
    assert " ".join(words).count("--option of the verb") == 1
    nodes, processes = SEVERAL.get(verb, (1, 1))
    if verb not in SEVERAL:
        assert options is None
        return
    assert options is not None
    assert (options.nnodes, options.nproc) == (nodes, processes)
    assert options.max_restarts == (3 if verb == "train" else 0)
    assert ("--resume" in words) == (verb == "train")


@pytest.mark.parametrize("verb", JOBS)
def test_kubernetes_gets_images_processes_and_environment(repository: Path, verb: str) -> None:
    containers = on_kubernetes(repository, verb)
    assert len(containers) == SEVERAL.get(verb, (1, 1))[0]
    for container in containers:
        assert container["image"] == "registry/friendrec:1"
        limits = container["resources"]["limits"]
        assert (limits["cpu"], limits["memory"]) == ("3000m", "5000M")
        environment = {item["name"]: item["value"] for item in container["env"]}
        assert (environment["A"], environment["C"], environment["OMP_WAIT_POLICY"]) == ("b", "d", "PASSIVE")
        assert_launched_as_asked(container["command"], verb)


@pytest.mark.parametrize("verb", JOBS)
def test_slurm_gets_machines_processes_and_environment(repository: Path, verb: str) -> None:
    resources, commands = on_slurm(repository, verb)
    assert len(resources) == len(commands) == SEVERAL.get(verb, (1, 1))[0]
    for words, command in zip(resources, commands, strict=True):
        assert {"--ntasks-per-node=1", "--cpus-per-task=3", "--mem=5000"} <= set(words)
        exported = next(word for word in command if word.startswith("--export=")).split(",")
        assert {"A=b", "C=d", "OMP_WAIT_POLICY=PASSIVE"} <= set(exported)
        assert_launched_as_asked(command, verb)


def test_machines_meet_at_the_first(repository: Path) -> None:
    """On Kubernetes the first finds itself at localhost, the other by a variable that Volcano sets."""
    first, second = on_kubernetes(repository, "train")
    assert launched(first["command"], "train")[0].rdzv_endpoint == "$TORCHX_RANK0_HOST:29500"
    assert {"name": "TORCHX_RANK0_HOST", "value": "localhost"} in first["env"]
    assert launched(second["command"], "train")[0].rdzv_endpoint == "$VC_TRAIN_0_HOSTS:29500"
    names = {launched(container["command"], "train")[0].rdzv_id for container in (first, second)}
    assert len(names) == 1 and "" not in names and "$" not in names.pop()
    for command in on_slurm(repository, "train")[1]:
        options = launched(command, "train")[0]
        assert (options.rdzv_endpoint, options.rdzv_id) == ("$SLURM_JOB_NODELIST_HET_GROUP_0:29500", "$SLURM_JOB_ID")


def test_volumes_and_gpus_reach_the_container(repository: Path) -> None:
    argv = ["run", "-s", "kubernetes", "-cfg", "queue=default", "--workspace=", "--dryrun", f"{COMPONENTS}:train"]
    result = torchx(repository, *argv, "--gpu", "4", "--mounts", "type=bind,src=/nfs,dst=/data", "--", "two_tower_mlp")
    assert result.returncode == 0, result.stderr
    task = yaml.safe_load(result.stdout.partition("=== SCHEDULER REQUEST ===")[2])["spec"]["tasks"][0]["template"][
        "spec"
    ]
    assert task["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert "/data" in [mount["mountPath"] for mount in task["containers"][0]["volumeMounts"]]
    assert {"path": "/nfs"} in [volume.get("hostPath") for volume in task["volumes"]]


def test_all_components_are_valid_and_none_is_missing(repository: Path) -> None:
    from torchx.specs.file_linter import validate

    for verb in JOBS:
        assert validate(str(repository / COMPONENTS), verb) == []


def test_components_import_nothing_of_the_project(repository: Path) -> None:
    source = (repository / COMPONENTS).read_text()
    assert "import friendrec" not in source
    assert "from friendrec" not in source


def test_installed_jobs_are_listed_beside_the_builtins(repository: Path) -> None:
    listed = torchx(repository, "builtins").stdout
    for verb in JOBS:
        assert f" friendrec.{verb}\n" in listed
    assert " dist.ddp\n" in listed


def test_a_job_runs_here_and_fails_with_the_verb(repository: Path, tmp_path: Path) -> None:
    run = ["run", "-s", "local_cwd", f"{COMPONENTS}:simulate", "--"]
    log = str(tmp_path / "log")
    done = torchx(repository, *run, "--users", "50", "--events", "200", "--out", log)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log" / "manifest.json").is_file()
    failed = torchx(repository, *run, "--users", "0", "--out", log)
    assert failed.returncode == 1
    assert "error: " in failed.stderr
    assert "Traceback" not in failed.stderr


def workers_of(run: Path) -> list[int]:
    """Process ids of the ranks that train into a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else []
            if "friendrec" in words and str(run) in words and b"RANK=" in (entry / "environ").read_bytes():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found.append((int(entry.name), parent))
        except (OSError, ValueError):
            continue  # it ended meanwhile
    ids = {pid for pid, _ in found}
    return [pid for pid, parent in found if parent not in ids]  # not what a rank forked to read ahead


@pytest.mark.long
@pytest.mark.parametrize("restarts", [True, False])
def test_a_killed_worker_goes_on_from_the_last_checkpoint(repository: Path, tmp_path: Path, restarts: bool) -> None:
    """The same losses as a run that nobody disturbed, without one step taken twice; not so with --max_restarts 0."""
    from tests.training import SMALL, losses, publish_data, train_run

    data, out = publish_data(tmp_path / "data"), tmp_path / "run"
    args = ("--epochs=3", "--patience=0", "--checkpoint-steps=8", "--workers=0")
    train_run(data, tmp_path / "whole", *args)
    job = [f"{COMPONENTS}:train", "--nproc", "2", *([] if restarts else ["--max_restarts", "0"]), "--", "two_tower_mlp"]
    argv = torchx_command("run", "-s", "local_cwd", *job, f"--data={data}", "--out", str(out), *SMALL, *args)
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=repository, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    first = workers_of(out)
    assert len(first) == 2
    os.kill(first[1], signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert not set(first) & set(workers_of(out))
    if not restarts:
        assert process.returncode == 1
        assert "was killed by SIGKILL" in err
        assert not (out / "manifest.json").exists()
        return
    assert process.returncode == 0, err
    assert (out / "manifest.json").is_file()
    expected, found = losses(tmp_path / "whole"), losses(out)
    assert found == pytest.approx({step: expected[step] for step in found}, abs=1e-4)
    assert max(found) == 10 * (max(expected) // 10)
