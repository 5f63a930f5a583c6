"""The wheel, built and installed as the image does it: it holds all that the package reads, and runs from anywhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "platform" / "maskray"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the backend of the build, of the extra maskray[dev]")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert inside == {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    assert "maskray/sweeps/report.html.jinja" in inside


def test_it_runs_where_there_is_no_source(wheel: Path, tmp_path: Path):
    place = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    assert (place / "bin" / "maskray").is_file()
    code = "import sys, maskray.cli as c; print(c.__file__, file=sys.stderr); sys.exit(c.main(['schema']))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr.strip() == str(place / "maskray/cli/__init__.py")
    assert run.stdout == (ROOT / "configs/schema.json").read_text()
