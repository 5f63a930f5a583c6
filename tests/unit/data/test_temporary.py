"""Folders for copies: gone when they are not needed, whoever was killed. Locks are of open files: threads will do."""

import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from maskray.data import temporary
from maskray.data.temporary import Held, temporary_folder

MAKERS, TIMES = 8, 50


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_there_while_it_is_needed_and_nobody_else_may_look(folder: Path):
    with temporary_folder("s3://bucket/x") as here:
        assert here.is_dir()
        assert here.stat().st_mode & 0o077 == 0
        assert here.parent.stat().st_mode & 0o077 == 0
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_has_left_is_removed_by_the_next_and_what_is_held_is_not(folder: Path):
    script = """
import signal, sys, tempfile
tempfile.tempdir = sys.argv[1]
from maskray.data.temporary import Held
held = Held("s3://bucket/x")
(held.path / "model.safetensors").write_bytes(bytes(1000))
print(held.path, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with temporary_folder("s3://bucket/y"):
            assert (theirs / "model.safetensors").exists(), "its process lives"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert theirs.exists()
    with temporary_folder("s3://bucket/y") as ours:
        assert list(ours.parent.iterdir()) == [ours]
    assert list(folder.iterdir()) == []


def test_what_was_let_go_of_is_removed_by_the_next(folder: Path):
    left = Held("s3://bucket/x")
    (left.path / "file").touch()
    left.release()
    assert left.path.exists()
    with temporary_folder("s3://bucket/y"):
        assert not left.path.exists()


def test_many_at_once_take_nothing_from_each_other(folder: Path):
    def make(_: int) -> None:
        for _ in range(TIMES):
            with temporary_folder("s3://bucket/x") as here:
                (here / "file").write_text("mine")
                assert (here / "file").read_text() == "mine"

    with ThreadPoolExecutor(MAKERS) as pool:
        list(pool.map(make, range(MAKERS)))
    assert list(folder.iterdir()) == []


def test_nothing_is_removed_where_others_may_have_put_something(folder: Path):
    base = folder / f"maskray-temporary-{os.getuid()}"
    base.mkdir()
    base.chmod(0o777)
    (base / "theirs").mkdir()
    with temporary_folder("s3://bucket/x") as here:
        assert here.parent == folder
    assert [f.name for f in base.iterdir()] == ["theirs"]


def test_where_folders_cannot_be_locked_there_is_one_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(temporary.errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(temporary.fcntl, "flock", refuse)
    with temporary_folder("s3://bucket/x") as here:
        assert here.parent == folder
    assert [f.name for f in folder.rglob("*")] == [f"maskray-temporary-{os.getuid()}"]
