"""Pretraining on Ray Train: the launcher whose workers may be killed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from maskray.data.local import is_walked_locally
from maskray.data.spec import StreamSpec
from maskray.errors import CheckpointError, NonFiniteError, TrainingError
from maskray.evaluation.judgement import Verdict
from maskray.launch import Prepared, unstored_metrics
from maskray.on_ray import background, cluster, evaluate, failures, probe, record, stream, worker
from maskray.on_ray.board import Board
from maskray.on_ray.probe import Hook, Judge, Told
from maskray.tracking.console import ProgressLine
from maskray.training import checkpoint
from maskray.training.folders import SCORE

log = logging.getLogger(__name__)

_POLL_SECONDS, _READ_SECONDS = 0.5, 5.0


class RayLauncher:
    """Trains on the connected cluster.

    Args:
        probe: judges checkpoints on the way.
    """

    name = "ray"

    def __init__(self, probe: Judge = probe.judge) -> None:
        self._probe = probe

    def preflight(self, prepared: Prepared) -> None:
        """Refuse what the cluster cannot hold, and wait for what it can."""
        beside = probe.bundles(prepared.config)
        on_ray = streams_on_ray(prepared)
        cluster.preflight(prepared.config, prepared.root, prepared.store.uri, beside, streams_on_ray=on_ray)

    def train(self, prepared: Prepared, run_id: str) -> None:
        """Train to the end. Lost workers are Train's to restart; a lost controller is ours.

        Raises:
            MaskrayError: a mistake that only the workers could see (a damaged shard, a checkpoint that does not fit).
            TrainingError: a step was not finite, or the workers were lost too often.
        """
        config = prepared.config
        board = ray.remote(num_cpus=0)(Board).remote()
        with probe.set_aside(config) as place, _shown(board, prepared.plan.total_steps):
            told = Told(prepared.store.uri, run_id, board)
            hook = Hook(config.model_dump(mode="json"), prepared.run, told, place, self._probe)
            for left in reversed(range(config.cluster.max_failures + 1)):
                record.settle(prepared.run)  # each time: a controller that died may have torn it
                try:
                    # In the main thread Train would put a handler in place by which Ctrl-C ends with exit code 0.
                    fitting = background.call("maskray-fit", _trainer(prepared, told, hook).fit)
                    outcome = fitting.result().return_value
                    break
                except ray.exceptions.ActorDiedError as error:
                    if left == 0:
                        raise TrainingError(f"Ray Train's controller died too often: {error}") from error
                    log.warning("Ray Train's controller died; starting again from the latest checkpoint")
                except ray.train.TrainingFailedError as error:
                    raise failures.explained(error, config.cluster.max_failures) from error
        if "not_finite" in outcome:
            raise NonFiniteError(outcome["not_finite"])
        if not outcome["stored"]:
            raise unstored_metrics()

    @contextmanager
    def newest_checkpoint(self, prepared: Prepared) -> Iterator[Path]:
        """The checkpoint that Train has on record."""
        with checkpoint.on_disk(prepared.run.child(_registered(prepared))) as folder:
            yield folder

    def judge(self, prepared: Prepared) -> Verdict | None:
        """As a task with the resources of a worker. The run is done: it does not fail for want of a judgement."""
        try:
            return evaluate.judge(prepared.config, prepared.run.child(_registered(prepared)))
        except ray.exceptions.RayError as error:
            log.warning("No probe: its task failed: %s", error)
            return None


def streams_on_ray(prepared: Prepared) -> bool:
    """Whether Ray Data decodes, and not the workers."""
    return not is_walked_locally(prepared.config.data, prepared.dataset)


def _trainer(prepared: Prepared, told: Told, hook: Hook) -> TorchTrainer:
    config, on_ray = prepared.config, streams_on_ray(prepared)
    workers = config.cluster.workers
    spec = StreamSpec.of(config, prepared.plan, prepared.dataset)
    on_gpu = config.cluster.gpus_per_worker > 0
    resources = {"CPU": config.cluster.cpus_per_worker} | ({"GPU": config.cluster.gpus_per_worker} if on_gpu else {})
    return TorchTrainer(
        worker.run,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "run": prepared.run.uri,
            "run_id": told.run_id,
            "tracking_uri": told.tracking_uri,
            "on_ray": on_ray,
            "board": told.board,
        },
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name=prepared.plan.run_name,
            storage_path=prepared.root.uri,
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=config.storage.keep_checkpoints,
                checkpoint_score_attribute=SCORE,
                checkpoint_score_order="max",
            ),
            callbacks=[failures.StopAtMistakes()],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            # cuBLAS reads it before its first product; without it, deterministic kernels are refused.
            worker_runtime_env={"env_vars": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}} if on_gpu else None,
        ),
        dataset_config=ray.train.DataConfig(execution_options=stream.execution_options(config.data)),
        # A killed hook is started again; what it waits for may be killed as it likes.
        validation_config=ray.train.ValidationConfig(hook, ray_remote_kwargs={"num_cpus": 0, "max_retries": -1}),
        datasets=stream.datasets(spec, prepared.run, workers, config.data) if on_ray else None,
    )


# ------------------------------------------------------------------------------------------------------------ progress


@contextmanager
def _shown(board: Any, total_steps: int) -> Iterator[None]:
    """The progress line and what workers warn of, while the block runs."""
    stop = threading.Event()

    def follow() -> None:
        last, seen, ending = 0, 0, False
        while not ending:
            ending = stop.wait(_POLL_SECONDS)  # and looks once more
            try:
                step, metrics, warnings = ray.get(board.read.remote(seen), timeout=_READ_SECONDS)
            except ray.exceptions.RayError:  # a line that cannot be read must not end a run
                continue
            for warning in warnings:
                log.warning("%s", warning)
            seen += len(warnings)
            if step != last:
                last = step
                line.update(step, metrics)

    with closing(ProgressLine(total_steps)) as line:
        thread = threading.Thread(target=follow, name="maskray-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


# --------------------------------------------------------------------------------------------------------- checkpoints


def _registered(prepared: Prepared) -> str:
    name = stream.registered_checkpoint(prepared.run)
    if name is None:
        raise CheckpointError("the run has no checkpoint", found=prepared.run.uri)
    return name
