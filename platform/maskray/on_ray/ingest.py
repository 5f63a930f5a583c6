"""Ingest on a cluster: the jobs of `data/ingest.py` as Ray tasks.

Tasks and not Ray Data: a job is a list of keys, and its result a small table. All that Ray Data would add is the
transport of blocks, and it would wrap the user's mistake in errors of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from maskray.data.mapper import Mapper
from maskray.errors import MaskrayError

T = TypeVar("T")
R = TypeVar("R")

_TASKS_PER_CPU = 2  # one at work and one waiting: results are small, jobs are lists of keys


def ray_mapper(max_in_flight: int | None = None) -> Mapper:
    """Jobs as tasks of one CPU each, results in order, a bounded number in flight.

    Args:
        max_in_flight: tasks given to Ray at a time; None takes two for each CPU of the cluster.
    """

    def run(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        task = ray.remote(num_cpus=1)(function)
        limit = max_in_flight or max(2, _TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 1)))
        pending, running = deque[Any](), list[Any]()
        try:
            for item in items:
                if len(running) >= limit:
                    # Any of them: a slow job holds back results, which are small, and not the cluster.
                    _, running = ray.wait(running, num_returns=1)
                pending.append(task.remote(item))
                running.append(pending[-1])
                while pending[0] not in running:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        finally:
            for reference in pending:
                ray.cancel(reference)

    return run


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MaskrayError):
            raise error.cause from None  # the user's mistake, without the traceback of another machine
        raise
