"""Judging checkpoints while training goes on, by Ray Train's validation hook, on resources set aside; and the last one.

The hook is a task that waits, and no more: what judges is a child of it. A child may be killed, raise or hang, and what
comes of it is a note; a hook that died so would end the run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from maskray.config.schema import RunConfig
from maskray.config.training import FOR_CUBLAS
from maskray.credentials import Hidden
from maskray.data.storage import Storage
from maskray.errors import MaskrayError
from maskray.evaluation import untold
from maskray.on_ray.stream import SNAPSHOT
from maskray.training import folders

if TYPE_CHECKING:  # a hook only waits: it must not wait for torch
    from maskray.evaluation.judgement import Verdict

log = logging.getLogger(__name__)

_STORE_SECONDS = 10.0
_NICE = 10  # where CPUs are short, it is the probe that waits, and not the workers or Ray's own processes

Judge = Callable[[RunConfig, Storage, "Told"], float]
"""Judges the checkpoint at a place; the score that it is kept by."""


@dataclass(frozen=True)
class Told:
    """Where a run is kept, tracked and shown."""

    tracking: Hidden
    """MLflow's URI."""
    run_id: str
    board: Any
    run: Storage
    """The run's folder: what is told lies there until MLflow has it."""

    def tell(self) -> None:
        """Tell MLflow all that is kept for it, if it answers soon: the next probe waits for this one."""
        from maskray.tracking.mlflow_tracker import MlflowTracker

        untold.tell(self.run, lambda: MlflowTracker(self.tracking.text, self.run_id), _STORE_SECONDS)


def judge_last(config: RunConfig, weights: Storage) -> Verdict:
    """The last judgement, of the checkpoint at `weights`: a task with the resources of a worker."""
    cluster = config.cluster
    resources = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker}
    task = ray.remote(**resources, runtime_env={"env_vars": FOR_CUBLAS})(_judge_last)
    verdict = task.remote(config, weights)
    try:
        return ray.get(verdict, timeout=config.probe.limit_seconds)  # type: ignore[no-any-return]
    except ray.exceptions.GetTimeoutError:
        ray.cancel(verdict, force=True)
        raise


def _judge_last(config: RunConfig, weights: Storage) -> Verdict:
    import torch

    from maskray.evaluation import judgement
    from maskray.pretrain import settle
    from maskray.training import checkpoint

    settle(config)
    device = torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    with checkpoint.on_disk(weights) as folder:
        return judgement.judge(config, folder, device)


def judge(config: RunConfig, weights: Storage, told: Told) -> float:
    """Judge a checkpoint, tell MLflow and leave a note beside it."""
    import torch

    from maskray.evaluation import judgement
    from maskray.on_ray.worker import tell_driver
    from maskray.pretrain import settle_probe
    from maskray.tracking import mlflow_runs
    from maskray.training import checkpoint

    tell_driver(told.board)
    os.nice(_NICE)
    settle_probe(config)
    device = torch.device("cuda" if config.probe.gpus else "cpu")
    begun = bool(untold.names(told.run)) or mlflow_runs.has_metric(
        told.tracking.text, told.run_id, f"probe/{config.probe.best_by}"
    )
    with checkpoint.on_disk(weights) as folder:
        found = judgement.probe(config, folder, device, first=not begun)
    kept = untold.Untold()
    for each in found:
        each.tell(kept)
    kept.keep(told.run, weights.address[0].rpartition("/")[2])  # before the note, by which it counts as judged
    weights.write_bytes(folders.PROBE, judgement.note(config, found[-1]))
    if (scores := found[-1].scores) is not None:
        told.board.probed.remote(scores.metrics())
    told.tell()
    return folders.score_of(weights.read_bytes)


@dataclass(frozen=True)
class Hook:
    """The validation function."""

    config: Mapping[str, Any]
    """Of the run, as plain data."""
    told: Told
    place: PlacementGroup | None
    """None: on whatever is free."""
    judge: Judge

    def __call__(self, checkpoint: ray.train.Checkpoint) -> dict[str, float]:
        """Have it judged. Whatever comes of that is no error."""
        name, config = Path(checkpoint.path).name, RunConfig.model_validate(self.config)
        if not config.training.probes or not config.probe.enabled:  # of an earlier launch, that had probes
            return {}
        if (newer := waiting_after(self.told.run, name)) > config.probe.waiting:
            self._note(name, f"left out, since {newer} newer ones were waiting (probe.waiting)")
            return {}
        task = ray.remote(
            num_cpus=config.probe.cpus,
            num_gpus=config.probe.gpus,
            max_retries=0,
            scheduling_strategy="DEFAULT" if self.place is None else PlacementGroupSchedulingStrategy(self.place),
            runtime_env={"env_vars": FOR_CUBLAS},
        )(self.judge)
        child = task.options(name=f"maskray-probe-{name}").remote(config, self.told.run.child(name), self.told)
        try:
            done, _ = ray.wait([child], timeout=config.probe.limit_seconds)
            if not done:
                ray.cancel(child, force=True)
                raise TimeoutError(f"not ended within {config.probe.limit_seconds:g} s (probe.limit_seconds)")
            return {folders.SCORE: float(ray.get(child))}
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            cause = getattr(error, "cause", None) or error  # without the traceback of another process
            self._note(name, f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
        # It may have left its note before it ended.
        return {folders.SCORE: self._score(name)}

    def _note(self, name: str, why: str) -> None:
        run, step, note = self.told.run, folders.step_of(name), untold.Untold()
        came_to = "came to nothing" if self._score(name) == folders.NO_SCORE else "has its scores, but did not end well"
        text = f"The probe at step {step} {came_to}: {why}"
        self.told.board.warn.remote(text)
        note.event("probe_failed", text)
        try:
            note.keep(run, f"{name}-note")
            self.told.tell()
        except MaskrayError as error:  # the board has heard of it
            log.warning("MLflow does not hear of it: %s", error)

    def _score(self, name: str) -> float:
        """As far as its note says."""
        return folders.score_of(self.told.run.child(name).read_bytes)


def waiting_after(run: Storage, name: str) -> int:
    """Checkpoints that wait to be judged and are newer than one. Ray Train keeps each until it is."""
    try:
        pending = json.loads(run.read_bytes(SNAPSHOT))["pending_training_results"]
        return sum(folders.step_of(each["checkpoint_dir_name"]) > folders.step_of(name) for each in pending)
    except (OSError, ValueError, LookupError, TypeError, MaskrayError):  # it is being written
        return 0


def bundles(config: RunConfig) -> list[dict[str, float]]:
    """What is set aside for probes, as Ray has it; none where there are none on the way, or they share."""
    wanted = {"CPU": config.probe.cpus, "GPU": config.probe.gpus}
    none = not config.training.probes or not config.probe.enabled
    return [] if none or not any(wanted.values()) else [wanted]


@contextmanager
def set_aside(config: RunConfig) -> Iterator[PlacementGroup | None]:
    """What the config sets aside for probes, held while the block runs: Ray Data would take any CPU that is free."""
    wanted = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles(config)]
    if not wanted:
        yield None
        return
    group = placement_group(wanted)
    try:
        yield group
    finally:
        remove_placement_group(group)
