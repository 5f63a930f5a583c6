"""A trial of a sweep, in the process that Tune gives it: trained, judged, told to MLflow and put on record.

All that outlives the process lies in the trial's folder: its newest checkpoint, and `result.json` once it has ended.
So a trial that is started again, by whichever driver, goes on where it was.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from ray import tune

from maskray.config.schema import RunConfig
from maskray.config.sweep import LOSS, SCORES
from maskray.config.training import FOR_CUBLAS
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import AwayError, MaskrayError, TrackingError, TrainingError
from maskray.evaluation.judgement import Bench, Finding, read_rows
from maskray.launch import card, unstored_metrics
from maskray.on_ray.gauges import Gauges
from maskray.on_ray.stream import registered_checkpoint
from maskray.on_ray.sweep import nested
from maskray.on_ray.sweep.context import TrialContext, device_of, newest
from maskray.preparing import Prepared
from maskray.pretrain import pretrain, settle
from maskray.publish.release import training_seconds
from maskray.sweeps import record
from maskray.sweeps.record import Result, Trial
from maskray.sweeps.space import plan_of
from maskray.tracking import mlflow_runs
from maskray.tracking.base import Fanout, Observer
from maskray.tracking.mlflow_store import Store
from maskray.tracking.mlflow_tracker import UNTOLD, MlflowTracker
from maskray.tracking.patience import AWAY_SECONDS, Patience
from maskray.training import checkpoint, folders, stacks
from maskray.training.memory import give_back_freed_memory
from maskray.training.throughput import IMAGES_PER_SECOND

log = logging.getLogger(__name__)

ASKED = "asked"
"""What Tune's config of a trial has."""
STEP, RUNG, VALUE, ENDED = "step", "rung", "value", "ended"
"""What its reports have: only the last has `ended`, and only those at rungs have `rung`, the step."""
BEATS = 5
"""Signs of life in the time that a trial may be silent."""
_FLUSH_SECONDS = 10.0
_ENVIRONMENT = {  # read in this process: by cuBLAS, and by Tune before it is given to another trial
    **FOR_CUBLAS,
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "45",  # a trial that is stopped has 30 s to tell MLflow what it has not told yet
}

# Most trials of a sweep are judged on the same rows, and many share a process.
_rows = lru_cache(maxsize=1)(read_rows)


@dataclass(frozen=True)
class Asked:
    """A trial, and what it trains."""

    trial: Trial
    config: Mapping[str, Any]
    """Of the run, as plain data; it is judged on the way where the trial's rungs are."""

    def dump(self) -> str:
        """As JSON: Tune looks into configs for spaces, and must find none."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> Asked:
        """The way back."""
        raw = json.loads(text)
        return Asked(Trial(**raw["trial"]), raw["config"])


@dataclass(frozen=True)
class Sweep:
    """What all trials of a sweep have in common."""

    folder: Storage
    store: Store
    """MLflow."""
    parent: str
    """Its run there."""
    metric: str
    """The objective."""
    limit_seconds: float
    """A trial may be silent for so long."""
    code: Mapping[str, str]
    """As `mlflow_runs.provenance` says it."""
    away_seconds: float = AWAY_SECONDS
    """A trial waits for an MLflow that is away for so long at a stretch, before it begins and when it has been trained;
    then the sweep ends. Training goes on meanwhile."""

    def folder_of(self, trial: Trial) -> Storage:
        """Of a trial."""
        return self.folder.child(record.TRIALS, trial.key)

    def prepared(self, asked: Asked) -> Prepared:
        """A trial's run, as if it were launched alone."""
        config = RunConfig.model_validate(asked.config)
        dataset = Dataset.open(config.data.path, config.data.version)
        plan, root = plan_of(config, dataset), Storage(config.storage.path)
        return Prepared(config, plan, dataset, root, self.folder_of(asked.trial), self.store, self.code)

    def fingerprint_of(self, trial: Trial) -> str:
        """Of a trial's run in MLflow."""
        return mlflow_runs.child_fingerprint(trial.key, self.parent)

    def run_of(self, asked: Asked) -> str:
        """The id of a trial's run in MLflow, a child of the sweep's: found, or created; running."""
        alone, trial = card(self.prepared(asked)), asked.trial
        mine = mlflow_runs.child_card(alone, self.parent, trial.key, trial.name, self.folder.uri)
        return mlflow_runs.ensure_run(self.store, mine)


@dataclass(frozen=True)
class Running:
    """A trial under way: what it trains, and whom it tells of it."""

    trial: Trial
    config: RunConfig
    folder: Storage
    store: Store
    """MLflow."""
    run_id: str
    """Its run there."""
    tell: Teller
    patience: Patience
    """With MLflow."""


def run(config: Mapping[str, Any], sweep: Sweep) -> None:
    """What Tune runs of each trial.

    Raises:
        MaskrayError, TrainingError: of the run.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    stacks.write_on_signal()
    asked, tell = Asked.load(config[ASKED]), Teller(sweep)
    patience = Patience(sweep.store.uri, sweep.away_seconds, tell.beat)
    run_id = patience.call(partial(sweep.run_of, asked))
    trial, run_config = asked.trial, RunConfig.model_validate(asked.config)
    running = Running(trial, run_config, sweep.folder_of(trial), sweep.store, run_id, tell, patience)
    name, scores = (_on_workers if run_config.cluster.workers > 1 else _here)(running)
    curve = partial(mlflow_runs.curve, sweep.store, run_id)
    loss, rate = (patience.call(partial(curve, key)) for key in (LOSS, IMAGES_PER_SECOND))
    metrics = {**scores, LOSS: loss[-1][1]}
    result = Result(
        trial=trial,
        status="finished",
        steps=trial.steps,
        seconds=training_seconds(rate, run_config.optim.global_batch),
        value=objective_of(metrics, sweep.metric, trial.steps),
        metrics=metrics,
        run_id=run_id,
        checkpoint=name,
    )
    running.folder.write_bytes(record.RESULT, result.dump())
    _close(sweep, trial, run_id)
    tune.report({STEP: trial.steps, VALUE: result.value, ENDED: True})


def _close(sweep: Sweep, trial: Trial, run_id: str) -> None:
    """Say in MLflow that a trial has finished. It is on record: where MLflow is away, the sweep's end says it."""
    try:
        Patience(sweep.store.uri, 0).call(partial(mlflow_runs.close_run, sweep.store, run_id, "FINISHED"))
    except MaskrayError as away:
        log.warning("%s has finished, and MLflow does not know yet: %s", trial.name, away)


Last = tuple[str, dict[str, float]]
"""The name of a trial's last checkpoint, and its scores."""


def _on_workers(running: Running) -> Last:
    """Train and judge where the accelerators are: this process has none, nor a CPU of its own."""
    config, trial, folder = running.config, running.trial, running.folder
    root, judge = Storage(config.storage.path), partial(finding_of, title=trial.name)
    train = partial(
        nested.train, config, root, folder, running.store.uri, running.run_id, judge, running.tell, trial.steps
    )
    try:
        found = train()
    except TrackingError:  # trained; what MLflow has not taken is in the last checkpoint, from which it goes on
        running.patience.call(partial(mlflow_runs.points, running.store, running.run_id, LOSS))
        found = train()
    folder.delete(UNTOLD)
    name = registered_checkpoint(folder)
    assert name is not None, "the last step is a checkpoint"
    return name, {key: found[key] for key in SCORES if key in found}


def _here(running: Running) -> Last:
    """Train and judge in this process."""
    config, steps = running.config, running.trial.steps
    settle(config)
    _forget(config)
    bench = Bench(config, device_of(config), _rows)
    _train(running, bench)
    with newest(running.folder) as last:
        assert last is not None, "the last step is a checkpoint"
        assert folders.step_of(last.name) == steps, "the newest is that of the last step"
        found = bench.find(steps, last.weights)
    _keep(found, running)
    return last.name, scores_of(found)


def _train(running: Running, bench: Bench) -> None:
    """In this process."""
    config, folder, tell = running.config, running.folder, running.tell
    seconds = config.tracking.system_metrics_seconds
    stored = MlflowTracker(running.store.uri, running.run_id, system_metrics_seconds=seconds)
    gauges, known = Gauges(nested.run_name(config, folder)), dict[str, float]()

    def hear(step: int, metrics: Mapping[str, float]) -> None:
        known.update(metrics)
        tell(step, {})

    def judge(weights: Path, step: int) -> dict[str, float]:
        scores = scores_of(bench.find(step, weights))
        stored.log(scores, step)
        gauges.probed(scores)
        if not stored.flush(_FLUSH_SECONDS):
            _keep_untold(folder, stored)  # a trial that is stopped here may have no time to
        return {**known, **scores}

    try:
        if (last := _last_rung(folder, config)) is not None:
            step, metrics = last
            # Known since before it was ended, and to MLflow or not: then it drops them.
            stored.log({key: metrics[key] for key in SCORES if key in metrics}, step)
            tell(step, metrics)
        told = Fanout(stored, Observer(hear), Observer(gauges.log))
        pretrain(config, TrialContext(folder, config, judge, tell, tell.beat), told)
        has_stored_all = running.patience.close(stored)
    except AwayError:
        _keep_untold(folder, stored)
        raise
    except BaseException:
        if not stored.close():
            _keep_untold(folder, stored)
        raise
    finally:
        gauges.close()
    if not has_stored_all:
        raise unstored_metrics()
    folder.delete(UNTOLD)


def _keep_untold(folder: Storage, tracker: MlflowTracker) -> None:
    """What MLflow has not taken: the sweep's end tells it, where the trial does not go on."""
    if untold := tracker.pending():
        folder.write_bytes(UNTOLD, json.dumps(untold).encode())


def _forget(config: RunConfig) -> None:
    """What the trial before has left in this process: compiled graphs, of which there are only so many, and memory."""
    if config.training.compile:
        torch._dynamo.reset()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _last_rung(folder: Storage, config: RunConfig) -> tuple[int, dict[str, float]] | None:
    """Step and metrics of a trial that was ended at a rung: nobody may have decided whether it goes on."""
    with newest(folder) as found:
        if found is None or (step := folders.step_of(found.name)) not in config.training.probe_at:
            return None
        return step, json.loads((found.weights / folders.PROBE).read_bytes())["metrics"]


def _keep(found: Finding, running: Running) -> None:
    """What the last judgement found, in MLflow and for the report."""
    record.keep_painted(running.folder, found.painted)
    tracker = MlflowTracker(running.store.uri, running.run_id)
    found._replace(title=running.trial.name).tell(tracker)
    if not running.patience.close(tracker):
        raise unstored_metrics()


def scores_of(found: Finding) -> dict[str, float]:
    """As MLflow has them; none where the dataset cannot be probed."""
    return {} if found.scores is None else found.scores.metrics()


def finding_of(config: RunConfig, weights: Path, *, title: str) -> Finding:
    """What a checkpoint is worth, in the first of a trial's workers."""
    bench = Bench(config, device_of(config))
    return bench.find(checkpoint.read_facts(weights).step, weights)._replace(title=title)


def objective_of(metrics: Mapping[str, float], metric: str, step: int) -> float:
    """The objective among what was found at a step.

    Raises:
        TrainingError: it is not there.
    """
    if metric not in metrics:
        raise TrainingError(f"The probe found no {metric} at step {step}: see the trial's warnings.")
    return metrics[metric]


class Teller:
    """Reports a trial to Tune, which may end it by SystemExit.

    Args:
        sweep: that it belongs to.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._metric, self._seconds = sweep.metric, sweep.limit_seconds / BEATS
        self._step, self._last, self._beat = 0, -math.inf, time.monotonic()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tell`. Where there is nothing but the step it is a sign of life, and the last one may be enough."""
        self._step = step
        if metrics:
            self._report({STEP: step, RUNG: step, VALUE: objective_of(metrics, self._metric, step)})
        elif self._is_due(self._last):
            self._report({STEP: step})

    def beat(self) -> None:
        """A sign of life of a trial that waits: no news, which are told as if there had been none."""
        if self._is_due(max(self._last, self._beat)):
            self._beat = time.monotonic()
            tune.report({STEP: self._step})

    def _is_due(self, last: float) -> bool:
        return time.monotonic() - last >= self._seconds

    def _report(self, metrics: dict[str, Any]) -> None:
        self._last = time.monotonic()
        tune.report(metrics)
