"""A row group takes one request, its footer one more, once; and what is kept of footers has a bound."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from maskray.data import row_groups
from maskray.data import storage as storage_module
from maskray.data.retry import Patience
from maskray.data.row_groups import Footers, ParquetPlace, read_row_group
from maskray.data.shards import Dataset, Row, write_shard
from maskray.data.storage import Storage
from maskray.errors import StorageError, UnreachableError

COLUMNS, GROUPS = ("key", "image", "label"), 128


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(storage_module, "PATIENCE", Patience(first_wait_seconds=0.01))
    monkeypatch.setattr(row_groups, "_SECOND_LOOKS", Patience(tries=3, first_wait_seconds=0.01))


@pytest.fixture
def footers(monkeypatch):
    """The process's footers, none yet."""
    kept = Footers(2**20)
    monkeypatch.setattr(row_groups, "FOOTERS", kept)
    return kept


def a_shard(storage, name="train/00000.parquet", chunks=5 * GROUPS):
    rows = (Row(f"class{i % 7}/{i:08d}.jpg", b"%d" % i * 50, i % 7, 340, 256, 3, bytes(32)) for i in range(4 * GROUPS))
    shard = write_shard(storage, name, rows, 4)
    return ParquetPlace(storage, name, shard.size, shard.sha256, chunks)


def read(file, number):
    table = read_row_group(file, number, COLUMNS)
    assert table.column_names == list(COLUMNS)
    assert table["image"].to_pylist() == [b"%d" % i * 50 for i in range(4 * number, 4 * number + 4)]
    return table


# ------------------------------------------------------------------------------------------------------------ requests


def test_the_first_row_group_takes_three_requests_and_each_other_one(bucket, proxy, footers):
    file = a_shard(Storage(f"{bucket}/data"))
    proxy.forget()
    read(file, 3)
    assert proxy.requests == {"HEAD": 1, "GET": 2}  # the size, the footer, the row group
    for number in range(10):
        read(file, number)
    assert proxy.requests == {"HEAD": 1, "GET": 12}
    footers.drop((file.storage.uri, file.name, file.digest))
    read(file, 3)
    assert proxy.requests == {"HEAD": 1, "GET": 14}


def test_a_footer_that_is_larger_than_thought_takes_one_request_more(bucket, proxy, footers):
    file = a_shard(Storage(f"{bucket}/data"), chunks=1)
    proxy.forget()
    read(file, 3)
    assert proxy.requests == {"HEAD": 1, "GET": 3}


def test_a_dataset_that_travels_finds_the_footers_of_its_process(folder, bucket, proxy, ingest_here):
    ingest_here(folder, f"{bucket}/shards")
    Dataset.open(f"{bucket}/shards").read_group(0)
    proxy.forget()
    Dataset.open(f"{bucket}/shards").read_group(1)
    assert proxy.requests["GET"] - 1 == 3  # two lists and the row group, beside the manifest


# --------------------------------------------------------------------------------------------------------------- cache


def test_footers_are_bounded_in_bytes_and_the_last_used_stay():
    footers = Footers(100)
    for name in "abcd":
        footers.get((name,), lambda: b"x" * 30)
        footers.get(("a",), lambda: pytest.fail("it was used last"))
    assert (len(footers), footers.num_bytes) == (3, 90)
    loaded = []
    for name in "abcd":
        footers.get((name,), lambda name=name: loaded.append(name) or b"x" * 30)
    assert loaded == ["b", "c", "d"]  # b had gone; its return drove out c, and so on
    assert footers.get(("large",), lambda: b"x" * 101) == b"x" * 101
    assert (len(footers), footers.num_bytes) == (3, 90)


def test_many_threads_keep_the_count_right():
    footers, start = Footers(1000), threading.Barrier(8)

    def work(seed):
        start.wait()
        for i in range(2000):
            name = f"{(seed * 7 + i * 13) % 60}"
            assert footers.get((name,), lambda name=name: name.encode() * 20) == name.encode() * 20
            if i % 17 == 0:
                footers.drop((name,))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert footers.num_bytes == sum(len(v) for v in footers._kept.values()) <= 1000


def test_datasets_do_not_mix(tmp_path, footers):
    one, other = (a_shard(Storage(tmp_path / name)) for name in ("one", "other"))
    read(one, 5)
    read(other, 5)
    assert len(footers) == 2
    longer = write_shard(
        one.storage, one.name, (Row(str(i), b"%d" % i * 50, 1, 1, 1, 3, bytes(32)) for i in range(40)), 4
    )
    read(ParquetPlace(one.storage, one.name, longer.size, longer.sha256, 50), 5)
    assert len(footers) == 3


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("script", [["fewer"], [None, "fewer"], ["fewer", "fewer"], [None, "fewer", None, "fewer"]])
def test_what_came_damaged_is_read_again(bucket, proxy, footers, script, caplog):
    file = a_shard(Storage(f"{bucket}/data"))
    file.storage.read_range(file.name, 0, 1)  # its size is known
    proxy.script = list(script)
    with caplog.at_level(logging.WARNING):
        read(file, 3)
    assert proxy.script == []
    assert f"Cannot read row group 3 of {file.storage.uri}/{file.name}" in caplog.text


def test_a_damaged_file_is_looked_at_three_times_and_mended_at_once(bucket, proxy, footers):
    file = a_shard(Storage(f"{bucket}/data"))
    content = file.storage.read_bytes(file.name)
    file.storage.write_bytes(file.name, content[:-200] + b"?" * 192 + content[-8:])
    proxy.forget()
    with pytest.raises(OSError, match=r"footer|thrift|Parquet|row group"):
        read_row_group(file, GROUPS - 1, COLUMNS)
    assert proxy.requests["GET"] <= 6
    file.storage.write_bytes(file.name, content)
    read(file, GROUPS - 1)


def test_a_footer_that_points_elsewhere_is_damage(tmp_path, footers):
    file = a_shard(Storage(tmp_path))
    with pytest.raises(OSError, match="it has 128 row groups only"):
        read_row_group(file, GROUPS, COLUMNS)
    short = ParquetPlace(file.storage, file.name, 5000, "other", 5 * GROUPS)
    with pytest.raises(OSError, match="does not end as a Parquet file does"):
        read_row_group(short, 0, COLUMNS)


def test_no_answer_and_a_refusal_are_told_apart(folder, bucket, proxy, ingest_here, monkeypatch):
    ingest_here(folder, f"{bucket}/shards")
    dataset = Dataset.open(f"{bucket}/shards")
    monkeypatch.setattr(storage_module, "PATIENCE", Patience(tries=2, first_wait_seconds=0.01))
    proxy.shares = {"throttle": 1.0}
    with pytest.raises(UnreachableError, match=r"cannot read .*train/00000.parquet.*check that the object store"):
        dataset.read_group(0)
    proxy.shares = {"refuse": 1.0}
    with pytest.raises(StorageError, match=r"cannot read .*train/00000.parquet.*credentials") as caught:
        dataset.read_group(0)
    assert not isinstance(caught.value, UnreachableError)
