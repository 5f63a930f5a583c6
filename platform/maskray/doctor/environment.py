"""Python and its packages."""

from __future__ import annotations

import os
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import maskray
from maskray.doctor.finding import Check, Finding, Subject, fail, ok, warning

OLDEST_PYTHON = (3, 11)
_SAID = ("ray", "torch", "torchvision", "torchcodec", "mlflow", "numpy")


def python(_: Subject) -> Finding:
    """Whether this Python is new enough."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return fail(found, "make a virtual environment with Python 3.11 or newer: python3.11 -m venv .venv")
    return ok(f"{found}, {sys.executable}")


def packages(_: Subject) -> Finding:
    """Whether the packages are those that the code was made for, and go with each other."""
    wanted = list(_requirements())
    if not wanted:
        return warning(
            "which packages this maskray wants is not known: it is not installed, only on the path",
            "pip install maskray, or the wheel that the job ships, on the nodes",
        )
    wrong = {str(need): f"{why}" for need in wanted for why in _complaints(need)}
    for need in wanted:
        for theirs in _needs_of(need.name):
            wrong |= {str(theirs): f"{need.name} needs {theirs}, and {why}" for why in _complaints(theirs)}
    if wrong:
        pins = " ".join(f"'{need}'" for need in list(wrong)[:6])
        return fail("; ".join(list(wrong.values())[:6]), f"pip install -c constraints.txt {pins}")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _SAID)
    return ok(f"{versions}; all {len(wanted)} go together")


def standard_library(subject: Subject) -> Finding:
    """Whether a file or folder of ours, or of the job's, is imported instead of a module of Python's own."""
    # Where a job is started counts too: Ray's workers and `python -m` look there first.
    folders = [subject.folder, subject.folder / "jobs", *(Path(entry) for entry in _before_the_library())]
    shadows = [path for folder in dict.fromkeys(folders) for path in _shadows(folder)]
    if not shadows:
        return ok("nothing on the path shadows a module of Python's own")
    first = shadows[0]
    return fail(
        f"{', '.join(map(str, shadows[:3]))} would be imported instead of Python's own",
        f"rm {first}" if first.name == "__init__.py" else f"rename {first}",
    )


def _requirements() -> Iterator[Requirement]:
    """What pyproject.toml beside the package asks for, else what was installed with it."""
    beside = Path(str(maskray.__file__)).parents[2] / "pyproject.toml"
    if beside.is_file() and (project := tomllib.loads(beside.read_text())["project"])["name"] == "maskray":
        yield from map(Requirement, project["dependencies"])
        return
    yield from _needs_of("maskray")


def _needs_of(name: str) -> Iterator[Requirement]:
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for need in map(Requirement, texts):
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield need


def _complaints(need: Requirement) -> Iterator[str]:
    try:
        found = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        yield f"{need.name} is not installed"
        return
    if not need.specifier.contains(found, prereleases=True):
        yield f"{need.name} is {found}, not {need.specifier}"


def _before_the_library() -> list[str]:
    library = sysconfig.get_path("stdlib")
    entries = [entry or os.curdir for entry in sys.path]
    return entries[: entries.index(library)] if library in entries else []


def _shadows(folder: Path) -> list[Path]:
    if not folder.is_dir() or folder.resolve() == Path(sysconfig.get_path("stdlib")).resolve():
        return []
    found = [path for path in folder.glob("*.py") if path.stem in sys.stdlib_module_names]
    found += [path for path in folder.glob("*/__init__.py") if path.parent.name in sys.stdlib_module_names]
    return sorted(found)


CHECKS = [Check("Python", python), Check("packages", packages), Check("standard library", standard_library)]
