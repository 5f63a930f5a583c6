"""One copy for all who read it, none when nobody does, whoever was killed. Locks are of open files: threads will do."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from maskray.data.storage import Storage
from maskray.errors import StorageError
from maskray.training import checkpoint, fetched

READERS = 6
CONTENT = os.urandom(300_000)


@pytest.fixture
def remote(bucket, proxy, tmp_path):
    """A checkpoint in a bucket; the proxy counts."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / checkpoint.WEIGHTS).write_bytes(CONTENT)
    checkpoint.seal(folder, [checkpoint.WEIGHTS], {checkpoint.KIND: "test"})
    target = Storage(f"{bucket}/runs/x-0123/step_000000004-0a1b2c3d")
    checkpoint.send(folder, target)
    proxy.forget()
    return target


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def base(temporary):
    return temporary / f"maskray-fetched-{os.getuid()}"


def test_all_who_read_at_the_same_time_have_the_same_copy(remote, proxy, temporary):
    together = threading.Barrier(READERS, timeout=60)

    def read(_):
        with fetched.shared(remote) as folder:
            together.wait()
            assert checkpoint.is_whole(folder)
            assert (folder / checkpoint.WEIGHTS).read_bytes() == CONTENT
            together.wait()
            return folder

    with ThreadPoolExecutor(READERS) as pool:
        places = set(pool.map(read, range(READERS)))
    assert len(places) == 1
    assert len(CONTENT) < proxy.sent_bytes < 1.1 * len(CONTENT)
    assert list(base(temporary).iterdir()) == []
    assert base(temporary).stat().st_mode & 0o777 == 0o700


def test_it_is_there_until_the_last_is_done_with_it(remote, temporary):
    with fetched.shared(remote) as mine:
        with fetched.shared(remote) as other:
            assert other == mine
        assert checkpoint.is_whole(mine)
        with fetched.shared(remote):  # removes what nobody reads, which this is not
            assert checkpoint.is_whole(mine)
    assert list(base(temporary).iterdir()) == []


def test_who_comes_and_goes_at_any_time_finds_all_of_it(tmp_path, temporary):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / checkpoint.WEIGHTS).write_bytes(CONTENT[:1000])
    checkpoint.seal(folder, [checkpoint.WEIGHTS], {checkpoint.KIND: "test"})
    near = Storage(folder)
    near.is_local = False  # as a bucket would say, in a thousandth of the time

    def read(number):
        with fetched.shared(near) as copy:
            time.sleep(number % 7 / 5000)
            return checkpoint.is_whole(copy)

    with ThreadPoolExecutor(READERS) as pool:
        assert all(pool.map(read, range(3000)))
    assert list(base(temporary).iterdir()) == []


READ_AND_WAIT = """
import sys
from maskray.data.storage import Storage
from maskray.training import fetched
with fetched.shared(Storage(sys.argv[1])) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_has_left_is_not_trusted_and_goes(remote, temporary):
    command = [sys.executable, "-c", READ_AND_WAIT, remote.uri]
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().decode().strip())
        with fetched.shared(remote) as mine:
            assert mine == left
        assert checkpoint.is_whole(left), "the other reads it"
        process.kill()
    assert checkpoint.is_whole(left)
    shutil.copytree(left.parent, base(temporary) / "of-another-checkpoint")
    (left / checkpoint.WEIGHTS).write_bytes(b"cut")
    with fetched.shared(remote) as mine:
        assert mine == left
        assert checkpoint.is_whole(mine)
    assert list(base(temporary).iterdir()) == []


def test_no_room_is_said_and_the_next_tries_again(remote, small_disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    (small_disk / "full").write_bytes(bytes(900_000))
    with (
        pytest.raises(StorageError, match=r"^TMPDIR: there is no room for a temporary copy of s3://"),
        fetched.shared(remote),
    ):
        pass
    assert list(base(small_disk).iterdir()) == []
    (small_disk / "full").unlink()
    with fetched.shared(remote) as folder:
        assert checkpoint.is_whole(folder)


def test_no_room_for_as_much_as_a_folder_is_said(remote, small_disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    subprocess.run(["mount", "-o", "remount,nr_inodes=1", str(small_disk)], check=True)
    for read in (fetched.shared, checkpoint.on_disk):
        with (
            pytest.raises(StorageError, match=r"^TMPDIR: there is no room for a temporary copy of s3://"),
            read(remote),
        ):
            pass


def test_a_folder_that_others_may_look_into_is_not_used(remote, temporary):
    base(temporary).mkdir(mode=0o755)
    base(temporary).chmod(0o755)
    with fetched.shared(remote) as folder:
        assert checkpoint.is_whole(folder)
        assert not folder.is_relative_to(base(temporary))
    assert [f.name for f in temporary.iterdir()] == [base(temporary).name]


def test_a_local_checkpoint_is_itself(tmp_path, temporary):
    with fetched.shared(Storage(tmp_path)) as folder:
        assert folder == tmp_path
    assert list(temporary.iterdir()) == []
