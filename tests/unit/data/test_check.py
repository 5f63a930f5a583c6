"""A shard that cannot be read is a damaged one, and hides no other."""

import logging

import pytest

from maskray.data import storage as storage_module
from maskray.data.check import check
from maskray.data.mapper import thread_mapper
from maskray.data.retry import Patience
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import DataError, StorageError, UnreachableError


def one_by_one(function, items):
    return (function(item) for item in items)


def test_a_shard_that_cannot_be_read_is_damaged_and_hides_no_other(folder, tmp_path, ingest_here, caplog):
    path = tmp_path / "shards"
    manifest = ingest_here(folder, path)
    assert [s.name for s in check(str(path), thread_mapper(2), lambda *told: None)] == [s.name for s in manifest.shards]
    (path / "train/00000.parquet").unlink()
    (path / "train/00000.parquet").mkdir()
    content = bytearray((path / "train/00001.parquet").read_bytes())
    content[50] ^= 1
    (path / "train/00001.parquet").write_bytes(content)
    with (path / "held_out/00000.parquet").open("ab") as file:
        file.write(b"more")
    names = "train/00000.parquet, train/00001.parquet, held_out/00000.parquet"
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=rf"3 of the .*Found: {names}"):
        check(str(path), thread_mapper(2), lambda *told: None)
    one, two, three = caplog.messages
    assert one.startswith("train/00000.parquet: cannot read ")
    assert (two, three) == tuple(f"{name}: its checksum is wrong" for name in names.split(", ")[1:])


def test_a_refusal_is_damage_and_a_store_that_is_away_is_none(folder, ingest_here, bucket, proxy, monkeypatch):
    monkeypatch.setattr(storage_module, "PATIENCE", Patience(tries=2, first_wait_seconds=0.01))
    manifest = ingest_here(folder, f"{bucket}/shards")
    dataset = Dataset.open(f"{bucket}/shards")
    first = manifest.shards[0].name

    def refused(*script):
        def mapper(function, items):
            proxy.script = list(script)
            yield from one_by_one(function, items)

        return mapper

    with pytest.raises(DataError, match=rf"1 of the \d+ shards .*Found: {first}\."):
        check(f"{bucket}/shards", refused(None, "refuse"), lambda *told: None)
    with pytest.raises(UnreachableError, match=rf"cannot read .*{first}"):
        check(f"{bucket}/shards", refused(None, "throttle", "throttle"), lambda *told: None)
    proxy.script = [None, "refuse"]
    with pytest.raises(StorageError, match=rf"cannot read .*{first}"):
        dataset.check()
    Storage(f"{bucket}/shards").delete(first)
    with pytest.raises(DataError, match=rf"{first} cannot be read.*ingest again"):
        dataset.check()
