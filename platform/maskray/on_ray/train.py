"""Pretraining on Ray Train: the launcher whose workers may be killed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from maskray.config.load import written
from maskray.config.resolve import worker_counts
from maskray.credentials import Hidden
from maskray.data.local import is_walked_locally
from maskray.data.spec import StreamSpec
from maskray.errors import BadStepError, CheckpointError
from maskray.evaluation.judgement import Verdict
from maskray.launch import unstored_metrics
from maskray.on_ray import cluster, elastic, fit, probe, room, stream, upgrade, worker
from maskray.on_ray.fit import followed
from maskray.on_ray.probe import Hook, Judge, Told
from maskray.preparing import Prepared
from maskray.tracking.console import ProgressLine
from maskray.training import checkpoint
from maskray.training.folders import SCORE

log = logging.getLogger(__name__)


class RayLauncher:
    """Trains on the connected cluster.

    Args:
        probe: judges checkpoints on the way.
    """

    name = "ray"

    def __init__(self, probe: Judge = probe.judge) -> None:
        self._probe = probe
        self._board: Any = None

    def preflight(self, prepared: Prepared) -> None:
        """Refuse what the cluster cannot hold, or this Ray cannot go on with; wait for what it can.

        Processes for the first tasks of Ray Data are then started, beside whatever comes next.
        """
        upgrade.look_at_record(prepared.run)
        beside = probe.bundles(prepared.config)
        least = worker_counts(prepared.config.cluster, prepared.plan.groups_per_step)[-1]
        on_ray = streams_on_ray(prepared)
        cluster.preflight(
            prepared.config, prepared.root, prepared.store.uri, beside, streams_on_ray=on_ray, least=least
        )
        if on_ray and prepared.config.data.actors is None and cluster.address_of(prepared.config.cluster) is None:
            taken = sum(each["CPU"] for each in room.bundles(prepared.config.cluster, beside, streams_on_ray=False))
            stream.prepare_tasks(int(ray.cluster_resources()["CPU"] - taken))

    def train(self, prepared: Prepared, run_id: str) -> None:
        """Train to the end. Lost workers are Train's to restart; a lost controller is ours.

        Raises:
            MaskrayError: a mistake that only the workers could see (a damaged shard, a checkpoint that does not fit).
            BadStepError: of a step.
            TrainingError: the workers were lost too often.
        """
        config = prepared.config
        if self._board is None:  # one for all that is trained between rewinds: what it counts is of the whole launch
            self._board = fit.board(prepared.plan.run_name)
        board = self._board
        line = ProgressLine(prepared.plan.total_steps)
        with probe.set_aside(config) as place, closing(line), followed(board, line.update):
            told = Told(Hidden(prepared.store.uri), run_id, board, prepared.run)
            hook = Hook(written(config), told, place, self._probe)
            trainer = partial(_trainer, prepared, told, hook)
            is_judged = partial(_is_judged, prepared)
            outcome = fit.fitted(trainer, prepared.run, config.cluster.max_failures, is_judged)
        if "bad_step" in outcome:
            raise BadStepError(*outcome["bad_step"])
        self._board = None
        ray.kill(board)  # and its figures end: judging and registering make no steps, and would raise an alarm
        if not outcome["stored"]:
            raise unstored_metrics()

    def newest_step(self, prepared: Prepared) -> int:
        """Of the checkpoint that Train has on record."""
        return stream.registered_step(prepared.run)

    @contextmanager
    def newest_checkpoint(self, prepared: Prepared) -> Iterator[Path]:
        """The checkpoint that Train has on record."""
        with checkpoint.on_disk(prepared.run.child(_registered(prepared))) as folder:
            yield folder

    def judge(self, prepared: Prepared) -> Verdict | None:
        """As a task with the resources of a worker. The run is done: it does not fail for want of a judgement."""
        try:
            return probe.judge_last(prepared.config, prepared.run.child(_registered(prepared)))
        except ray.exceptions.RayError as error:
            log.warning("No probe: its task failed: %s", error)
            return None


def streams_on_ray(prepared: Prepared) -> bool:
    """Whether Ray Data decodes, and not the workers."""
    return not is_walked_locally(prepared.config.data, prepared.dataset)


def _trainer(prepared: Prepared, told: Told, hook: Hook) -> TorchTrainer:
    config, on_ray = prepared.config, streams_on_ray(prepared)
    spec = StreamSpec.of(config, prepared.plan, prepared.dataset)
    counts = worker_counts(config.cluster, prepared.plan.groups_per_step)
    kind: Callable[..., TorchTrainer] = fit.Trainer
    if len(counts) > 1:
        beside = room.beside_workers(config.cluster, probe.bundles(config), streams_on_ray=on_ray)
        terms = elastic.Terms(counts, beside, config.cluster.grow_seconds, prepared.run, told.board)
        kind = partial(elastic.Trainer, terms=terms)
    return fit.trainer(
        worker.run,
        {
            "config": written(config),
            "run": prepared.run.uri,
            "run_id": told.run_id,
            "tracking_uri": told.tracking,  # Train shows its workers' settings in Ray's dashboard
            "stream": spec if on_ray else None,
            "board": told.board,
        },
        config.cluster,
        prepared.root,
        prepared.plan.run_name,
        ray.train.CheckpointConfig(
            num_to_keep=config.storage.keep_checkpoints,
            checkpoint_score_attribute=SCORE,
            checkpoint_score_order="max",
        ),
        kind,
        dataset_config=stream.DealingConfig(config.data),
        # A killed hook is started again; what it waits for may be killed as it likes.
        validation_config=ray.train.ValidationConfig(hook, ray_remote_kwargs={"num_cpus": 0, "max_retries": -1}),
        datasets=stream.datasets(spec, prepared.run, config.cluster.workers, config.data) if on_ray else None,
    )


# --------------------------------------------------------------------------------------------------------- checkpoints


def _is_judged(prepared: Prepared, step: int) -> bool:
    """By the way, as the loop has it: the last one is judged after training."""
    config = prepared.config
    return step < prepared.plan.total_steps and config.probe.enabled and config.training.probes_after(step)


def _registered(prepared: Prepared) -> str:
    name = stream.registered_checkpoint(prepared.run)
    if name is None:
        raise CheckpointError("the run has no checkpoint", found=prepared.run.uri)
    return name
