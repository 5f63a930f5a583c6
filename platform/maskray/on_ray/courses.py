"""Courses on Ray Train: one group of workers for a list of them, that survives what pretraining survives."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from maskray.config.schema import ClusterConfig
from maskray.data import lease
from maskray.data.storage import Storage
from maskray.errors import TrainingError
from maskray.on_ray import fit, record
from maskray.on_ray.context import RayWorkerContext
from maskray.on_ray.stream import registered_checkpoint
from maskray.on_ray.worker import tell_driver
from maskray.training import checkpoint, courses
from maskray.training.courses import Build, Progress, State, Tell

T = TypeVar("T")

_TELL_SECONDS = 0.5
_MANY = 10**9  # steps: the board shows what has another number than before


def run_all(
    build: Build[T],
    asked: Sequence[T],
    fingerprint: str,
    checkpoint_steps: int,
    tell: Tell | None = None,
    *,
    cluster: ClusterConfig,
    root: Storage,
    prefix: str,
) -> list[State]:
    """As `training.courses.run_all`, by workers of the cluster that is connected; what was done before is kept.

    Args:
        build: as there; it goes through the object store.
        asked: descriptions.
        fingerprint: as there.
        checkpoint_steps: as there.
        tell: as there, now and then.
        cluster: workers, and what each takes.
        root: where runs are kept, as all nodes see it.
        prefix: of the run's folder there.

    Raises:
        RunConflictError: the same courses are running somewhere else.
        MaskrayError: a mistake that only the workers could see.
        TrainingError: a course went wrong, or the workers were lost too often.
    """
    name = courses.run_name(prefix, fingerprint)
    run = root.child(name)
    with lease.hold(run, name, lease.EVALUATION):
        record.settle(run)
        done = _done(run, fingerprint)
        if len(done) == len(asked):
            return done
        board = fit.board()
        settings = {
            "build": ray.put(build),
            "asked": list(asked),
            "run": run.uri,
            "fingerprint": fingerprint,
            "checkpoint_steps": checkpoint_steps,
            "threads": max(1, int(cluster.cpus_per_worker)),
            "board": board,
        }

        def show(_: int, at: Mapping[str, float]) -> None:
            if tell is not None:
                tell(int(at["course"]), int(at["step"]), int(at["steps"]))

        with fit.followed(board, show):
            wrong = fit.fitted(partial(_trainer, settings, cluster, root, name), run, cluster.max_failures)
        if wrong is not None:
            raise TrainingError(wrong)
        # Not what the workers return: Train takes no tensors.
        done = _done(run, fingerprint)
        assert len(done) == len(asked), "the last checkpoint has all results"
        return done


def _trainer(settings: dict[str, Any], cluster: ClusterConfig, root: Storage, name: str) -> TorchTrainer:
    return fit.trainer(_work, settings, cluster, root, name, ray.train.CheckpointConfig(num_to_keep=1))


def _done(run: Storage, fingerprint: str) -> list[State]:
    """Results that are on record."""
    name = registered_checkpoint(run)
    if name is None:
        return []
    with checkpoint.on_disk(run.child(name)) as folder:
        return Progress.read(folder, fingerprint).results


def _work(settings: dict[str, Any]) -> str | None:
    """What each of Ray Train's workers runs; what went wrong with a course."""
    board = settings["board"]
    tell_driver(board)
    torch.set_num_threads(settings["threads"])
    context = RayWorkerContext(Storage(settings["run"]))
    told = -_TELL_SECONDS

    def tell(index: int, step: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if context.rank == 0 and now - told >= _TELL_SECONDS:
            told = now
            board.post.remote(index * _MANY + step, {"course": index, "step": step, "steps": total})

    try:
        courses.run_all(
            ray.get(settings["build"]),
            settings["asked"],
            context,
            fingerprint=settings["fingerprint"],
            checkpoint_steps=settings["checkpoint_steps"],
            tell=tell,
        )
    except TrainingError as error:
        # All workers see it, and it would come again: returned, not raised, so that Train does not try again.
        return str(error)
    return None
