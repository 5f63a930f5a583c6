"""A trial of a sweep that takes several workers: Ray Train within the process of a trial of Ray Tune.

Tune gives the trial one placement group with all of its workers' resources, and the workers are placed in it
(`lent.py`): two trials can never hold half of what each needs, and what Tune ends is gone, workers and all.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from functools import partial
from typing import Any

import ray
import ray.train
from ray import tune

from maskray.config.load import written
from maskray.config.schema import ClusterConfig, RunConfig
from maskray.credentials import Hidden
from maskray.data.storage import Storage
from maskray.errors import BadStepError
from maskray.launch import unstored_metrics
from maskray.on_ray import fit, room
from maskray.on_ray.board import TrialBoard
from maskray.on_ray.sweep import judging, lent
from maskray.on_ray.sweep.judging import Judge

Tell = Callable[[int, Mapping[str, float]], None]
"""Told of a step, and of what is known then: scores where it was judged. It may end the trial, by SystemExit."""

_POLL_SECONDS, _HEARTBEAT_SECONDS = 0.5, 3.0


def train(
    config: RunConfig,
    root: Storage,
    folder: Storage,
    tracking_uri: str,
    run_id: str,
    judge: Judge,
    tell: Tell,
    last_step: int,
) -> dict[str, float]:
    """Train a trial to its end on the workers of its placement group, which `resources` asks Tune for, and judge it.

    Checkpoints are kept in the trial's folder, and it goes on from them; lost workers are Train's to start again, and a
    lost controller is ours, `cluster.max_failures` times each. After each of the steps of `training.probe_at`, and
    after the last, the first worker judges the checkpoint, on what it trains on; the others wait for it in their next
    collective, half an hour at most (`timeout_s` of Ray Train's `TorchConfig`). Where the trial goes on from such a
    checkpoint, what was found is known from the note beside it. Training does not wait for what `tell` does: a trial
    that it ends has done a few steps more.

    When `tell` raises, Train's controller and the workers are killed. They also die with this process.

    Args:
        config: of the trial, `data.stream` local.
        root: where runs are kept, as all nodes see it.
        folder: the trial's, below it.
        tracking_uri: MLflow's.
        run_id: the trial's run there; it gets what training logs, and what is found.
        judge: is called in the first worker.
        tell: is called here: after each judgement but the last, with what was logged at its step and what was found;
            and with nothing, every few seconds, as long as there are new lines of the log, or the stream is being made
            ready (where workers were lost the step goes back, and a step may be told of twice). It may raise,
            SystemExit too.
        last_step: of the run.

    Returns:
        What was logged at the last step, and what was found.

    Raises:
        MaskrayError: a mistake that only the workers could see, or metrics that MLflow has not taken.
        BadStepError: a step was not finite: trials do not go back.
        TrainingError: the workers were lost too often.
    """
    board = fit.board(run_name(config, folder), TrialBoard)
    settings = {
        "config": written(config),
        "run": folder.uri,
        "run_id": run_id,
        "tracking_uri": Hidden(tracking_uri),
        "board": board,
        "judge": ray.put(judge),
        "last_step": last_step,
    }
    make = partial(_trainer, settings, config, root, folder)
    pulse, found = _Pulse(), dict[int, dict[str, float]]()
    try:
        with fit.followed(board, pulse.line), lent.fitting(make, folder, config.cluster.max_failures) as fitting:
            ended = False
            while not ended:
                ended = bool(wait([fitting], _POLL_SECONDS).done)  # and looks once more
                news, beats = ray.get([board.read_found.remote(list(found)), board.read_beats.remote()])
                for step, metrics in news:
                    found[step] = metrics
                    if step != last_step:
                        tell(step, metrics)
                if pulse.is_due(beats):
                    tell(pulse.step, {})
            outcome = fitting.result()
    finally:
        ray.kill(board)  # an error's traceback may be kept, and would keep it
    if "bad_step" in outcome:
        raise BadStepError(*outcome["bad_step"])
    if not outcome["stored"]:
        raise unstored_metrics()
    return outcome["found"] or found[last_step]


def run_name(config: RunConfig, folder: Storage) -> str:
    """Of a trial, as its run would be called if it were launched alone."""
    return f"{config.name}-{folder.uri.rpartition('/')[2][:8]}"


def resources(asked: ClusterConfig) -> tune.PlacementGroupFactory:
    """What Tune is to hold for a trial: nothing for its own process, which waits, and a bundle for each worker."""
    return tune.PlacementGroupFactory([{}, *_bundles(asked)])


def concurrency(asked: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials the cluster holds at once: all workers of each, every worker on one node.

    Args:
        asked: what a trial takes.
        nodes: what each of the nodes has.
    """
    left = [dict(node) for node in nodes]
    return next(n for n in itertools.count() if not all(room.place(bundle, left) for bundle in _bundles(asked)))


def _bundles(asked: ClusterConfig) -> list[dict[str, float]]:
    amounts = {"CPU": asked.cpus_per_worker, "GPU": asked.gpus_per_worker}
    return [{name: amount for name, amount in amounts.items() if amount} for _ in range(asked.workers)]


def _trainer(settings: dict[str, Any], config: RunConfig, root: Storage, folder: Storage) -> lent.Trainer:
    keep = ray.train.CheckpointConfig(num_to_keep=config.storage.keep_checkpoints)
    trainer: lent.Trainer = fit.trainer(
        judging.run, settings, config.cluster, root, _below(root, folder), keep, lent.Trainer
    )
    return trainer


def _below(root: Storage, folder: Storage) -> str:
    """The name of a folder from a place above it on."""
    (base, _), (path, _) = root.address, folder.address
    base = base.rstrip("/") + "/"
    assert path.startswith(base), f"{folder} is not below {root}"
    return path.removeprefix(base)


class _Pulse:
    """Whether training goes on: the newest line of its log, beats before there is any, and what was told of them."""

    def __init__(self) -> None:
        self.step, self._told = 0, (0, 0)
        self._at = time.monotonic()

    def line(self, step: int, _: Mapping[str, float]) -> None:
        """There is a line."""
        self.step = step

    def is_due(self, beats: int) -> bool:
        """Whether there is something to tell of, and the last time was long enough ago; that is then now."""
        now, heard = time.monotonic(), (self.step, beats)
        if heard == self._told or now - self._at < _HEARTBEAT_SECONDS:
            return False
        self._told, self._at = heard, now
        return True
