"""An object store that fails now and then is worked with; one that refuses is not asked again."""

import logging

import pytest

from maskray.data import storage as storage_module
from maskray.data.retry import RETRIES, Patience
from maskray.data.storage import Storage
from maskray.errors import StorageError, UnreachableError


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(storage_module, "PATIENCE", Patience(first_wait_seconds=0.01))


@pytest.fixture
def storage(bucket, proxy):
    """A place with a file `x` behind the proxy."""
    storage = Storage(f"{bucket}/a")
    storage.write_bytes("x", b"0123456789" * 100)
    return storage


VERBS = {
    "read_bytes": lambda s: s.read_bytes("x") == b"0123456789" * 100,
    "read_pieces": lambda s: b"".join(s.read_pieces("x")) == b"0123456789" * 100,
    "read_range": lambda s: s.read_range("x", 510, 20) == b"0123456789" * 2,
    "exists": lambda s: s.exists("x") and not s.exists("y"),
    "list_sizes": lambda s: s.list_sizes() == {"x": 1000},
    "delete": lambda s: s.delete("x") or not s.exists("x"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["throttle", "reset", "short"])
def test_each_verb_outlives_each_fault(storage, proxy, verb, kind, caplog):
    before, proxy.script = RETRIES.count, [kind, None, kind, None, kind, kind]
    proxy.forget()
    with caplog.at_level(logging.WARNING):
        while proxy.script:
            assert VERBS[verb](storage)
    # A client asks anew by itself where a connection that it had kept was reset.
    assert 0 < RETRIES.count - before <= proxy.faults.total() == 4
    assert storage.uri in caplog.text


@pytest.mark.parametrize("verb", ["read_bytes", "read_pieces", "read_range"])
def test_what_did_not_come_is_not_what_lay_in_memory(storage, proxy, verb):
    content = bytes(range(1, 201)) * 250
    storage.write_bytes("y", content)
    read = {
        "read_bytes": lambda: storage.read_bytes("y"),
        "read_pieces": lambda: b"".join(storage.read_pieces("y")),
        "read_range": lambda: storage.read_range("y", 0, len(content)),
    }[verb]
    assert read() == content  # and its memory is free again
    proxy.script = ["fewer"] if verb == "read_range" else [None, "fewer"]  # the size is asked for anew
    got, half = read(), len(content) // 2
    assert proxy.script == []
    assert got[:half] == content[:half]
    assert got[half:] == bytes(len(content) - half)


def test_a_slow_answer_is_waited_for(storage, proxy):
    before, proxy.script = RETRIES.count, ["slow"] * 2
    assert VERBS["read_bytes"](storage)
    assert RETRIES.count == before


@pytest.mark.parametrize("kind", ["throttle", "reset"])
@pytest.mark.parametrize("failing", range(5))  # the start, three parts, the end
def test_uploads_outlive_faults(storage, proxy, kind, failing):
    content = b"12345678" * (3 * 2**20)
    proxy.script = [None] * failing + [kind]
    with storage.open_output("large") as stream:
        stream.write(content)
    proxy.script = [kind]
    storage.write_bytes("small", b"1")
    assert proxy.faults == {kind: 2}
    assert storage.list_sizes() == {"x": 1000, "large": len(content), "small": 1}
    assert storage.read_bytes("large") == content


def test_an_exclusive_file_whose_answer_was_lost_is_ours(storage, proxy):
    proxy.script = ["reset"]  # it comes through and its answer does not; asked again, the store says: it is there
    assert storage._create_object("lease", b"me")
    assert proxy.faults == {"reset": 1}
    assert not storage._create_object("lease", b"you")


def test_an_object_store_that_never_answers_is_named(storage, proxy, monkeypatch):
    monkeypatch.setattr(storage_module, "PATIENCE", Patience(tries=3, first_wait_seconds=0.01))
    proxy.forget()
    proxy.shares = {"throttle": 1.0}
    with pytest.raises(UnreachableError, match=r"cannot list s3://.*/a\. Found: .*SLOW_DOWN.*What to do: check that"):
        storage.list_names()
    assert proxy.requests.total() == 3


@pytest.mark.parametrize(
    ("place", "verb", "found"),
    [
        ("s3://no-such-bucket-here/a", lambda s: s.check_writable(), "NO_SUCH_BUCKET"),
        ("s3://no-such-bucket-here/a", lambda s: s.create_exclusive("x", b"1"), "NoSuchBucket"),
    ],
)
def test_a_mistake_is_said_at_once(proxy, place, verb, found):
    before = RETRIES.count
    with pytest.raises(StorageError, match=rf"{found}.*What to do: check the bucket's name, the region") as caught:
        verb(Storage(place))
    assert not isinstance(caught.value, UnreachableError)
    assert RETRIES.count == before


@pytest.mark.parametrize("verb", ["read_bytes", "read_pieces", "read_range", "exists", "list_sizes", "delete"])
def test_a_refusal_is_said_at_once(storage, proxy, verb):
    before, proxy.shares = RETRIES.count, {"refuse": 1.0}
    proxy.forget()
    with pytest.raises(StorageError, match=r"ACCESS_DENIED.*credentials in the environment") as caught:
        VERBS[verb](storage)
    assert not isinstance(caught.value, UnreachableError)
    assert (RETRIES.count, proxy.requests.total()) == (before, 1)


def test_a_refusal_amid_a_file_is_said_too(storage, proxy):
    pieces, proxy.script = storage.read_pieces("x"), [None, "refuse"]  # its size, its first piece
    with pytest.raises(StorageError, match=r"cannot read s3://.*/a/x\. Found: .*ACCESS_DENIED"):
        next(pieces)
