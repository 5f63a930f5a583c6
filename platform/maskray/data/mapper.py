"""Small jobs, done by threads here or, in `on_ray/ingest.py`, by Ray tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int, str], None]
"""Called with (done, total, phase): shards where the phase is `verify`, else images. The first call of a phase says
what was done before."""


def silent(done: int, total: int, phase: str) -> None:
    """A `Progress` that nobody wants to hear of."""


class Mapper(Protocol):
    """Calls a function on each item, somewhere, and gives the results in the order of the items."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterable[R]:
        """Function and items must be picklable. Items are taken as they are needed."""
        ...


def thread_mapper(threads: int) -> Mapper:
    """Jobs in threads of this process, with a bounded look-ahead."""

    def run(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        before = torch.get_num_threads()
        try:
            # Each job has a core: threads of torch's own would fight over them.
            with ThreadPoolExecutor(threads, "maskray-ingest", torch.set_num_threads, (1,)) as pool:
                yield from _bounded(pool, function, items, 2 * threads)
        finally:
            torch.set_num_threads(before)

    return run


def read_ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Results in order, of calls that wait more than they compute. One thread: each when it is asked for."""
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, "maskray-read") as pool:
        yield from _bounded(pool, function, items, 2 * threads)


def _bounded(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], look_ahead: int) -> Iterator[R]:
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > look_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
