"""The stream through Ray Data: the plan's row groups, decoded by tasks all over the cluster, in the plan's order.

How the order is kept (each setting was needed; Ray 2.60):

* One row of a block is one unit, a whole row group with its position, and `target_max_block_size = 1` closes a block
  after every row. Blocks are then all alike, whatever their bytes and however many units a task makes, and the
  splitter, which gives each block to the worker with the fewest rows, deals them in turn.
* `preserve_order` (in Train's DataConfig) keeps blocks in the order of the tasks, and of reading.
* The splitter deals from where a stream starts, and the plan says that position p belongs to worker p mod W: so a
  stream starts at a multiple of W, and a worker drops what it is given before its first.
* The splitter holds back and cuts the last blocks of an execution: each ends with spare units that nobody reads.

The plan is cut into segments, each one execution: Ray keeps a record for every task of an execution.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray.data
import ray.train

from maskray.config.schema import DataConfig
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.data.stream import StreamSpec, Unit, load_unit
from maskray.training.checkpoint import step_of

SNAPSHOT = "checkpoint_manager_snapshot.json"
_SEGMENT_TASKS = 8192


@dataclass(frozen=True)
class Segments:
    """The run's positions cut into executions of Ray Data. Fixed for a number of workers: not moved by a resume."""

    end: int
    """One past the run's last position."""
    size: int
    """Positions in a segment: a multiple of the workers."""

    @classmethod
    def of(cls, spec: StreamSpec, workers: int, groups_per_task: int) -> Segments:
        """The segments of a run."""
        size = _SEGMENT_TASKS * groups_per_task
        return cls(spec.total_steps * spec.groups_per_step, size - size % workers)

    @property
    def names(self) -> list[str]:
        """Names under which Train knows the datasets."""
        return [f"train-{i}" for i in range(-(-self.end // self.size))]

    def bounds(self, index: int, start: int, workers: int) -> tuple[int, int]:
        """First and one past the last position that a segment delivers, for a run that starts at position `start`."""
        first = max(index * self.size, start - start % workers)
        return first, min((index + 1) * self.size, self.end)


def datasets(
    spec: StreamSpec, run: Storage, workers: int, data: DataConfig
) -> dict[str, Callable[[], ray.data.Dataset]]:
    """What Train is given: it calls each at every start of the workers, in the controller's process."""
    segments = Segments.of(spec, workers, data.groups_per_task)
    return {name: partial(_open_segment, spec, run, workers, data, i) for i, name in enumerate(segments.names)}


def units(spec: StreamSpec, rank: int, workers: int, groups_per_task: int, prefetch: int, step: int) -> Iterator[Unit]:
    """A worker's units from `step` on."""
    segments = Segments.of(spec, workers, groups_per_task)
    start = step * spec.groups_per_step
    for index, name in enumerate(segments.names):
        first, last = segments.bounds(index, start, workers)
        if first >= last:
            continue
        # One row is one block is one unit; `batch_size=None` leaves it whole, and nothing is copied.
        rows = ray.train.get_dataset_shard(name).iter_batches(batch_size=None, prefetch_batches=prefetch)
        for position, row in zip(range(first + (rank - first) % workers, last, workers), rows, strict=False):
            if position >= start:
                yield _to_unit(row)


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


def _open_segment(spec: StreamSpec, run: Storage, workers: int, data: DataConfig, index: int) -> ray.data.Dataset:
    # The driver's DataContext does not arrive here.
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = data.stall_seconds
    segments = Segments.of(spec, workers, data.groups_per_task)
    start = registered_step(run) * spec.groups_per_step
    first, last = segments.bounds(index, start, workers)
    num_units = max(0, last - first) + 2 * workers
    return ray.data.range(num_units, override_num_blocks=-(-num_units // data.groups_per_task)).map_batches(
        partial(_load, spec, spec.open_dataset(), first), batch_size=None
    )


def _load(spec: StreamSpec, dataset: Dataset, first: int, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A task: several row groups, each given on as soon as it is ready."""
    for offset in batch["id"]:
        yield _to_row(load_unit(spec, dataset, first + int(offset)))


def _to_row(unit: Unit) -> dict[str, Any]:
    return {
        "position": np.array([unit.position]),
        "images": unit.images_NCHW[None],
        "visible": unit.visible_NHW[None],
        "weights": unit.weights_N[None],
        "keys": np.array([json.dumps(unit.keys)]),
    }


def _to_unit(row: dict[str, Any]) -> Unit:
    return Unit(
        position=int(row["position"][0]),
        images_NCHW=row["images"][0],
        visible_NHW=row["visible"][0],
        weights_N=row["weights"][0],
        keys=json.loads(str(row["keys"][0])),
    )
