"""The decoded images of a machine: made once, by one process, whole or not at all."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskray.config.schema import DataConfig
from maskray.data import cache
from maskray.data.cache import INDEX, PIXELS, cache_folder, open_cache
from maskray.data.local import chosen_cache, is_walked_locally
from maskray.data.shards import Dataset, decoded_bytes
from maskray.data.stream import decode_group
from maskray.errors import DataError, StorageError

ROOT = Path(__file__).parents[3]
PATIENCE_SECONDS = 60


class Watched(Dataset):
    """Counts what is read of it."""

    reads = 0

    def read_group(self, group, split="train"):
        self.reads += 1
        return super().read_group(group, split)


@pytest.fixture
def dataset(folder, ingest_here, tmp_path):
    ingest_here(folder, tmp_path / "data")
    opened = Dataset.open(str(tmp_path / "data"))
    return Watched(opened.storage, opened.manifest)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "cache"


def entry(place):
    (found,) = [path for path in place.iterdir() if path.is_dir()]
    return found


def assert_holds(whole, dataset, channels=3):
    for number in range(dataset.num_row_groups()):
        group = dataset.read_group(number)
        assert whole.keys_of(number) == group.keys
        np.testing.assert_array_equal(whole.rows(number), group.rows)
        pairs = zip(whole.images_of(number), decode_group(group, channels), strict=True)
        assert all(torch.equal(kept, decoded) for kept, decoded in pairs)


@pytest.mark.parametrize("channels", [1, 3])
def test_it_holds_what_decoding_gives(dataset, place, channels):
    assert_holds(open_cache(dataset, channels, place), dataset, channels)
    assert (entry(place) / PIXELS).stat().st_size <= decoded_bytes(dataset, channels)


def test_it_is_made_once_for_each_way_to_decode(dataset, place):
    open_cache(dataset, 3, place)
    assert dataset.reads == dataset.num_row_groups()
    open_cache(dataset, 3, place)
    assert dataset.reads == dataset.num_row_groups()
    open_cache(dataset, 1, place)
    assert dataset.reads == 2 * dataset.num_row_groups()


def test_nobody_can_write_to_what_the_others_read(dataset, place):
    one, other = open_cache(dataset, 3, place), open_cache(dataset, 3, place)
    before = other.pixels.clone()
    one.pixels.zero_()
    assert torch.equal(other.pixels, before)
    assert_holds(open_cache(dataset, 3, place), dataset)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", [PIXELS, INDEX])
@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink])
def test_a_damaged_one_is_made_anew(dataset, place, name, damage, caplog):
    open_cache(dataset, 3, place)
    damage(entry(place) / name)
    assert_holds(open_cache(dataset, 3, place), dataset)
    assert "are damaged" in caplog.text
    caplog.clear()
    open_cache(dataset, 3, place)
    assert caplog.text == ""


def test_a_damaged_shard_stops_it_and_leaves_nothing(dataset, place):
    shard = dataset.manifest.splits["train"].shards[1]
    Path(dataset.storage.join(shard.name)).write_bytes(b"no shard")
    with pytest.raises(DataError, match=rf"{shard.name} cannot be read"):
        open_cache(dataset, 3, place)
    assert [path.suffix for path in place.iterdir()] == [".lock"]


def test_a_disk_without_room_is_told_before(dataset, place):
    train = replace(dataset.manifest.splits["train"], pixels=2**60)
    huge = Watched(dataset.storage, replace(dataset.manifest, splits=dataset.manifest.splits | {"train": train}))
    with pytest.raises(StorageError, match=r"^data.cache_folder: the disk has no room.*GiB free.*set data.cache: none"):
        open_cache(huge, 3, place)
    assert huge.reads == 0


def test_a_folder_that_cannot_be_made(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"^data.cache_folder: cannot keep decoded images in .*file/cache"):
        open_cache(dataset, 3, tmp_path / "file" / "cache")


def test_the_folder_is_local():
    assert cache_folder(None).is_absolute()
    assert cache_folder("somewhere") == Path.cwd() / "somewhere"
    assert cache_folder("file:///some/where") == Path("/some/where")
    DataConfig(path="unset", cache_folder="file:///some/where")
    with pytest.raises(ValueError, match=r"data.cache_folder: files there cannot be mapped.*Found: s3://bucket/cache"):
        DataConfig(path="unset", cache_folder="s3://bucket/cache")


# ---------------------------------------------------------------------------------------------------------- processes

BUILDER = """
import logging, sys, time
from pathlib import Path
from maskray.data.cache import open_cache
from maskray.data.shards import Dataset

logging.basicConfig(level=logging.INFO, format="%(message)s")
data, place, gate = sys.argv[1:]

class Held(Dataset):
    def read_group(self, group, split="train"):
        while group and not Path(gate).exists():
            time.sleep(0.01)
        return super().read_group(group, split)

opened = Dataset.open(data)
print(int(open_cache(Held(opened.storage, opened.manifest), 3, Path(place)).pixels.long().sum()))
"""


@pytest.fixture
def builders(dataset, place, tmp_path):
    """Processes that open the cache, and that decode no more than a row group before the gate is there."""
    started = []

    def start():
        output = (tmp_path / f"output-{len(started)}").open("wb")
        arguments = [dataset.storage.uri, str(place), str(tmp_path / "gate")]
        with output:
            process = subprocess.Popen(
                [sys.executable, "-c", BUILDER, *arguments],
                env=os.environ | {"PYTHONPATH": str(ROOT / "platform")},
                stdout=output,
                stderr=output,
            )
        started.append(process)
        return process, Path(output.name)

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_until(process, ready):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_building(place):
    return lambda: any(place.glob(f".tmp-*/{PIXELS}"))


def test_of_two_processes_one_builds_and_the_other_waits(builders, dataset, place, tmp_path):
    one, said_by_one = builders()
    wait_until(one, is_building(place))
    other, said_by_other = builders()
    wait_until(other, lambda: "Another process decodes the images into" in said_by_other.read_text())
    (tmp_path / "gate").touch()
    assert (one.wait(PATIENCE_SECONDS), other.wait(PATIENCE_SECONDS)) == (0, 0)
    assert "Decoding the" in said_by_one.read_text()
    assert "Decoding the" not in said_by_other.read_text()
    assert said_by_one.read_text().splitlines()[-1] == said_by_other.read_text().splitlines()[-1]
    assert_holds(open_cache(dataset, 3, place), dataset)


def test_who_builds_and_who_waits_gives_signs_of_life_and_who_reads_has_no_need_to(builders, dataset, place, tmp_path):
    one, _ = builders()
    wait_until(one, is_building(place))
    waited = []

    def let_it_go_on():
        waited.append(len(waited))
        if len(waited) == 3:
            (tmp_path / "gate").touch()

    whole = open_cache(dataset, 3, place, let_it_go_on)
    assert len(waited) >= 3
    assert one.wait(PATIENCE_SECONDS) == 0
    assert_holds(whole, dataset)

    open_cache(dataset, 3, place, lambda: pytest.fail("there is nothing to wait for"))
    built = []
    open_cache(dataset, 1, place, lambda: built.append(dataset.reads))
    assert len(built) == dataset.num_row_groups(), "after each row group"


def test_who_is_told_to_end_while_it_builds_leaves_nothing(dataset, place):
    def end():
        raise SystemExit

    with pytest.raises(SystemExit):
        open_cache(dataset, 3, place, end)
    assert [path.suffix for path in place.iterdir()] == [".lock"]
    assert_holds(open_cache(dataset, 3, place), dataset)


def test_a_long_one_says_how_far_it_is_less_and_less_often(dataset, place, caplog, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(cache.time, "monotonic", lambda: now)
    progress = cache._Progress(dataset, place, lambda: None)
    num_rows = dataset.num_row_groups() * dataset.manifest.group_rows
    for minute in range(10):
        now = 1000.0 + 60 * minute
        progress(num_rows * minute // 10)
    said = re.findall(
        r"(\d+) % of the \d+ images are decoded into .*\((\d+) s so far, about (\d+) s to go", caplog.text
    )
    assert [int(seconds) for _, seconds, _ in said] == [60, 120, 240, 480]
    assert abs(int(said[1][0]) - 20) <= 2
    assert abs(int(said[1][2]) - 480) <= 30


def test_a_killed_builder_is_in_nobodys_way(builders, dataset, place):
    process, _ = builders()
    wait_until(process, is_building(place))
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert is_building(place)()
    assert_holds(open_cache(dataset, 3, place), dataset)
    assert not list(place.glob(".tmp-*"))


# -------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("stream", "cache", "fits", "locally", "chosen"),
    [
        ("auto", "auto", True, True, "host"),
        ("auto", "auto", False, False, None),
        ("auto", "none", True, True, "none"),
        ("auto", "host", False, True, "host"),
        ("auto", "device", False, True, "device"),
        ("local", "auto", False, True, "none"),
        ("local", "device", True, True, "device"),
        ("ray", "auto", True, False, None),
    ],
)
def test_who_decodes_and_what_is_kept(dataset, stream, cache, fits, locally, chosen):
    needed = decoded_bytes(dataset, 3)
    data = DataConfig(path="unset", stream=stream, cache=cache, local_bytes=needed if fits else needed - 1)
    assert is_walked_locally(data, dataset) == locally
    if locally:
        assert chosen_cache(data, dataset) == chosen


@pytest.mark.parametrize("cache", ["host", "device"])
def test_ray_data_keeps_nothing(cache):
    with pytest.raises(ValueError, match=rf"data.cache: only a worker .* Found: {cache}, with data.stream ray"):
        DataConfig(path="unset", stream="ray", cache=cache)
