"""The stream through Ray Data: the plan's row groups, decoded by tasks all over the cluster, in the plan's order.

How the order is kept (each setting was needed; Ray 2.60):

* One row of a block is one unit, a whole row group with its position, and `target_max_block_size = 1` closes a block
  after every row. Blocks are then all alike, whatever their bytes and however many units a task makes, and the
  splitter, which gives each block to the worker with the fewest rows, deals them in turn.
* `preserve_order` (in Train's DataConfig) keeps blocks in the order of the tasks, and of reading.
* The splitter deals from where a stream starts, and the plan says that position p belongs to worker p mod W: so a
  stream starts at a multiple of W, and a worker drops what it is given before its first. W is what Train chose.
* The splitter holds back and cuts the last blocks of an execution: each ends with spare units that nobody reads.

The plan is cut into segments, each one execution, many passes long where the data is small: Ray keeps a record for
every task of an execution. Train is given descriptions of them, however many; what Ray Data makes of one (a list of all
its tasks) is made when the workers ask for it. They ask for the next while the last row groups of the one before are
still read, because an execution takes seconds to start.

Torch is imported by the functions that need it, and not above: a start through Train makes two processes, one after the
other, that only pass this module's functions on, and importing torch takes longer than all else that they do.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data
import ray.train

from maskray.config.schema import DataConfig
from maskray.data.retry import RETRIES
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.on_ray import background
from maskray.training.folders import step_of

if TYPE_CHECKING:
    from maskray.data.stream import Unit

SNAPSHOT = "checkpoint_manager_snapshot.json"
_PREPARE_SECONDS = 20.0  # before the end of an execution; a process of Ray's is up in 3 s here, and may take longer

Row = dict[str, Any]


@dataclass(frozen=True)
class Segments:
    """The run's positions cut into executions of Ray Data: not moved by a resume.

    Nor by another number of workers, where that divides the row groups of a step.
    """

    end: int
    """One past the run's last position."""
    size: int
    """Positions in a segment: a multiple of the workers, and of a step's."""

    @classmethod
    def of(cls, spec: StreamSpec, workers: int, data: DataConfig) -> Segments:
        """The segments of a run."""
        turn = math.lcm(workers, spec.groups_per_step)
        size = max(turn, data.tasks_per_execution * data.groups_per_task)
        return cls(spec.total_steps * spec.groups_per_step, size - size % turn)

    @property
    def names(self) -> list[str]:
        """Names under which Train knows the datasets."""
        return [f"train-{i}" for i in range(-(-self.end // self.size))]

    def bounds(self, index: int, start: int, workers: int) -> tuple[int, int]:
        """First and one past the last position that a segment delivers, for a run that starts at position `start`."""
        first = max(index * self.size, start - start % workers)
        return first, min((index + 1) * self.size, self.end)


@dataclass(frozen=True)
class Segment:
    """One execution of Ray Data, not made yet: Train keeps it as a dataset that it hands to `DataConfig.configure`."""

    spec: StreamSpec
    data: DataConfig
    first: int
    """The position that it starts at."""
    num_units: int

    def open(self) -> ray.data.Dataset:
        """Make the execution's list of tasks; none of them runs yet."""
        context = ray.data.DataContext.get_current()  # captured by what is made here
        context.target_max_block_size = 1
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = self.data.stall_seconds
        offsets = ray.data.range(self.num_units, override_num_blocks=-(-self.num_units // self.data.groups_per_task))
        if self.data.actors is None:
            return offsets.map_batches(partial(_load, self.spec, self.first), batch_size=None)
        pool = ray.data.ActorPoolStrategy(size=self.data.actors)
        arguments = (self.spec, self.first)
        return offsets.map_batches(_Loader, fn_constructor_args=arguments, compute=pool, batch_size=None)


def datasets(spec: StreamSpec, run: Storage, workers: int, data: DataConfig) -> dict[str, Callable[[], Segment]]:
    """What Train is given: it calls each, in order, at every start of the workers, in the controller's process.

    The number of workers is not told there: where it may change (`cluster.min_workers`) `workers` is the largest, and
    each that may come divides the row groups of a step, so that segments and their starts are the same for all.
    """
    segments, start = Segments.of(spec, workers, data), _Start(run)

    def segment(index: int) -> Segment:
        step = start.read() if index == 0 else start.step
        first, end = segments.bounds(index, step * spec.groups_per_step, workers)
        return Segment(spec, data, first, max(0, end - first) + 2 * workers)

    return {name: partial(segment, i) for i, name in enumerate(segments.names)}


class _Start:
    """The step that Train resumes from, read once for all segments of a start."""

    def __init__(self, run: Storage) -> None:
        self._run, self.step = run, 0

    def read(self) -> int:
        self.step = registered_step(self._run)
        return self.step


class DealingConfig(ray.train.DataConfig):
    """How Train deals a run's segments: each is opened when its workers ask for it, in the process that deals it."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__(execution_options=execution_options(data))

    def configure(self, datasets: Mapping[str, Segment], *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """Each worker's share of each."""
        opened = {name: segment.open() for name, segment in datasets.items()}
        shares: list[dict[str, Any]] = super().configure(opened, *args, **kwargs)
        return shares


def execution_options(data: DataConfig) -> ray.data.ExecutionOptions:
    """How Ray Data runs a segment: in the plan's order, within its share of the object store."""
    limit = data.object_store_bytes
    limits = None if limit is None else ray.data.ExecutionResources.for_limits(object_store_memory=limit)
    return ray.data.ExecutionOptions(preserve_order=True, resource_limits=limits)


class Share:
    """A worker's part of the stream, from where the run goes on.

    The first splitter's process starts here: it takes seconds, as does what a worker still has to do before its first
    step. Its tasks do not, which would take CPUs from that: it was seen to cost what it saves.

    Args:
        spec: the stream.
        rank: of this worker.
        workers: in all; each must read.
        data: how row groups reach the workers.
        start_step: of the checkpoint that Train has on record.
        shard_of: gives this worker's share of a segment.
    """

    def __init__(
        self,
        spec: StreamSpec,
        rank: int,
        workers: int,
        data: DataConfig,
        start_step: int,
        shard_of: Callable[[str], ray.data.DataIterator] = ray.train.get_dataset_shard,
    ) -> None:
        self.start_step = start_step
        self._rank, self._workers, self._start = rank, workers, start_step * spec.groups_per_step
        self._in_flight = data.groups_per_task * int(ray.cluster_resources()["CPU"])
        segments = Segments.of(spec, workers, data)
        bounds = [segments.bounds(i, self._start, workers) for i in range(len(segments.names))]
        named = [(name, each) for name, each in zip(segments.names, bounds, strict=True) if each[0] < each[1]]
        self._bounds = [each for _, each in named]
        self._executions = [_Execution(partial(shard_of, name), data.prefetch_groups) for name, _ in named]
        if self._executions:
            self._executions[0].prepare()

    @classmethod
    def of_worker(cls, spec: StreamSpec, data: DataConfig) -> Share:
        """That of the worker of Ray Train which asks."""
        context, found = ray.train.get_context(), ray.train.get_checkpoint()
        start_step = 0 if found is None else step_of(Path(found.path).name)
        return cls(spec, context.get_world_rank(), context.get_world_size(), data, start_step)

    def units(self) -> Generator[Unit]:
        """What this worker trains on, in order."""
        rank, workers, executions = self._rank, self._workers, self._executions
        for index, ((first, end), execution) in enumerate(zip(self._bounds, executions, strict=True)):
            following = executions[index + 1] if index + 1 < len(executions) else None
            positions = range(first + (rank - first) % workers, end, workers)
            with closing(execution.rows()) as rows:
                since = time.monotonic()
                # Positions first: so the spare units behind the last are not asked for.
                for taken, (position, row) in enumerate(zip(positions, rows, strict=False), 1):
                    if following is not None:
                        left = len(positions) - taken
                        if left * (time.monotonic() - since) / taken < _PREPARE_SECONDS:
                            following.prepare()
                        # Not before the last tasks run: those of the next execution would take their CPUs.
                        if left * workers <= self._in_flight:
                            following.start()
                    if position >= self._start:
                        yield _to_unit(row)
            # This one began when all workers had asked for it, each of them while it read the one before: so every
            # worker, however far behind, is past the one before that.
            if rank == 0 and index > 1:
                executions[index - 2].release()


class _Execution:
    """One execution of Ray Data as a worker sees it, opened in the background in two steps.

    Args:
        shard: gives this worker's share.
        prefetch: rows that are held ready.
    """

    def __init__(self, shard: Callable[[], ray.data.DataIterator], prefetch: int) -> None:
        self._open, self._prefetch = shard, prefetch
        self._shard: Future[ray.data.DataIterator] | None = None
        self._first: Future[tuple[Row | None, Generator[Row]]] | None = None

    def prepare(self) -> None:
        """Start the splitter's process, which takes seconds; no task runs yet."""
        if self._shard is None:
            self._shard = background.call("maskray-splitter", self._open)

    def start(self) -> None:
        """Start the execution, and fetch its first row. It begins when all workers have asked for it."""
        if self._first is None:
            self.prepare()
            self._first = background.call("maskray-first-row", self._fetch_first)

    def rows(self) -> Generator[Row]:
        """One row is one block is one unit: `batch_size=None` leaves it whole, and nothing is copied."""
        self.start()
        assert self._first is not None
        row, rest = self._first.result()
        with closing(rest):
            while row is not None:
                yield row
                row = next(rest, None)

    def release(self) -> None:
        """End the splitter's process, which Train would keep until the workers end: one for each segment."""
        assert self._shard is not None
        ray.kill(self._shard.result()._coord_actor)  # no public way

    def _fetch_first(self) -> tuple[Row | None, Generator[Row]]:
        assert self._shard is not None
        rows = iter(self._shard.result().iter_batches(batch_size=None, prefetch_batches=self._prefetch))
        return next(rows, None), rows


def registered_step(run: Storage) -> int:
    """Step of the checkpoint that Train will resume from, without opening it; 0 where there is none.

    Train's own record is asked, not the folders: one may be whole and not registered yet.
    """
    name = registered_checkpoint(run)
    return step_of(name) if name else 0


def registered_checkpoint(run: Storage) -> str | None:
    """Name of the folder of the checkpoint that Train will resume from."""
    try:
        latest = json.loads(run.read_bytes(SNAPSHOT))["latest_checkpoint_result"]
    except FileNotFoundError:
        return None
    return str(latest["checkpoint_dir_name"]) if latest else None


def prepare_tasks(number: int) -> list[ray.ObjectRef[None]]:
    """Have so many of Ray's processes import what tasks need, which takes them seconds; one need not wait for it.

    For an embedded cluster that has just started: there is a core to spare while Train's controller starts, and none
    once its workers do. Ray keeps such processes for the tasks that come.

    Args:
        number: tasks that will run at once: so many processes Ray Data would start itself.
    """
    imports = ray.remote(num_cpus=0, max_retries=0)(_import)
    return [imports.remote() for _ in range(number)]


def _import() -> None:
    from maskray.data import stream  # noqa: F401


class _Loader:
    """What an actor of the pool runs."""

    def __init__(self, spec: StreamSpec, first: int) -> None:
        self._load = partial(_load, spec, first)

    def __call__(self, batch: dict[str, Any]) -> Iterator[Row]:
        return self._load(batch)


def _load(spec: StreamSpec, first: int, batch: dict[str, Any]) -> Iterator[Row]:
    """A task: several row groups, each given on as soon as it is ready."""
    from maskray.data.stream import load_unit

    dataset = _opened(spec)
    for offset in batch["id"]:
        before = RETRIES.count
        unit = load_unit(spec, dataset, first + int(offset))
        yield _to_row(unit, RETRIES.count - before)


@lru_cache(maxsize=1)
def _opened(spec: StreamSpec) -> Dataset:
    """The dataset, opened once in each of Ray's processes: a manifest of many shards is too long for every task."""
    return spec.open_dataset()


def _to_row(unit: Unit, retries: int) -> Row:
    target = {} if unit.target_NHW is None else {"target": unit.target_NHW[None]}
    return target | {
        "position": np.array([unit.position]),
        "images": unit.images_NCHW[None],
        "visible": unit.visible_NHW[None],
        "weights": unit.weights_N[None],
        "keys": np.array([json.dumps(unit.keys)]),
        "warnings": np.array([json.dumps(unit.warnings)]),
        "retries": np.array([retries]),
    }


def _to_unit(row: Row) -> Unit:
    from maskray.data.stream import Unit

    RETRIES.add(int(row["retries"][0]))
    return Unit(
        position=int(row["position"][0]),
        images_NCHW=row["images"][0],
        visible_NHW=row["visible"][0],
        weights_N=row["weights"][0],
        keys=json.loads(str(row["keys"][0])),
        warnings=tuple(json.loads(str(row["warnings"][0]))),
        target_NHW=row["target"][0] if "target" in row else None,
    )
