"""A sweep's trials on Ray Tune, which runs them and remembers nothing.

What is next and who goes on is decided by `sweeps`, on files of the sweep's own; Tune's snapshots are never read.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from maskray.calibration import seconds_per_step
from maskray.config.schema import ClusterConfig, RunConfig
from maskray.errors import ClusterError, MaskrayError
from maskray.on_ray import background, nested, trial
from maskray.on_ray.trial import ASKED, ENDED, RUNG, STEP, VALUE, Asked, Sweep
from maskray.sweeping import Prepared
from maskray.sweeps import record
from maskray.sweeps.record import Result
from maskray.sweeps.search import Queue
from maskray.sweeps.stopping import Ladder, rungs
from maskray.tracking import mlflow_runs

log = logging.getLogger(__name__)

_ENVIRONMENT = {  # read by Tune
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",  # what hangs does not answer when it is told to stop
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",  # a trial that is stopped tells MLflow what it has not told yet
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_START_SECONDS = 60.0  # of a process and its imports, before a trial's first word
_MANY = 10**9

Show = Callable[[Result, Counter[str]], None]
"""Told of each trial that has ended, and how many have ended how."""


def run(prepared: Prepared, parent: str, show: Show) -> None:
    """Run what is left of a sweep on the cluster that is connected; what comes of it is on record.

    Args:
        prepared: by `sweeping.prepare`.
        parent: the sweep's run in MLflow.
        show: told of each trial that ends.

    Raises:
        ClusterError: the cluster cannot hold so many trials at once, or any.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    concurrency = concurrency_of(prepared)
    survive_out_of_memory()
    config = prepared.config
    sweep = Sweep(
        folder=prepared.folder,
        store=prepared.store,
        parent=parent,
        metric=config.objective.metric,
        limit_seconds=config.trials.limit_seconds,
        code=prepared.code,
    )
    book = Book(prepared, sweep, prepared.queue(), show)
    resources = resources_of(prepared.space.base.cluster)
    tuner = tune.Tuner(
        tune.with_resources(partial(trial.run, sweep=sweep), resources),
        tune_config=tune.TuneConfig(
            search_alg=Asking(book),
            scheduler=Deciding(book),
            num_samples=_MANY,  # until the search says that there are no more
            max_concurrent_trials=concurrency,
            reuse_actors=True,  # imports are paid once for each process
            trial_dirname_creator=lambda each: each.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=prepared.folder.uri,
            callbacks=[book],
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    try:
        # In the main thread Tune would put handlers of its own in place.
        background.call("maskray-tune", tuner.fit).result()
    except BaseException:
        ray.shutdown()  # no trial goes on while MLflow is told how it ended
        raise
    prepared.folder.delete("tune")


def resources_of(cluster: ClusterConfig) -> dict[str, float] | tune.PlacementGroupFactory:
    """What a trial takes, as Ray has it: its own process, or its workers."""
    return nested.resources(cluster) if cluster.workers > 1 else of_worker(cluster)


def of_worker(cluster: ClusterConfig) -> dict[str, float]:
    """What each takes."""
    gpus = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    return {"CPU": cluster.cpus_per_worker, **gpus}


def concurrency_of(prepared: Prepared) -> int:
    """Trials at once.

    Raises:
        ClusterError: the cluster has no room for so many, or for any.
    """
    cluster, asked = prepared.space.base.cluster, prepared.config.trials.concurrency
    room = nested.concurrency(cluster, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if room < (asked or 1):
        each = ", ".join(f"{need:g} {name}" for name, need in of_worker(cluster).items())
        workers = f"{cluster.workers} workers with {each}" if cluster.workers > 1 else each
        raise ClusterError(
            f"the cluster has room for {room} trials at once",
            key="trials.concurrency" if asked else "overrides.cluster.cpus_per_worker",
            found=f"{asked or 1} of {workers} each",
            allowed=f"at most {room}" if room else "what the nodes have, each worker on one of them",
            fix="ask for fewer at once, or for smaller ones: cluster.workers, cpus_per_worker, gpus_per_worker of base",
        )
    return asked or room


def measure(configs: Sequence[RunConfig]) -> list[float]:
    """Seconds that a step of each config takes, with the resources of a trial and nothing beside it."""
    resources = of_worker(configs[0].cluster)
    timed = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_retries=0)(seconds_per_step)
    # One after another: what runs beside a trial takes some of its time.
    return [ray.get(timed.remote(config)) for config in configs]


class _NotKept:
    """What Tune is given it pickles, into snapshots that nobody reads: there is nothing in them."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Book(_NotKept, tune.Callback):
    """Who runs, and what came of each: on record, and in MLflow, before Tune gives its place to another.

    Args:
        prepared: the sweep.
        sweep: as the trials know it.
        queue: what is next.
        show: told of each trial that ends.
    """

    def __init__(self, prepared: Prepared, sweep: Sweep, queue: Queue, show: Show) -> None:
        self._prepared, self._sweep, self._queue, self._show = prepared, sweep, queue, show
        config = prepared.config
        self._ladder = Ladder(config.stopping, config.objective.direction, prepared.folder)
        self._ended = Counter[str](result.status for result in prepared.results.values() if result.status != "failed")
        self._silent_since: dict[str, float] = {}
        self._hung: set[str] = set()

    def ask(self) -> Asked | None:
        """The trial that is next; None: none is, now."""
        found = self._queue.next()
        if found is None:
            return None
        probe_at = [rung.step for rung in rungs(self._prepared.config.stopping, found)]
        return Asked(found, self._prepared.space.run_config(found, probe_at).model_dump(mode="json"))

    @property
    def is_done(self) -> bool:
        """Whether there will be no more."""
        return self._queue.is_done

    def goes_on(self, asked: Asked, step: int, value: float) -> bool:
        """Whether a trial goes on that has come to a rung."""
        rung = next(each for each in rungs(self._prepared.config.stopping, asked.trial) if each.step == step)
        return self._ladder.goes_on(asked.trial.key, rung.index, value)

    # ----------------------------------------------------------------------------------------------- what Tune calls

    def on_trial_start(self, *, trial: TuneTrial, **_: Any) -> None:
        """It may be silent for so long, and while its process starts."""
        self._silent_since[trial.trial_id] = time.monotonic() + _START_SECONDS

    def on_trial_result(self, *, trial: TuneTrial, **_: Any) -> None:
        """A sign of life."""
        self._silent_since[trial.trial_id] = time.monotonic()

    def on_step_begin(self, *, trials: list[TuneTrial], **_: Any) -> None:
        """End those that are silent for too long: in sleep, or with the interpreter's lock held.

        Tune looks only at trials that speak.
        """
        for each in trials:
            since = self._silent_since.get(each.trial_id)
            if each.status != TuneTrial.RUNNING or since is None:
                continue
            if time.monotonic() - since > self._sweep.limit_seconds and each.temporary_state.ray_actor is not None:
                del self._silent_since[each.trial_id]
                self._hung.add(each.trial_id)
                ray.kill(each.temporary_state.ray_actor)

    def on_trial_complete(self, *, trial: TuneTrial, **_: Any) -> None:
        """It has finished, or was stopped at a rung."""
        asked, last = Asked.load(trial.config[ASKED]), trial.last_result
        if last.get(ENDED):
            folder = self._sweep.folder_of(asked.trial)
            self._note(Result.load(folder.read_bytes(record.RESULT), folder.join(record.RESULT)))
            return
        self._close(asked, "pruned", last[STEP], last[VALUE], f"pruned at step {last[STEP]} of {asked.trial.steps}")

    def on_trial_error(self, *, trial: TuneTrial, **_: Any) -> None:
        """It has failed, and says why as well as it is known."""
        limit = self._sweep.limit_seconds
        hung = f"hung: silent for more than {limit:g} s (trials.limit_seconds)"
        why = hung if trial.trial_id in self._hung else reason_of(trial)
        last = trial.last_result or {}
        self._close(Asked.load(trial.config[ASKED]), "failed", int(last.get(STEP, 0)), None, why)

    def _close(self, asked: Asked, status: record.Status, steps: int, value: float | None, reason: str) -> None:
        run_id = None
        try:
            run_id = self._sweep.run_of(asked)
            mlflow_runs.close_run(self._sweep.store, run_id, "KILLED" if status == "pruned" else "FAILED", reason)
        except MaskrayError as error:  # it is closed with the sweep
            log.warning("%s: %s", asked.trial.name, error)
        result = Result(asked.trial, status, steps, 0.0, value, run_id=run_id, reason=reason)
        self._sweep.folder_of(asked.trial).write_bytes(record.RESULT, result.dump())
        self._note(result)

    def _note(self, result: Result) -> None:
        self._queue.tell(result)
        self._ended[result.status] += 1
        self._show(result, self._ended)


class Asking(_NotKept, Searcher):
    """Tune's view of the queue."""

    def __init__(self, book: Book) -> None:
        super().__init__()
        self._book = book

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """There is no space but ours."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # noqa: ARG002
        """The next trial's config."""
        asked = self._book.ask()
        if asked is not None:
            return {ASKED: asked.dump()}
        return Searcher.FINISHED if self._book.is_done else None

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """The book knows."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see `_NotKept`."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `_NotKept`."""


class Deciding(_NotKept, FIFOScheduler):
    """Tune's view of the ladder."""

    def __init__(self, book: Book) -> None:
        super().__init__()
        self._book = book

    def on_trial_result(self, _: Any, trial: TuneTrial, result: Mapping[str, Any]) -> str:
        """Stop it, or not."""
        if RUNG not in result or result.get(ENDED):
            return str(TrialScheduler.CONTINUE)
        goes_on = self._book.goes_on(Asked.load(trial.config[ASKED]), result[RUNG], result[VALUE])
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)


def reason_of(failed: TuneTrial) -> str:
    """Why a trial failed, from the file that Tune writes on the driver's disk."""
    try:
        lines = [line.strip() for line in Path(failed.error_file).read_text().splitlines() if line.strip()]
    except (OSError, TypeError):
        lines = []
    memory = next((line for line in lines if "out of memory" in line.lower()), None)
    if memory is not None:
        return memory
    if any("actor is dead" in line.lower() or "actor died" in line.lower() for line in lines):
        return "its process died: killed, out of memory, or ended by itself"
    return lines[-1] if lines else "unknown"


def survive_out_of_memory() -> None:
    """Have Tune record a trial that Ray's memory monitor ended, as any other that failed.

    As shipped (2.60) it knows two kinds of errors of a trial's process, of which this is none, and ends the whole sweep
    with `RuntimeError: Caught unexpected exception`.
    """
    as_shipped = RayActorManager._actor_task_failed
    if getattr(as_shipped, "survives", False):
        return

    def actor_task_failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=f"out of memory: {str(exception).splitlines()[0]}")
        as_shipped(self, tracked_actor_task, exception)

    actor_task_failed.survives = True  # type: ignore[attr-defined]
    RayActorManager._actor_task_failed = actor_task_failed
