"""What the command line prints for people to type."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from maskray.cli import pretrain


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """`maskray` as pip installs it."""
    path = tmp_path / "bin" / "maskray"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_command_it_prints_is_one_that_the_shell_finds(program: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", [str(program), "pretrain"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert pretrain.program() == str(program)
    monkeypatch.setenv("PATH", str(program.parent))
    assert pretrain.program() == "maskray"


def test_a_job_file_prints_a_command_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["jobs/pretrain.py"])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", str(Path(pretrain.__file__).parents[2]))
    shown = subprocess.run([*shlex.split(pretrain.program()), "--help"], capture_output=True, text=True, check=True)
    assert "ui" in shown.stdout
