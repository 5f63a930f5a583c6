"""Ingest into an object store over HTTP: stopped, gone on with, added to and cleaned up as on a disk."""

import pytest

from maskray.data import survey
from maskray.data.check import check
from maskray.data.garbage import delete_garbage, find_garbage
from maskray.data.mapper import thread_mapper
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import DataError


class StoppedError(Exception):
    """As a kill comes, but in this process."""


def stop_half_way(done, total, phase):
    if phase == "write" and done >= total / 2:
        raise StoppedError


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(survey, "CHUNK_IMAGES", 8)


def test_a_stopped_ingest_goes_on_in_a_bucket(folder, tmp_path, bucket, ingest_here):
    with pytest.raises(StoppedError):
        ingest_here(folder, f"{bucket}/shards", stop_half_way, resize_short=16)
    storage = Storage(f"{bucket}/shards")
    assert storage.exists(".ingest")
    told = []
    manifest = ingest_here(folder, f"{bucket}/shards", lambda *args: told.append(args), resize_short=16)
    assert told[0] == (50, 50, "check")
    assert manifest == ingest_here(folder, tmp_path / "shards", resize_short=16)
    assert storage.list_names() == sorted(p.name for p in (tmp_path / "shards").iterdir())
    assert check(storage.uri, thread_mapper(2), lambda *told: None)


def test_an_object_store_that_fails_requests_changes_no_byte(folder, tmp_path, bucket, proxy, ingest_here):
    proxy.shares = {"throttle": 0.03, "reset": 0.03, "short": 0.03}
    manifest = ingest_here(folder, f"{bucket}/shards", resize_short=16)
    assert sum(proxy.faults.values()) > 0
    assert manifest == ingest_here(folder, tmp_path / "shards", resize_short=16)


@pytest.mark.parametrize(("source", "destination"), [("a", "a/b"), ("a/b/*.tar", "a")])
def test_a_source_and_a_destination_inside_each_other_are_refused_in_a_bucket(bucket, ingest_here, source, destination):
    with pytest.raises(DataError, match="the source and the destination lie inside each other"):
        ingest_here(f"{bucket}/{source}", f"{bucket}/{destination}")
    with pytest.raises(DataError, match="no such folder or file"):
        ingest_here(f"{bucket}/a", f"{bucket}/ab")


def test_versions_in_a_bucket(folder, tmp_path, bucket, picture, ingest_here):
    first = ingest_here(folder, f"{bucket}/shards")
    for i in range(20):
        picture(500 + i).save(folder / "cats" / f"{500 + i}.png")
    second = ingest_here(folder, f"{bucket}/shards", add=True)
    assert second.origins[-1].rows == 20
    assert Dataset.open(f"{bucket}/shards", first.fingerprint).manifest == first
    storage = Storage(f"{bucket}/shards")
    garbage = find_garbage(storage, set())
    assert garbage.versions == [first.fingerprint]
    delete_garbage(storage, garbage)
    groups = list(Dataset.open(f"{bucket}/shards").iter_groups())
    assert sum(len(group.keys) for group in groups) == second.splits["train"].rows
