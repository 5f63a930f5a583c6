"""Ray Train whose workers live in a placement group that is held already: the one that Tune holds for a trial.

Left to itself Train makes a group of its own, below the trial's feet. Ray removes such a group when its maker is gone
and the whole job too: a trial that is stopped or killed leaves it behind, and the next one waits for ever. What Train
has against that, a detached actor for each run, asks the dashboard, and does nothing where there is none or where two
clusters run on a machine. Tune's group holds all of what a trial needs, or nothing, before the trial starts; it goes
when the trial's process goes, however that was, and all that runs in it goes with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.util.placement_group import get_current_placement_group

from maskray.data.storage import Storage
from maskray.errors import TrainingError
from maskray.on_ray import background, fit


class _Lent(DefaultPlacementGroupHandle):
    """The group of the trial's process, which is that of all that it starts, too."""

    def shutdown(self) -> None:
        """Nothing: it is not ours, and workers that are lost are started again in it."""


class _Workers(WorkerGroup):
    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> _Lent:  # noqa: ARG002
        return _Lent(get_current_placement_group())


class _Controller(TrainController):
    worker_group_cls = _Workers


class _Settled(FixedScalingPolicy):
    """Asks no autoscaler for what is held: of a trial that was stopped it would hold the nodes for minutes more."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing to register."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing to ask for."""

    def _cancel_resource_request(self) -> None:
        """Nothing was asked for."""


class Trainer(TorchTrainer):
    """A `TorchTrainer` for the process of a trial, on whose placement group it draws; it can be ended.

    The bundles of the group, in order, are the workers'.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lock, self._ended = threading.Lock(), False
        self._controller: Any = None

    def end(self) -> None:
        """Kill the controller, whose workers die with it, or never start it; from any thread. `fit` raises."""
        with self._lock:
            self._ended = True
            if self._controller is not None:
                ray.kill(self._controller)

    def clear(self) -> None:
        """See `fit.Starting`. The group is not ours."""
        with self._lock:
            if self._controller is not None:
                ray.kill(self._controller)

    def _create_default_callbacks(self) -> list[Any]:
        idle = (PlacementGroupCleanerCallback, *([] if self.datasets else [DatasetsCallback]))
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        group = get_current_placement_group()
        assert group is not None, "this is not a trial's process"
        assert group.bundle_count == self.scaling_config.num_workers, "it does not hold a bundle for each worker"
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        policy = _Settled(arguments["scaling_policy"].scaling_config)
        with self._lock:
            if self._ended:
                raise _from_outside()
            make = ray.remote(num_cpus=0, label_selector=here)(_Controller)
            self._controller = make.remote(**arguments | {"scaling_policy": policy})
        try:
            ray.get(self._controller.run.remote())
            return ray.get(self._controller.get_result.remote())
        except fit.LOST as error:
            if self._ended:  # nothing is to be started again
                raise _from_outside() from error
            raise


def _from_outside() -> TrainingError:
    return TrainingError("The trial was ended from outside")


@contextmanager
def fitting(make: Callable[[], Trainer], run: Storage, max_failures: int) -> Iterator[Future[Any]]:
    """`fit.fitted`, in the background while the block runs; when the block is left, all of it is ended.

    Args:
        make: as there.
        run: as there.
        max_failures: as there.
    """
    made: list[Trainer] = []
    lock, ended = threading.Lock(), threading.Event()

    def make_next() -> Trainer:
        with lock:
            if ended.is_set():
                raise _from_outside()
            made.append(make())
            return made[-1]

    future = background.call("maskray-fitting", lambda: fit.fitted(make_next, run, max_failures))
    try:
        yield future
    finally:
        with lock:
            ended.set()
        for trainer in made:
            trainer.end()
