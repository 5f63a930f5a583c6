"""Files appear whole or not at all, and what goes wrong is said."""

import errno
import os
import pickle
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from maskray.data import storage as storage_module
from maskray.data.s3 import ShortReadError
from maskray.data.storage import TEMPORARY, Storage
from maskray.errors import StorageError


def test_bytes_come_back_and_are_replaced(place):
    storage = Storage(f"{place}/new/place")
    assert not storage.exists()
    storage.write_bytes("a/b.txt", b"one")
    storage.write_bytes("a/b.txt", b"two")
    storage.write_bytes("a/c.txt", b"")
    assert storage.read_bytes("a/b.txt") == b"two"
    assert storage.read_bytes("a/c.txt") == b""
    assert storage.exists("a/b.txt")
    assert storage.exists("a")
    assert storage.list_names() == ["a"]
    assert storage.list_names("a") == ["b.txt", "c.txt"]
    assert storage.list_sizes("a") == {"b.txt": 3, "c.txt": 0}
    assert storage.list_names("missing") == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(place):
    storage = Storage(f"{place}/a")
    storage.write_bytes("x", b"old")

    def fail(name):
        with storage.open_output(name) as stream:
            stream.write(b"half of the new")
            raise RuntimeError("killed")

    for name in ("x", "y"):
        with pytest.raises(RuntimeError, match="killed"):
            fail(name)
    assert storage.read_bytes("x") == b"old"
    assert storage.list_names() == ["x"]


def test_a_file_of_this_machine_comes_back(place, tmp_path):
    storage, source, content = Storage(f"{place}/a"), tmp_path / "source", np.random.default_rng(0).bytes(10 * 2**20)
    source.write_bytes(content)
    storage.write_bytes("x", b"old")
    storage.write_file("x", source)
    assert storage.read_bytes("x") == content
    assert storage.list_names() == ["x"]


@pytest.fixture
def small_temporary(small_disk, monkeypatch):
    """The folder of temporary files, on a disk of 1 MB; what is uploaded lies there."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    monkeypatch.setattr(storage_module, "_SPOOLED_BYTES", 1024)
    return small_disk


def test_a_file_of_this_machine_is_not_copied_on_it(bucket, tmp_path, small_temporary):
    (tmp_path / "source").write_bytes(bytes(2 * 2**20))
    Storage(f"{bucket}/a").write_file("x", tmp_path / "source")
    assert Storage(f"{bucket}/a").list_sizes() == {"x": 2 * 2**20}


@pytest.mark.parametrize("written", [[2**20 + 4096], [2**20, 100]])  # of the second the last are held until the end
def test_no_room_for_what_is_to_be_uploaded_is_said(bucket, small_temporary, written):
    storage = Storage(f"{bucket}/a")

    def write():
        with storage.open_output("x") as stream:
            for num_bytes in written:
                stream.write(bytes(num_bytes))

    with pytest.raises(
        StorageError,
        match=rf"^TMPDIR: there is no room for a temporary copy of {bucket}/a/x. Found: .*No space left on device "
        rf"\([\d,]+ bytes are free in {small_temporary}\). What to do: free some space, or let the variable name",
    ):
        write()
    assert storage.list_names() == []
    assert list(small_temporary.iterdir()) == []


def test_a_large_file_comes_back(place):
    storage, content = Storage(f"{place}/a"), np.random.default_rng(0).bytes(18 * 2**20)  # S3: in parts, from the disk
    with storage.open_output("x") as stream:
        for at in range(0, len(content), 2**20):
            stream.write(content[at : at + 2**20])
    assert storage.list_sizes() == {"x": len(content)}
    assert storage.read_bytes("x") == content
    pieces = list(storage.read_pieces("x"))
    assert b"".join(pieces) == content
    assert len(pieces) > 1
    assert storage.read_range("x", 15 * 2**20, 1000) == content[15 * 2**20 :][:1000]


def test_reads_at_any_offset(place):
    storage = Storage(f"{place}/a")
    storage.write_bytes("x", b"0123456789")
    with storage.open_input_file("x") as file:
        file.seek(7)
        assert file.read(2) == b"78"
    assert storage.read_range("x", 7, 2) == b"78"
    assert storage.read_range("x", 0, 10) == b"0123456789"


@pytest.mark.parametrize("offset", [7, 10, 50])
def test_a_range_beyond_the_end_is_no_shorter_one(place, offset):
    storage = Storage(f"{place}/a")
    storage.write_bytes("x", b"0123456789")
    with pytest.raises(ShortReadError, match=rf"it has 10 bytes, {offset + 4} were expected"):
        storage.read_range("x", offset, 4)


def test_what_is_deleted_is_missing_for_a_reader_that_had_it(place):
    storage = Storage(f"{place}/a")
    storage.write_bytes("x", b"0123456789")
    storage.read_range("x", 0, 2)
    storage.delete("x")
    for read in (lambda: storage.read_range("x", 0, 2), lambda: storage.read_bytes("x")):
        with pytest.raises(FileNotFoundError):
            read()


def test_delete_takes_files_folders_and_nothing(place):
    storage = Storage(f"{place}/a")
    storage.write_bytes("a/b/c", b"1")
    storage.delete("a/b/c")
    assert not storage.exists("a/b/c")
    storage.write_bytes("a/b/c", b"1")
    storage.delete("a")
    storage.delete("a")
    assert storage.list_names() == []


def test_of_many_only_one_creates(place):
    storage = Storage(f"{place}/locks")
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: storage.create_exclusive("lease", b"%d" % i), range(32)))
    assert sum(won) == 1
    assert storage.read_bytes("lease") == b"%d" % won.index(True)


WATCH = """
import pathlib, sys
lock, done, seen = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), set()
print("watching", flush=True)
while not done.exists():
    try:
        seen.add(lock.read_bytes())
    except FileNotFoundError:
        pass
seen.add(lock.read_bytes())
print(sorted(seen))
"""


def test_a_lock_is_never_seen_half_made(tmp_path):
    storage, done = Storage(tmp_path / "locks"), tmp_path / "done"
    command = [sys.executable, "-c", WATCH, str(tmp_path / "locks" / "lease"), str(done)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "watching\n"
        for _ in range(1000):
            assert storage.create_exclusive("lease", b"me")
            storage.delete("lease")
        storage.create_exclusive("lease", b"me")
        done.touch()
        assert watcher.stdout.read() == "[b'me']\n"
    assert storage.list_names() == ["lease"]


def test_a_lock_is_made_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    storage = Storage(tmp_path)
    assert storage.create_exclusive("lease", b"me")
    assert not storage.create_exclusive("lease", b"you")
    assert storage.read_bytes("lease") == b"me"


def test_places_join_and_travel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = Storage("runs")
    assert relative.uri == str(tmp_path / "runs")
    assert relative.is_local
    assert relative.join("a", "b") == str(tmp_path / "runs/a/b")
    relative.child("a").write_bytes("b", b"1")
    assert pickle.loads(pickle.dumps(relative)).read_bytes("a/b") == b"1"
    assert Storage(f"file://{tmp_path}/runs").read_bytes("a/b") == b"1"


def test_a_question_mark_in_the_name_of_a_folder_is_a_letter(tmp_path):
    storage = Storage(tmp_path / "a?b=c")
    assert storage.join("x", "y") == f"{tmp_path}/a?b=c/x/y"
    storage.child("x").write_bytes("y", b"1")
    assert (tmp_path / "a?b=c/x/y").read_bytes() == b"1"


def test_a_bucket_keeps_its_options_when_joined():
    storage = Storage("s3://bucket/prefix?endpoint_override=localhost:1&scheme=http&region=x")
    assert not storage.is_local
    assert storage.child("a").join("b") == ("s3://bucket/prefix/a/b?endpoint_override=localhost:1&scheme=http&region=x")


def test_a_bucket_travels(bucket, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    storage = Storage(f"{bucket}/runs/?endpoint_override={endpoint}&scheme=http&region=us-east-1")
    storage.child("a").write_bytes("b", b"1")
    assert storage.child("a").create_exclusive("c", b"2")
    travelled = pickle.loads(pickle.dumps(storage))
    assert travelled.read_bytes("a/b") == b"1"
    assert travelled.child("a").list_sizes() == {"b": 1, "c": 1}


def test_places_in_a_bucket_share_a_client_and_another_environment_does_not(bucket, monkeypatch):
    one = Storage(f"{bucket}/a")
    assert one.child("b")._fs is one._fs
    assert Storage(f"{bucket}/c")._fs is one._fs
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert Storage(f"{bucket}/a")._fs is not one._fs


def test_what_is_not_local_works_through_the_same_verbs():
    storage = Storage("mock:///bucket")  # pyarrow's own file system in memory
    storage._fs.create_dir("bucket/a")  # which S3 does not need
    storage.write_bytes("a/b", b"12")
    storage.check_writable()
    assert storage.create_exclusive("a/lock", b"me")
    assert not storage.create_exclusive("a/lock", b"you")
    assert storage.list_sizes("a") == {"b": 2, "lock": 2}
    storage.delete("a")
    assert storage.list_names() == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/b")


def test_a_missing_file_is_said(place):
    with pytest.raises(FileNotFoundError):
        Storage(f"{place}/a").read_bytes("nothing")
    with pytest.raises(FileNotFoundError):
        Storage(f"{place}/a").read_range("nothing", 0, 1)
    with pytest.raises(FileNotFoundError):
        list(Storage(f"{place}/a").read_pieces("nothing"))


def test_a_missing_file_is_told_from_one_that_cannot_be_read(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError):
        Storage(tmp_path).read_bytes("nothing")
    with pytest.raises(StorageError, match=r"cannot read .*file/x"):
        Storage(tmp_path / "file").read_bytes("x")


def test_a_place_that_cannot_be_written_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot write .*/file/runs/.*What to do: take another path"):
        Storage(tmp_path / "file" / "runs").check_writable()
    with pytest.raises(StorageError, match=r"cannot write /proc/.*What to do: take"):
        Storage("/proc/maskray").check_writable()
    Storage(tmp_path / "fine").check_writable()
    assert list((tmp_path / "fine").iterdir()) == []


def test_an_unknown_kind_of_place_is_refused():
    with pytest.raises(StorageError, match=r"ftp://x/y.*a local path or s3://"):
        Storage("ftp://x/y")


def test_partial_files_are_told_by_their_prefix():
    assert TEMPORARY.startswith(".")  # hidden from sources and from the look for foreign files
