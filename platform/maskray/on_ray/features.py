"""Features over the cluster: actors that hold the encoder, and blocks in the order of rows.

Actors and not Ray Data: a portion is a few row numbers, and its block a small array. What is needed beside is order, an
encoder that is loaded once a process, a portion that is computed again elsewhere when its worker is lost, and errors in
the user's words.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import ray
import torch

from maskray.config.schema import ClusterConfig
from maskray.data import portions
from maskray.data.manifest import SplitName
from maskray.data.portions import Images, Portion
from maskray.data.shards import Dataset
from maskray.errors import ClusterError, MaskrayError
from maskray.evaluation import blocks
from maskray.evaluation.blocks import FeatureBlock as FeatureBlock
from maskray.evaluation.pictures import BATCH, Precision
from maskray.models.encoder import Encoder, load_encoder

log = logging.getLogger(__name__)

_PER_WORKER = 2  # one portion at work and one waiting
_AHEAD = 8  # blocks, for each worker, that may wait for a slow one before them

_SAY_EVERY_SECONDS = 30.0


def feature_blocks(
    dataset: Dataset,
    split: SplitName,
    encoder: Encoder | str | Path,
    cluster: ClusterConfig,
    max_rows: int | None = None,
) -> Generator[FeatureBlock]:
    """Features of a split's first `max_rows` rows, or of all: each row once, in order, on a cluster that is connected.

    The bits do not depend on the number of workers.

    Args:
        dataset: open.
        split: of it.
        encoder: an exported one, or the folder of one.
        cluster: how many workers, what each takes, and how often one portion's may be lost.
        max_rows: None takes all.

    Raises:
        DataError: a shard is missing or damaged.
        ClusterError: workers are lost again and again.
        CheckpointError: there is no encoder in the folder.
    """
    encoder = encoder if isinstance(encoder, Encoder) else load_encoder(encoder)
    return blocks_on_ray(portions.of_split(dataset, split, BATCH, max_rows), encoder, cluster)


def blocks_on_ray(
    images: Images, encoder: Encoder, cluster: ClusterConfig, batch: int = BATCH, precision: Precision = "fp32"
) -> Generator[FeatureBlock]:
    """A block for each portion of images, in their order. Raises as `feature_blocks` and `images.read` do."""
    threads = max(1, int(cluster.cpus_per_worker))
    compute = partial(blocks.compute, batch=batch, threads=threads, precision=precision)
    held = ray.put((copy.deepcopy(encoder).cpu(), partial(compute, read=images.read)))
    on_gpu = cluster.gpus_per_worker > 0
    actor = ray.remote(_Worker).options(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker,
        max_concurrency=_PER_WORKER if on_gpu else 1,  # one portion is decoded while the other is on the GPU
    )
    pool = _Pool(lambda: actor.remote(held, threads, on_gpu), cluster)
    try:
        yield from pool.run(images.portions())
    finally:
        pool.close()


class _Worker:
    """An actor: the encoder, loaded once."""

    def __init__(self, held: tuple[Encoder, Callable[..., FeatureBlock]], threads: int, on_gpu: bool) -> None:
        encoder, self._compute = held
        self._encoder, self._threads = encoder.to("cuda" if on_gpu else "cpu"), threads

    def ready(self) -> None:
        """Answers once the encoder is there."""

    def compute(self, portion: Portion) -> FeatureBlock:
        torch.set_num_threads(self._threads)  # here: each of the actor's threads has a number of its own
        return self._compute(self._encoder, portion=portion)


@dataclass
class _Job:
    number: int
    portion: Portion
    losses: int = 0
    """Workers that were lost while they had it."""


@dataclass
class _Pool:
    """Workers that come and go. A portion whose worker is lost goes to another one."""

    make: Any
    cluster: ClusterConfig
    starting: dict[Any, Any] = field(default_factory=dict)
    """Answer that is awaited: worker."""
    loads: dict[Any, int] = field(default_factory=dict)
    """Portions that each worker has."""
    running: dict[Any, tuple[Any, _Job]] = field(default_factory=dict)
    """Block that is awaited: who computes it, and of what."""
    again: deque[_Job] = field(default_factory=deque)
    failed_starts: int = 0

    def run(self, portions: Iterator[Portion]) -> Iterator[FeatureBlock]:
        """Blocks, in order."""
        for _ in range(self.cluster.workers):
            self._start()
        jobs = map(_Job, count(), portions)
        done: dict[int, FeatureBlock] = {}
        next_out, limit = 0, (_PER_WORKER + _AHEAD) * self.cluster.workers
        upcoming = next(jobs, None)
        while upcoming is not None or self.again or self.running or done:
            while (worker := self._free()) is not None:
                if self.again:
                    self._give(worker, self.again.popleft())
                elif upcoming is not None and upcoming.number < next_out + limit:
                    self._give(worker, upcoming)
                    upcoming = next(jobs, None)
                else:
                    break
            for job, block in self._wait():
                done[job.number] = block
            while next_out in done:
                yield done.pop(next_out)
                next_out += 1

    def close(self) -> None:
        """Let go of all workers."""
        for worker in (*self.starting.values(), *self.loads):
            ray.kill(worker)

    def _start(self) -> None:
        worker = self.make()
        self.starting[worker.ready.remote()] = worker

    def _free(self) -> Any:
        """The worker that has the least to do, if any has room."""
        worker = min(self.loads, key=lambda w: self.loads[w], default=None)
        return worker if worker is not None and self.loads[worker] < _PER_WORKER else None

    def _give(self, worker: Any, job: _Job) -> None:
        self.running[worker.compute.remote(job.portion)] = worker, job
        self.loads[worker] += 1

    def _wait(self) -> Iterator[tuple[_Job, FeatureBlock]]:
        """Until something has happened; the blocks that came of it."""
        happened, _ = ray.wait([*self.running, *self.starting], num_returns=1, timeout=_SAY_EVERY_SECONDS)
        if not happened and not self.running:
            log.warning("Waiting for the cluster to start one of %d workers", len(self.starting))
        for reference in happened:
            if reference in self.starting:
                self._has_started(reference)
                continue
            worker, job = self.running[reference]
            try:
                block = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            except ray.exceptions.RayError as error:
                self._lost(worker, error)
                continue
            del self.running[reference]
            if worker in self.loads:  # it may have been lost since
                self.loads[worker] -= 1
            yield job, block

    def _has_started(self, reference: Any) -> None:
        worker = self.starting.pop(reference)
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            self.failed_starts += 1
            if self.failed_starts > self.cluster.max_failures:
                raise ClusterError(
                    "workers cannot be started",
                    key="cluster.max_failures",
                    found=f"{self.failed_starts} failures, the last: {_short(error)}",
                    fix="look into the worker's log (ray logs); is there enough memory for the encoder?",
                ) from error
            self._start()
        else:
            self.loads[worker] = 0

    def _lost(self, worker: Any, error: Exception) -> None:
        """Give what the worker had to others. It had been at the first of it; the rest is not to blame."""
        log.warning("A worker was lost: another one takes its place (%s)", _short(error))
        had = [(reference, job) for reference, (who, job) in self.running.items() if who is worker]
        unfinished = [(reference, job) for reference, job in had if not _is_done(reference)]
        for reference, job in unfinished:
            del self.running[reference]
            self.again.append(job)
        self.loads.pop(worker)
        self._start()
        if not unfinished:
            return
        job = unfinished[0][1]
        job.losses += 1
        if job.losses > self.cluster.max_failures:
            raise ClusterError(
                f"the workers that have rows {job.portion.first} to {job.portion.end - 1} are lost each time",
                key="cluster.max_failures",
                found=f"{job.losses} losses, the last: {_short(error)}",
                fix="look into the worker's log (ray logs): too little memory for a batch, or an image that ends it",
            ) from error


def _is_done(reference: Any) -> bool:
    """Whether a block came before its worker was lost."""
    try:
        ray.get(reference, timeout=0)
    except ray.exceptions.RayError:
        return False
    return True


def _cause(error: ray.exceptions.RayTaskError) -> Exception:
    """The user's mistake, without the traceback of another machine; else the error as it came."""
    return error.cause if isinstance(error.cause, MaskrayError) else error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
