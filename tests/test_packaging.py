"""What is installed is `friendrec` and nothing else, from a wheel as from a checkout."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("datasets", "models", "pipeline", "sharding", "torchx_components")


UNWANTED = shutil.ignore_patterns(".git", ".venv", "build", "demo", "site", "*.egg-info", "__pycache__", ".*_cache")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(repository, folder / "source", symlinks=True, ignore=UNWANTED)
    return built(folder / "source")


def built(source: Path) -> zipfile.ZipFile:
    """The wheel of a source tree, built without a network."""
    build = [sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(source.parent), str(source)], check=True, capture_output=True)
    return zipfile.ZipFile(next(source.parent.glob("*.whl")))


def test_wheel_holds_only_friendrec(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert "friendrec" in tops
    assert all(top == "friendrec" or top.endswith(".dist-info") for top in tops)


def test_wheel_holds_every_module(wheel: zipfile.ZipFile, repository: Path) -> None:
    held = set(wheel.namelist())
    assert {"friendrec/py.typed", "friendrec/pipeline/measured.json"} <= held
    for package in PACKAGES:
        for path in (repository / package).rglob("*.py"):
            assert f"friendrec/{path.relative_to(repository).as_posix()}" in held


def test_wheel_registers_command_and_components(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "friendrec = friendrec.pipeline.cli:main" in text
    assert "friendrec = friendrec.torchx_components.components" in text


@pytest.mark.long
def test_what_docker_copies_makes_the_same_wheel(wheel: zipfile.ZipFile, repository: Path, tmp_path: Path) -> None:
    lines = (repository / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*", "all but what is named is ignored"
    source = tmp_path / "source"
    source.mkdir()
    for name in (line.removeprefix("!") for line in lines if line.startswith("!")):
        path = repository / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=UNWANTED)
        else:
            shutil.copy(path, source)
    assert sorted(built(source).namelist()) == sorted(wheel.namelist())
    assert (source / "standin" / "pyproject.toml").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_of_a_checkout_hide_no_other_package(repository: Path, tmp_path: Path, package: str) -> None:
    """Started in the checkout, `import datasets` must find another distribution's `datasets`, or nothing."""
    find = f"import friendrec.{package}, importlib.util, sys; print(importlib.util.find_spec('{package}'))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", find], cwd=repository, capture_output=True, text=True, check=True
    )
    assert str(repository) not in result.stdout


def test_jobs_and_workers_do_not_see_the_checkout() -> None:
    from friendrec.pipeline.launch import WORKER
    from friendrec.torchx_components import components

    app = components.train("two_tower_mlp", nproc=2)
    assert app.roles[0].args[0] == "-P"
    assert "-P" in WORKER


def test_dependencies_are_pinned(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    for requirements in [project["dependencies"], *project["optional-dependencies"].values()]:
        assert all("==" in requirement for requirement in requirements)


def test_stand_in_has_the_name_that_torchrec_asks_for(repository: Path) -> None:
    project = tomllib.loads((repository / "standin" / "pyproject.toml").read_text())["project"]
    assert project["name"] == "fbgemm-gpu"
    version = project["version"].partition("+")[0]
    assert project["dependencies"] == [f"fbgemm-gpu-cpu=={version}"]


@pytest.mark.long
def test_type_checker_sees_the_project(repository: Path) -> None:
    command = [sys.executable, "-P", "-m", "mypy", "-p", "friendrec"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    match = re.search(r"no issues found in (\d+) source files", result.stdout)
    assert match and int(match[1]) > 20, result.stdout
