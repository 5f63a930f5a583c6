"""One order: what Ray Data delivers is, bit for bit, what the in-process walk delivers."""

import random
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.data

from maskray.config.resolve import resolve
from maskray.data.local import LocalStream
from maskray.data.retry import RETRIES
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.data.stream import Unit, steps
from maskray.on_ray import stream
from object_store import FaultyProxy

pytestmark = pytest.mark.ray


def delivered(
    spec: StreamSpec, run: Storage, data, workers: int, start_step: int, monkeypatch, last_waits_seconds: float = 0.0
) -> list[list[Unit]]:
    """What each of `workers` readers gets, dealt as Train deals; the last may wait behind its first row."""
    monkeypatch.setattr(stream, "registered_step", lambda _: start_step)
    segments = {name: make() for name, make in stream.datasets(spec, run, workers, data).items()}
    dealing, shards, lock = stream.DealingConfig(data), {}, threading.Lock()
    got: list[list[Unit]] = [[] for _ in range(workers)]

    def shard(name: str, rank: int) -> ray.data.DataIterator:
        with lock:
            if name not in shards:
                shards[name] = dealing.configure({name: segments[name]}, workers, None, None)
        return shards[name][rank][name]

    def read(rank: int) -> None:
        for unit in stream.Share(spec, rank, workers, data, start_step, partial(shard, rank=rank)).units():
            got[rank].append(unit._replace(images_NCHW=unit.images_NCHW.copy()))
            is_late = rank == workers - 1 and len(got[rank]) == 1
            time.sleep(last_waits_seconds if is_late else random.random() * 0.01)

    readers = [threading.Thread(target=read, args=(rank,), daemon=True) for rank in range(workers)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    return got


OPTIONS = {
    "one execution": {},
    "executions of five tasks": {"tasks_per_execution": 5},
    "executions of one row group a worker": {"tasks_per_execution": 1, "groups_per_task": 1},
    "actors": {"actors": 2, "groups_per_task": 3},
    "a small share of the object store": {"object_store_bytes": 2 * 2**20, "prefetch_groups": 1},
}


@pytest.mark.parametrize(
    ("options", "workers", "start_step"),
    [
        ("one execution", 1, 0),
        ("one execution", 3, 1),
        ("executions of five tasks", 2, 3),
        ("executions of five tasks", 4, 0),
        ("executions of one row group a worker", 2, 5),
        ("actors", 2, 1),
        ("a small share of the object store", 4, 0),
    ],
)
def test_ray_data_and_the_in_process_walk_are_equal_to_the_bit(
    tiny, tmp_path, ray_cluster, monkeypatch, options: str, workers: int, start_step: int
):
    config = tiny(optim={"steps": 6, "global_batch": 128}, data={"views_per_image": 2, **OPTIONS[options]})
    dataset = Dataset.open(config.data.path)
    spec = StreamSpec.of(config, resolve(config, dataset.facts()), dataset)
    got = delivered(spec, Storage(tmp_path), config.data, workers, start_step, monkeypatch)
    for rank in range(workers):
        with LocalStream(spec, dataset, rank=rank, world_size=workers, start_step=start_step) as local:
            wanted = list(local)
        assert [u.position for u in got[rank]] == [u.position for u in wanted]
        for mine, theirs in zip(got[rank], wanted, strict=True):
            assert np.array_equal(mine.images_NCHW, theirs.images_NCHW)
            assert np.array_equal(mine.visible_NHW, theirs.visible_NHW)
            assert np.array_equal(mine.weights_N, theirs.weights_N)
            assert mine.keys == theirs.keys


def test_what_tasks_could_not_read_is_said_where_it_is_trained_on(
    tiny, digits, tmp_path, ray_cluster, monkeypatch, caplog
):
    shutil.copytree(digits, tmp_path / "digits")
    data = {"path": str(tmp_path / "digits"), "unreadable": "skip"}
    config = tiny(optim={"steps": 3, "global_batch": 64}, data=data)
    dataset = Dataset.open(config.data.path)
    spec = StreamSpec.of(config, resolve(config, dataset.facts()), dataset)
    number, path = spec.plan.locate(5)[1], tmp_path / "digits/train/00000.parquet"
    chunk, content = pq.read_metadata(path).row_group(number).column(1), bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 1
    path.write_bytes(content)
    (got,) = delivered(spec, Storage(tmp_path), config.data, 1, 0, monkeypatch)
    with LocalStream(spec, dataset) as local:
        assert [u.warnings for u in got] == [u.warnings for u in local]
    caplog.clear()
    list(steps(iter(got), spec, 0, 1, 0))
    (said,) = caplog.messages
    assert f"row group {number} of train/00000.parquet cannot be read" in said


def test_an_execution_is_kept_for_a_worker_that_is_far_behind(tiny, tmp_path, ray_cluster, monkeypatch):
    data = {"views_per_image": 2, "tasks_per_execution": 3, "groups_per_task": 4, "prefetch_groups": 1}
    config = tiny(optim={"steps": 12, "global_batch": 128}, data=data)  # four executions of twelve row groups
    dataset = Dataset.open(config.data.path)
    spec = StreamSpec.of(config, resolve(config, dataset.facts()), dataset)
    got = delivered(spec, Storage(tmp_path), config.data, 2, 0, monkeypatch, last_waits_seconds=6)
    assert [[u.position for u in units] for units in got] == [list(spec.positions(rank, 2, 0)) for rank in range(2)]


def test_an_object_store_that_fails_changes_nothing(
    tiny, tmp_path, ray_cluster, monkeypatch, digits_in_bucket: str, proxy: FaultyProxy
):
    config = tiny(optim={"steps": 30})
    dataset = Dataset.open(config.data.path)
    spec = StreamSpec.of(config, resolve(config, dataset.facts()), dataset)
    # The processes of the cluster were started before the environment led to the bucket.
    uri = f"{digits_in_bucket}?endpoint_override={proxy.url.removeprefix('http://')}&scheme=http&region=us-east-1"
    proxy.forget()
    proxy.shares = dict.fromkeys(("throttle", "reset", "short"), 0.05 / 3)
    before = RETRIES.count
    (got,) = delivered(replace(spec, path=uri), Storage(tmp_path), config.data, 1, 0, monkeypatch)
    assert RETRIES.count > before, "the tasks' retries are counted here"
    proxy.shares = {}
    with LocalStream(spec, dataset) as local:
        wanted = list(local)
    assert [(u.position, u.keys) for u in got] == [(u.position, u.keys) for u in wanted]
    for mine, theirs in zip(got, wanted, strict=True):
        assert np.array_equal(mine.images_NCHW, theirs.images_NCHW)
        assert np.array_equal(mine.visible_NHW, theirs.visible_NHW)
        assert np.array_equal(mine.weights_N, theirs.weights_N)
    assert proxy.requests["GET"] > len(wanted)
    assert proxy.faults.total() > 0, "else this test shows nothing"


def segment_positions(segments: stream.Segments, start: int, workers: int) -> Iterator[int]:
    for index in range(len(segments.names)):
        yield from range(*segments.bounds(index, start, workers))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("start", [0, 1, 37, 99, 100])
def test_segments_hold_each_position_once_and_start_with_the_first_worker(workers: int, start: int):
    segments = stream.Segments(end=100, size=20 - 20 % workers)
    assert list(segment_positions(segments, start, workers)) == list(range(start - start % workers, 100))
    firsts = [segments.bounds(i, start, workers) for i in range(len(segments.names))]
    assert all(first % workers == 0 for first, last in firsts if first < last)


@pytest.mark.parametrize("groups_per_task", [1, 4, 7])
def test_segments_are_the_same_for_each_number_of_workers_that_divides_a_step(tiny, groups_per_task: int):
    """The controller's process, which opens them, is not told how many workers there are."""
    data = {"tasks_per_execution": 3, "groups_per_task": groups_per_task}
    config = tiny(optim={"steps": 9, "global_batch": 64}, data=data)
    dataset = Dataset.open(config.data.path)
    spec = StreamSpec.of(config, resolve(config, dataset.facts()), dataset)
    wanted = stream.Segments.of(spec, 4, config.data)
    for workers in (1, 2, 4):
        segments = stream.Segments.of(spec, workers, config.data)
        assert segments == wanted
        for start in range(0, spec.total_steps * spec.groups_per_step, spec.groups_per_step):
            bounds = [segments.bounds(i, start, workers) for i in range(len(segments.names))]
            assert bounds == [wanted.bounds(i, start, 4) for i in range(len(wanted.names))]
            assert [p for first, end in bounds for p in range(first, end)] == list(range(start, segments.end))


def test_a_start_reads_the_record_once_and_makes_no_execution(tiny, tmp_path, monkeypatch):
    """However many there are: made is one, and where its workers ask for it."""
    config = tiny(optim={"steps": 900, "global_batch": 64}, data={"tasks_per_execution": 1, "groups_per_task": 4})
    dataset = Dataset.open(config.data.path)
    spec = StreamSpec.of(config, resolve(config, dataset.facts()), dataset)
    starts, made = iter([0, 451]), []
    monkeypatch.setattr(stream, "registered_step", lambda _: next(starts))
    monkeypatch.setattr(ray.data, "range", lambda number, **_: made.append(number))
    given = stream.datasets(spec, Storage(tmp_path), 2, config.data)
    assert len(given) == 900
    fresh = [make() for make in given.values()]
    assert [segment.first for segment in fresh] == [4 * i for i in range(900)]
    resumed = [make() for make in given.values()]
    assert [segment.first for segment in resumed[451:]] == [4 * i for i in range(451, 900)]
    assert {segment.num_units for segment in resumed[:451]} == {4}, "the spare ones alone"
    assert not made
