"""The walk of the plan inside a worker, for data whose decoded images fit: no Ray Data between shard and batch."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self

import torch

from maskray.config.schema import DataConfig
from maskray.data import device as on_device
from maskray.data.cache import WholeImages, cache_folder, open_cache, unheard
from maskray.data.shards import Dataset, decoded_bytes
from maskray.data.spec import StreamSpec
from maskray.data.stream import Unit, augment, load_unit
from maskray.errors import DataError, StorageError, UnreachableError

logger = logging.getLogger(__name__)


def is_walked_locally(data: DataConfig, dataset: Dataset) -> bool:
    """Whether workers decode, and not Ray Data: as the config says, or, under `auto`, where the images fit."""
    if data.stream == "auto":
        return data.cache in ("host", "device") or decoded_bytes(dataset, data.channels) <= data.local_bytes
    return data.stream == "local"


def chosen_cache(data: DataConfig, dataset: Dataset) -> Literal["none", "host", "device"]:
    """What a local walk keeps decoded: as the config says, or, under `auto`, on the host where it fits."""
    if data.cache == "auto":
        return "host" if decoded_bytes(dataset, data.channels) <= data.local_bytes else "none"
    return data.cache


@contextmanager
def open_units(
    spec: StreamSpec,
    data: DataConfig,
    device: torch.device,
    *,
    rank: int,
    world_size: int,
    start_step: int,
    beat: Callable[[], None] = unheard,
) -> Iterator[Iterator[Unit]]:
    """A worker's row groups from a step on, from the cache that the config asks for.

    Args:
        spec: the stream.
        data: how it reaches the worker.
        device: the worker's.
        rank: of the worker.
        world_size: number of workers.
        start_step: where to begin.
        beat: see `open_cache`.

    Raises:
        ConfigError: the decoded images do not fit on the device.
        StorageError: the cache cannot be written (under `cache: auto` a warning, and no cache).
        DataError: the dataset is missing or damaged (under `unreadable: skip` and without `cache: device` a warning,
            and no cache), or another one than the spec was made for.
    """
    dataset = spec.open_dataset()
    cache = chosen_cache(data, dataset)
    if cache == "device":
        on_device.check(dataset, data, device)
        whole = open_cache(dataset, spec.channels, cache_folder(data.cache_folder), beat).to(device)
        yield on_device.device_units(spec, whole, spec.positions(rank, world_size, start_step))
        return
    with LocalStream(
        spec,
        dataset,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        threads=data.decode_threads,
        prefetch_groups=data.prefetch_groups,
        images=_on_host(spec, data, dataset, beat) if cache == "host" else None,
    ) as units:
        yield units


def _on_host(spec: StreamSpec, data: DataConfig, dataset: Dataset, beat: Callable[[], None]) -> WholeImages | None:
    try:
        return open_cache(dataset, spec.channels, cache_folder(data.cache_folder), beat)
    except (StorageError, DataError) as error:
        # What cannot be read is never kept: it may be there again in the next pass.
        gap = DataError | UnreachableError
        may_do_without = spec.unreadable == "skip" if isinstance(error, gap) else data.cache == "auto"
        if not may_do_without:
            raise
        logger.warning("Images are decoded again in each pass: %s", error)
        return None


class LocalStream:
    """A worker's share of the plan, in order, made in threads of this process with a bounded look-ahead.

    Close it, or use it as a context manager: then no thread is left.

    Args:
        spec: the stream.
        dataset: `spec.open_dataset()` if None.
        rank: of this worker.
        world_size: number of workers.
        start_step: where to begin.
        threads: that decode, crop and mask.
        prefetch_groups: row groups being made or waiting.
        images: the decoded whole images of `dataset`; None decodes them each time. The bits are the same.
    """

    def __init__(
        self,
        spec: StreamSpec,
        dataset: Dataset | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        threads: int = 2,
        prefetch_groups: int = 8,
        images: WholeImages | None = None,
    ) -> None:
        self._spec, self._dataset, self._images = spec, dataset or spec.open_dataset(), images
        self._positions = spec.positions(rank, world_size, start_step)
        self._look_ahead = max(1, prefetch_groups)
        self._pending: deque[Future[Unit]] = deque()
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(threads, thread_name_prefix="maskray-decode")

    def __iter__(self) -> Iterator[Unit]:
        return self

    def __next__(self) -> Unit:
        if self._pool is None:
            raise StopIteration
        while len(self._pending) < self._look_ahead and (position := next(self._positions, None)) is not None:
            self._pending.append(self._pool.submit(self._load, position))
        if not self._pending:
            self.close()
            raise StopIteration
        try:
            return self._pending.popleft().result()
        except BaseException:
            self.close()
            raise

    def _load(self, position: int) -> Unit:
        if self._images is None:
            return load_unit(self._spec, self._dataset, position)
        pass_, group = self._spec.plan.locate(position)
        images = self._images
        return augment(self._spec, position, pass_, images.rows(group), images.keys_of(group), images.images_of(group))

    def close(self) -> None:
        """Drop what is waiting and end the threads."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            self._pending.clear()
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
