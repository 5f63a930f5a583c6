"""Ray Train's `fit` as everything that trains uses it: its settings, and what is survived."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from maskray.config.schema import ClusterConfig
from maskray.config.training import FOR_CUBLAS
from maskray.data import patient
from maskray.data.storage import Storage
from maskray.errors import TrainingError
from maskray.on_ray import background, failures, orphans, record, stream
from maskray.on_ray.board import Board, Seen

log = logging.getLogger(__name__)

_POLL_SECONDS, _READ_SECONDS, _DEAF_SECONDS = 0.5, 5.0, 60.0
LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""As Ray raises it where an actor was lost. One that its memory monitor has ended is none of the first kind."""


class Starting(Protocol):
    """One start of Ray Train."""

    def fit(self) -> Any:
        """Train to the end, or to what ends it."""
        ...

    def clear(self) -> None:
        """Take away what is left of a controller that was lost. One that Ray does not hear of may live: it is ended."""
        ...


Kind = TypeVar("Kind", bound=TorchTrainer)


class Trainer(TorchTrainer):
    """A `TorchTrainer` without the detached actor that is to remove the placement group of a dead controller.

    A process more at each start; where there is no dashboard it does nothing but complain, each second. `fitted`
    has such a group removed by `clear`, and Ray removes those of a driver that is gone.
    """

    _controller: Any = None

    def clear(self) -> None:
        """See `Starting`."""
        if self._controller is not None:
            ray.kill(self._controller)
        orphans.remove(self.train_run_context.run_id)

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        """As Ray has it, whose own keeps no hold of the controller, by which it could be ended.

        And gives it variables by a runtime environment: here `cluster.connected` has seen to them.
        """
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        make = ray.remote(num_cpus=0, label_selector=here)(TrainController)
        self._controller = make.remote(**arguments)
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())


def trainer(
    function: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    cluster: ClusterConfig,
    root: Storage,
    name: str,
    checkpoints: ray.train.CheckpointConfig,
    kind: Callable[..., Kind] = Trainer,
    **data: Any,
) -> Kind:
    """A trainer, of a kind.

    Args:
        function: what each worker runs.
        settings: that it gets.
        cluster: workers, and what each takes.
        root: where runs are kept.
        name: of the run, and of its folder there.
        checkpoints: which are kept.
        kind: its class, or what makes it.
        data: what else `TorchTrainer` takes: `datasets`, `dataset_config` and `validation_config`.
    """
    on_gpu = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if on_gpu else {})
    return kind(
        function,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers, use_gpu=on_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            **patient.for_train(root),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=checkpoints,
            callbacks=[failures.StopAtMistakes()],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": FOR_CUBLAS} if on_gpu else None,
        ),
        **data,
    )


def fitted(
    make: Callable[[], Starting],
    run: Storage,
    max_failures: int,
    is_judged: record.IsJudged = record.nothing_is_judged,
) -> Any:
    """What the first worker returned. Lost workers are Train's to restart; a lost controller is ours.

    Args:
        make: the trainer, anew for each start.
        run: folder of the run.
        max_failures: losses that are survived, of the workers or of the controller; a run that has got further since,
            by its checkpoints on record, survives as many again.
        is_judged: which checkpoints Train has judged, by its validation hook.

    Raises:
        MaskrayError: a mistake that only the workers could see (a damaged shard, a checkpoint that does not fit).
        StorageError: Train could not keep its record there, and too often.
        TrainingError: the workers, or the controller, were lost too often.
    """
    reached, left, said = -1, max_failures, ""
    failure: Exception = TrainingError("it was not started")
    while True:
        record.settle(run, is_judged)  # each time: a controller that died may have torn it
        if (step := stream.registered_step(run)) > reached:
            reached, left = step, max_failures - bool(said)
        if left < 0:
            raise failure
        if said:
            log.warning("%s; starting again from the latest checkpoint", said)
        started = make()
        try:
            # In the main thread Train would put a handler in place by which Ctrl-C ends with exit code 0.
            return background.call("maskray-fit", started.fit).result().return_value
        except LOST as error:
            said = f"Ray Train's controller {failures.how_lost(error)}"
            failure = TrainingError(f"{said}, and it was lost too often: {error}")
            left -= 1
            started.clear()
        except ray.train.TrainingFailedError as error:
            failure = failures.explained(error, max_failures)
            if lost := failures.lost_storage(error):
                failure = failures.of_record(lost, run)
                left, said = left - 1, f"Ray Train could not keep its record ({lost})"
            elif failures.known(error) is None:  # Train has counted to the end
                left, said = -1, f"The workers were lost more than {max_failures} times"
            else:
                raise failure from error


def board(run: str | None = None, kind: type = Board) -> Any:
    """A board, on the node of this process: it must outlive the nodes of the workers.

    Args:
        run: as `Board` takes it.
        kind: its class.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # What is told to one that is being started again waits for it.
    again = {"max_restarts": -1, "max_task_retries": -1}
    return ray.remote(num_cpus=0, scheduling_strategy=here, **again)(kind).remote(run)


@contextmanager
def followed(board: Any, show: Callable[[int, Mapping[str, float]], object]) -> Iterator[None]:
    """What workers post to a board, shown, and what they warn of, said, while the block runs.

    A board that was lost and started again is told of what it has forgotten.
    """
    stop = threading.Event()

    def follow() -> None:
        last, seen, totals, ending = 0, Seen(), None, False
        heard, is_deaf = time.monotonic(), False
        while not ending:
            ending = stop.wait(_POLL_SECONDS)  # and looks once more
            try:
                news = ray.get(board.read.remote(seen, is_last=ending), timeout=_READ_SECONDS)
            except ray.exceptions.RayError:  # a line that cannot be read must not end a run
                if not is_deaf and time.monotonic() - heard > _DEAF_SECONDS:
                    log.warning("The run's lines and warnings cannot be read; see the logs of Ray's workers")
                    is_deaf = True
                continue
            heard, is_deaf = time.monotonic(), False
            if seen.board and news.seen.board != seen.board:
                board.take_up.remote(totals)
            else:
                totals = news.totals
            seen = news.seen
            for warning in news.warnings:
                log.warning("%s", warning)
            if news.metrics and news.step != last:
                last = news.step
                show(news.step, news.metrics)
        board.read.remote(seen)  # whoever follows next need not hear it again

    thread = threading.Thread(target=follow, name="maskray-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
