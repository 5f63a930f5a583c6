"""Checks made as the command makes them."""

import shutil
import subprocess

import pytest

from maskray.doctor import run
from maskray.doctor.examination import made
from maskray.doctor.finding import Check, Level, Subject


@pytest.fixture
def looked():
    """What a check says of a subject: `looked(check, subject)`."""
    return lambda look, subject: made(Check(look.__name__, look), subject)


@pytest.fixture
def known(tiny, looked):
    """A subject whose config and dataset were found, with sections laid over it: `known(cluster={…})`."""

    def build(**sections):
        subject = Subject(config=tiny(**sections))
        assert looked(run.config, subject).level is Level.OK
        assert looked(run.dataset, subject).level is Level.OK
        return subject

    return build


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
