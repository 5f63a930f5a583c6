"""What the command line prints for people to type."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from maskray import cli
from maskray.cli import pretrain
from planted_secrets import Planted


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


CRASH = """
import logging, sys
from mlflow import MlflowClient
from maskray import cli

def command(_):
    logging.getLogger("another").warning("it is %s", sys.argv[1])
    try:
        MlflowClient(sys.argv[1]).get_run("x")
    except Exception:
        logging.getLogger("maskray").exception("asked in vain")
    MlflowClient(sys.argv[1]).get_run("x")

cli._schema = command
cli.main(["schema"])
"""


def test_neither_a_log_nor_a_crash_says_a_password():
    """MLflow's own errors say its whole URI."""
    planted = Planted()
    uri = planted.within("http://127.0.0.1:9", "uri")
    environment = os.environ | {
        "PYTHONPATH": str(Path(cli.__file__).parents[2]),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    command = [sys.executable, "-c", CRASH, uri]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = "".join(done.stderr.split())  # it is wrapped
    assert said.count("APIrequesttohttp://***@127.0.0.1:9/") == 2, done.stderr
    assert "it is http://***@127.0.0.1:9" in done.stderr
    assert "asked in vain" in done.stderr
    assert planted.found_in(said.encode()) == []
