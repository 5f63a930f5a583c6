"""Python and its packages: what the checks say of wrong ones, and of right ones."""

import sys
from pathlib import Path

import pytest

from maskray.doctor import environment
from maskray.doctor.finding import Level, Subject


def plant(folder: Path, name: str, version: str, *needs: str) -> None:
    """A package as pip leaves it, before all others on the path."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_what_is_installed_goes_together():
    assert environment.python(Subject()).level is Level.OK
    found = environment.packages(Subject())
    assert (found.level, found.found[:4]) == (Level.OK, "ray ")


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(environment, "OLDEST_PYTHON", (4, 0))
    found = environment.python(Subject())
    assert found.level is Level.FAIL
    assert "python3.11" in found.fix


@pytest.mark.parametrize(
    ("planted", "says", "fix"),
    [
        (("ray", "2.59.1"), "ray is 2.59.1, not ==2.60.*", "'ray[data,default,train,tune]==2.60.*'"),
        (("numpy", "1.26.4"), "numpy is 1.26.4, not >=2.0", "'numpy>=2.0'"),
        (
            ("torchvision", "0.29.2", "torch==2.14.1"),
            "torchvision needs torch==2.14.1, and torch is",
            "'torch==2.14.1'",
        ),
        (("mlflow", "3.17.2", "nowhere-to-be-found"), "nowhere-to-be-found is not installed", "nowhere"),
    ],
)
def test_a_package_that_does_not_go_with_the_others(tmp_path, monkeypatch, planted, says, fix):
    plant(tmp_path, *planted)
    monkeypatch.syspath_prepend(tmp_path)
    found = environment.packages(Subject())
    assert found.level is Level.FAIL
    assert says in found.found
    assert fix in found.fix


def test_a_package_without_a_name_is_on_the_path_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.maskray, "__file__", str(tmp_path / "a/b/maskray/__init__.py"))
    plant(tmp_path, "maskray", "0.1.0", "numpy>=99")
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.packages(Subject()).level is Level.FAIL  # the wheel's own word counts where there is no checkout
    (tmp_path / "maskray-0.1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: maskray\nVersion: 0.1.0\n")
    assert environment.packages(Subject()).level is Level.WARNING


@pytest.mark.parametrize("name", ["platform/__init__.py", "jobs/random.py", "types.py"])
def test_a_file_that_is_imported_instead_of_pythons_own(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "platform/maskray").mkdir(parents=True)
    assert environment.standard_library(Subject(folder=tmp_path)).level is Level.OK  # a source root
    (tmp_path / name).touch()
    found = environment.standard_library(Subject(folder=tmp_path))
    assert found.level is Level.FAIL
    assert found.fix == f"{'rm' if '__init__' in name else 'rename'} {tmp_path / name}"


def test_the_path_is_looked_at_too(tmp_path, monkeypatch):
    (tmp_path / "queue.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert environment.standard_library(Subject(folder=tmp_path / "elsewhere")).level is Level.FAIL
