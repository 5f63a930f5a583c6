"""A sweep from config to report, whoever runs its trials: checks, folder, lease, MLflow's parent run, the report.

Everything that can be checked is checked before a trial starts.
"""

from __future__ import annotations

import json
import logging
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from maskray import launch
from maskray.calibration import seconds_per_step
from maskray.config.load import dotted_keys, dump, fingerprint, identity, load_text
from maskray.config.schema import RunConfig, TrackingConfig
from maskray.config.sweep import SweepConfig
from maskray.data import lease
from maskray.data.lease import Kind
from maskray.data.storage import Storage
from maskray.errors import ConfigError, MaskrayError
from maskray.offering import promotion_of
from maskray.publish.release import training_seconds
from maskray.sweeps import record, report
from maskray.sweeps.ranking import ranked
from maskray.sweeps.record import Result, Trial
from maskray.sweeps.search import Queue, open_queue
from maskray.sweeps.space import Space, name_of, plan_of, point_key, refuse_equal_points
from maskray.sweeps.stopping import refuse_idle_rungs
from maskray.tracking import mlflow_runs
from maskray.tracking.mlflow_runs import Child, DatasetCard, RunCard
from maskray.tracking.mlflow_store import Store, open_store
from maskray.tracking.mlflow_tracker import UNTOLD, MlflowTracker
from maskray.tracking.patience import AWAY_SECONDS, Patience
from maskray.training.throughput import IMAGES_PER_SECOND

log = logging.getLogger(__name__)

CALIBRATION = "calibration.json"
"""Seconds that a step of each point took, before the first trial."""
_JUDGED = {
    "init_from",
    *(f"probe.{key}" for key in ("k", "temperature", "labels_per_class", "draws", "max_rows")),
}
"""Operational keys of a run that say what its trials begin with, and what they are worth."""
SWEEP = Kind("the sweep", "name", "wait for it, or stop it")
_CLOSED = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True)
class Prepared:
    """A sweep that has passed every check that needs no cluster."""

    config: SweepConfig
    space: Space
    trials: tuple[Trial, ...]
    """All that there will be; of a search that asks for its points, those of a sample of them, each with one seed."""
    name: str
    """With the number that says which sweep of that name it is."""
    folder: Storage
    results: Mapping[str, Result]
    """Of trials that ended before, where it is resumed."""
    store: Store
    """MLflow."""
    code: Mapping[str, str]
    """Commit, sources and versions, taken before anything runs."""

    @property
    def num_trials(self) -> int:
        """In all."""
        asked = self.config.search
        return len(self.trials) if asked.kind != "optuna" else asked.points * len(self.config.seeds)

    def queue(self) -> Queue:
        """The trials that are left, in order."""
        return open_queue(self.config, self.space.points(), self.space.trial, self.results, self.folder)


def prepare(config: SweepConfig, *, resume: bool = False, new: bool = False, commit: str | None = None) -> Prepared:
    """Check all that can be checked without a cluster; nothing is written but MLflow's store, where there is none.

    Args:
        config: of the sweep.
        resume: go on with the last sweep of this name, where there is one.
        new: begin another of this name beside it.
        commit: git commit of the package, where it has left its repository.

    Raises:
        MaskrayError: of the kind that is wrong: the space or a point of it, base, dataset, storage, MLflow; or there is
            a sweep of this name already.
    """
    space = Space(config)
    trials = _trials(space)
    if config.register_best is not None:
        promotion_of(space.base, config.register_best)
    root = Storage(space.base.storage.path)
    root.check_writable()
    number = _last_number(root, config.name)
    if number and not new:
        _refuse_unless_resumed(_folder(root, config.name, number), space, resume=resume)
    number = number + 1 if new or not number else number
    folder = _folder(root, config.name, number)
    if space.unmeasured() and (measured := _measured(folder)):
        space = Space(config, measured)
        trials = _trials(space)
    code = mlflow_runs.provenance(Path(__file__).parent, commit)
    return _prepared(config, space, trials, number, code, space.base.tracking)


def _prepared(
    config: SweepConfig,
    space: Space,
    trials: tuple[Trial, ...],
    number: int,
    code: Mapping[str, str],
    tracking: TrackingConfig,
) -> Prepared:
    root = Storage(space.base.storage.path)
    folder = _folder(root, config.name, number)
    return Prepared(
        config=config,
        space=space,
        trials=trials,
        name=f"{config.name}-{number}",
        folder=folder,
        results=record.results(folder),
        store=open_store(tracking, root.uri),
        code=code,
    )


def measured_rate(prepared: Prepared) -> float:
    """FLOP/s that a worker reaches here, from a few steps of the point in the middle of the bill.

    Raises:
        MaskrayError, TrainingError: of that point's run.
    """
    middle = sorted(prepared.trials, key=lambda trial: trial.flops_per_step)[len(prepared.trials) // 2]
    log.warning("Timing a few steps of %s", name_of(middle.point))
    return middle.flops_per_step / seconds_per_step(prepared.space.run_config(middle))


def measured(prepared: Prepared, measure: Callable[[Sequence[RunConfig]], Sequence[float]]) -> Prepared:
    """A sweep whose budget in seconds is one in steps: measured once for each point, and on record.

    Args:
        prepared: whose lease is held.
        measure: seconds that a step of each config takes.

    Raises:
        MaskrayError: the budget is not enough for a step of some point.
    """
    points = prepared.space.unmeasured()
    if not points:
        return prepared
    space, seed = prepared.space, prepared.config.seeds[0]
    log.warning("Timing a few steps of each of %d points", len(points))
    found = measure([space.run_config(space.trial(point, seed)) for point in points])
    known = _measured(prepared.folder) | dict(zip(map(point_key, points), found, strict=True))
    prepared.folder.write_bytes(CALIBRATION, json.dumps(known, indent=1).encode())
    space = Space(prepared.config, known)
    return replace(prepared, space=space, trials=_trials(space))


@contextmanager
def begun(prepared: Prepared) -> Iterator[str]:
    """The sweep's lease, and its run in MLflow, whose status and whose children's are true at the end; the run's id.

    Raises:
        RunConflictError: somebody else is at it.
    """
    with lease.hold(prepared.folder, prepared.name, SWEEP) as held:
        prepared.folder.delete(record.FINISHED)
        prepared.folder.write_bytes(record.DATASET, prepared.space.dataset.manifest.fingerprint.encode())
        prepared.folder.write_bytes(record.SWEEP_YAML, dump(prepared.config).encode())
        run_id = Patience(prepared.store.uri).call(partial(mlflow_runs.ensure_run, prepared.store, _card(prepared)))
        try:
            yield run_id
        except BaseException as error:
            if held.lost_to is not None:  # the sweep goes on, in other hands
                raise
            # Whoever stops a sweep does not wait for MLflow; nor once more, whoever waited in vain.
            mlflow = Patience(prepared.store.uri, 0)
            close = partial(mlflow_runs.close_run, prepared.store, run_id)
            _try(partial(close_children, prepared, run_id, mlflow))
            if isinstance(error, Exception):
                _try(partial(mlflow.call, partial(close, "FAILED", str(error))))
            else:
                _try(partial(mlflow.call, partial(close, "KILLED", "interrupted")))
            raise


def _try(close: Callable[[], None]) -> None:
    """What ended the sweep is what the user must hear of."""
    try:
        close()
    except MaskrayError as error:
        log.warning("%s", error)


def close_children(prepared: Prepared, run_id: str, mlflow: Patience) -> None:
    """Tell MLflow of a sweep's trials what it does not know yet, while nobody runs them.

    Those that say something else than their results are closed as these say; those that have none and say RUNNING, as
    killed. Another launch may have closed a trial that had finished while MLflow was away.

    Raises:
        TrackingError: MLflow is away.
    """
    results, store = record.results(prepared.folder), prepared.store
    found = mlflow.call(partial(mlflow_runs.children, store, run_id))
    for key in results.keys() - {child.trial for child in found}:  # it ended before MLflow knew of it
        made = mlflow.call(partial(mlflow_runs.ensure_run, store, _card_of_trial(prepared, run_id, results[key].trial)))
        found.append(Child(made, key, "RUNNING"))
    for child in found:
        result = results.get(child.trial)
        if result is not None and result.status != "finished":
            _catch_up(prepared, child.run_id, result, mlflow)
        status, reason = _end(result)
        if child.status not in (status, *(_CLOSED if result is None else ())):
            mlflow.call(partial(mlflow_runs.close_run, store, child.run_id, status, reason))


def _end(result: Result | None) -> tuple[mlflow_runs.Ended, str]:
    """How a trial ended, as MLflow has it, and why."""
    if result is None:
        return "KILLED", "the sweep ended before it"
    if result.status == "finished":
        return "FINISHED", ""
    return "FAILED" if result.status == "failed" else "KILLED", result.reason


def _catch_up(prepared: Prepared, run_id: str, result: Result, mlflow: Patience) -> None:
    """Tell what a trial that ended while MLflow was away could not tell, and note what could not be asked then."""
    folder, store = prepared.folder.child(record.TRIALS, result.trial.key), prepared.store
    if was_away := folder.exists(UNTOLD):
        tracker = MlflowTracker(store.uri, run_id)
        tracker.restore(json.loads(folder.read_bytes(UNTOLD)))
        if not mlflow.close(tracker):
            log.warning("%s: MLflow refuses what could not be told in time", result.trial.name)
        folder.delete(UNTOLD)
    if was_away or result.run_id is None:
        if result.status == "failed" and folder.exists(record.ERROR):
            text = folder.read_bytes(record.ERROR).decode()
            mlflow.call(partial(mlflow_runs.keep_text, store, run_id, record.ERROR, text))
        rate = mlflow.call(partial(mlflow_runs.points, store, run_id, IMAGES_PER_SECOND))
        seconds = training_seconds(rate, prepared.space.run_config(result.trial).optim.global_batch)
        folder.write_bytes(record.RESULT, replace(result, run_id=run_id, seconds=seconds).dump())


def finish(prepared: Prepared, run_id: str, away_seconds: float = AWAY_SECONDS) -> dict[str, Result]:
    """Say in MLflow what the sweep found and how it ended; its results.

    Args:
        prepared: whose lease is held.
        run_id: of the sweep's run in MLflow.
        away_seconds: an MLflow that is away is waited for for so long at a stretch.

    Raises:
        TrackingError: MLflow is away for longer.
    """
    mlflow = Patience(prepared.store.uri, away_seconds)
    write_report(prepared, None, record.results(prepared.folder), mlflow)  # there is one, whatever comes of MLflow
    close_children(prepared, run_id, mlflow)
    results = record.results(prepared.folder)
    write_report(prepared, run_id, results, mlflow)
    ended = Counter(result.status for result in results.values())
    prepared.folder.write_bytes(record.FINISHED, json.dumps(ended, indent=1).encode())
    end = ("FINISHED",) if ended["finished"] else ("FAILED", "no trial of it finished")
    mlflow.call(partial(mlflow_runs.close_run, prepared.store, run_id, *end))
    return results


def write_report(prepared: Prepared, run_id: str | None, results: Mapping[str, Result], mlflow: Patience) -> str:
    """The report of what has ended so far, in the sweep's folder and in its MLflow run; where the page is.

    Raises:
        TrackingError: MLflow is away.
    """

    def painted(key: str) -> Mapping[str, Any] | None:
        return record.painted(prepared.folder.child(record.TRIALS, key))

    made = report.build(prepared.config, prepared.space.base, results, painted)
    report.write(made, prepared.folder)
    if run_id is not None:
        best = next(iter(ranked(prepared.config, results)), None)
        ended = Counter(result.status for result in results.values())
        metrics = {f"sweep/{status}": float(number) for status, number in ended.items()}
        if best is not None and best.mean is not None:
            metrics[f"sweep/best_{prepared.config.objective.metric.replace('/', '_')}"] = best.mean
        files = {report.PAGE: made.html.encode(), **{f"{name}.png": png for name, png in made.figures.items()}}
        add = partial(mlflow_runs.add_evaluation, prepared.store, run_id)
        mlflow.call(partial(add, record.REPORT, metrics, len(results), files))
    return prepared.folder.join(record.REPORT, report.PAGE)


def report_of(config: SweepConfig) -> str:
    """Where the report of the last sweep of a name is, made anew; nothing else is touched.

    Raises:
        ConfigError: there is none.
        TrackingError: MLflow is away.
    """
    space = Space(config)
    root = Storage(space.base.storage.path)
    number = _last_number(root, config.name)
    if not number:
        raise ConfigError("there is no sweep of this name", key="name", found=config.name, allowed="a begun one")
    folder = _folder(root, config.name, number)
    begun_as = load_text(
        SweepConfig, folder.read_bytes(record.SWEEP_YAML).decode(), folder.join(record.SWEEP_YAML)
    ).model_copy(update={"confidence": config.confidence})
    # MLflow as it is given now: what is on record has no password.
    prepared = _prepared(begun_as, Space(begun_as), (), number, {}, space.base.tracking)
    run_id = mlflow_runs.find_run(prepared.store, _fingerprint(prepared.folder))
    return write_report(prepared, run_id, record.results(prepared.folder), Patience(prepared.store.uri))


def has_failed(config: SweepConfig, results: Mapping[str, Result]) -> bool:
    """Whether the sweep's exit code is that of a failure."""
    statuses = {result.status for result in results.values()}
    return "finished" not in statuses or (config.trials.fail_if == "any_failed" and "failed" in statuses)


def _measured(folder: Storage) -> dict[str, float]:
    try:
        return dict(json.loads(folder.read_bytes(CALIBRATION)))
    except FileNotFoundError:
        return {}


def _trials(space: Space) -> tuple[Trial, ...]:
    found = [space.trial(point, seed) for point in space.sample() for seed in _seeds(space.config)]
    refuse_equal_points(found)
    if not space.unmeasured():
        refuse_idle_rungs(space.config.stopping, found)
    return tuple({trial.key: trial for trial in found}.values())


def _seeds(config: SweepConfig) -> Sequence[int]:
    return config.seeds[:1] if config.search.kind == "optuna" else config.seeds


def _folder(root: Storage, name: str, number: int) -> Storage:
    return root.child(record.SWEEPS, f"{name}-{number}")


def _last_number(root: Storage, name: str) -> int:
    """Of the sweeps of a name; 0: there is none."""
    sweeps = root.child(record.SWEEPS)
    numbered = (re.fullmatch(rf"{re.escape(name)}-(\d+)", each) for each in sweeps.list_names())
    return max((int(match[1]) for match in numbered if match), default=0)


def _refuse_unless_resumed(folder: Storage, space: Space, *, resume: bool) -> None:
    name = folder.uri.rpartition("/")[2]
    if not resume:
        ended = folder.exists(record.FINISHED)
        raise ConfigError(
            f"there is a sweep of this name, which {'has ended' if ended else 'was begun and has not ended'}",
            key="name",
            found=folder.uri,
            fix=f"--resume {'tries its failed trials again' if ended else 'goes on with it'}; --new begins another",
        )
    lease.refuse_if_held(folder, name, SWEEP)
    try:
        text = folder.read_bytes(record.SWEEP_YAML).decode()
    except FileNotFoundError:  # killed before its first trial
        return
    before = load_text(SweepConfig, text, folder.join(record.SWEEP_YAML))
    then, now = map(_meaning, (before, space.config))
    if changed := [key for key in {**then, **now} if then.get(key) != now.get(key)]:
        raise ConfigError(
            f"the sweep was begun with other values: {', '.join(changed)}",
            key=changed[0],
            found=now.get(changed[0], "nothing"),
            allowed=then.get(changed[0], "nothing"),
            fix="take those of its sweep.yaml, or begin another with --new",
        )
    dataset, version = folder.read_bytes(record.DATASET).decode(), space.dataset.manifest.fingerprint
    if dataset != version:
        raise ConfigError(
            "the sweep was begun on another version of the dataset: images were added to it",
            key="data.version",
            found=version,
            allowed=dataset,
            fix=f"--set overrides.data.version={dataset}, or begin another sweep with --new",
        )


def _meaning(config: SweepConfig) -> dict[str, str]:
    """Dotted keys and values of a sweep that say what is learned in it: the others may change when it goes on."""
    may_change = [f"{key}." for key, is_operational in dotted_keys(RunConfig) if is_operational and key not in _JUDGED]

    def counts(key: str) -> bool:
        section, _, rest = key.partition(".")
        if section not in ("base", "overrides"):
            return True
        # Where there is no rest the section is empty.
        return bool(rest) and not f"{rest}.".startswith(tuple(may_change))

    return {key: value for key, value in mlflow_runs.flatten(identity(config)).items() if counts(key)}


def _fingerprint(folder: Storage) -> str:
    """Of a sweep's run in MLflow."""
    return fingerprint({"sweep": folder.uri})


def _card_of_trial(prepared: Prepared, parent: str, trial: Trial) -> RunCard:
    config, dataset = prepared.space.run_config(trial), prepared.space.dataset
    folder = prepared.folder.child(record.TRIALS, trial.key)
    place = (Storage(config.storage.path), folder, prepared.store, prepared.code)
    alone = launch.card(launch.Prepared(config, plan_of(config, dataset), dataset, *place))
    return mlflow_runs.child_card(alone, parent, trial.key, trial.name, prepared.folder.uri)


def _card(prepared: Prepared) -> RunCard:
    config, dataset = prepared.config, prepared.space.dataset
    place = dataset.storage.uri
    axes = ", ".join(f"`{key}`" for key in config.space)
    return RunCard(
        name=prepared.name,
        fingerprint=_fingerprint(prepared.folder),
        params={**_meaning(config), mlflow_runs.DATASET_PARAM: dataset.manifest.fingerprint},
        tags={**prepared.code, "maskray.storage": prepared.folder.uri, launch.HOST_TAG: socket.gethostname()},
        config_yaml=dump(config),
        dataset=DatasetCard(Path(place).name, place, dataset.manifest.fingerprint, dataset.num_rows()),
        source="maskray sweep",
        description=f"Sweep over {axes}, judged by {config.objective.metric}: {prepared.num_trials} trials.",
        page=("Report", f"{record.REPORT}/{report.PAGE}"),
    )
