"""A sweep from its first trial on, whoever runs them: lease, MLflow's parent run and its children, the report."""

from __future__ import annotations

import json
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from maskray import launch
from maskray.config.load import dump, fingerprint, load_text
from maskray.config.sweep import SweepConfig
from maskray.data import lease
from maskray.data.storage import Storage
from maskray.errors import ConfigError, MaskrayError
from maskray.preparing import Prepared as PreparedRun
from maskray.publish.release import training_seconds
from maskray.sweeping.preparing import SWEEP, Prepared, assembled, folder_of, last_number, meaning
from maskray.sweeps import record, report
from maskray.sweeps.ranking import ranked
from maskray.sweeps.record import Result, Trial
from maskray.sweeps.space import Space, plan_of
from maskray.tracking import mlflow_runs
from maskray.tracking.mlflow_runs import Child, DatasetCard, RunCard
from maskray.tracking.mlflow_tracker import UNTOLD, MlflowTracker
from maskray.tracking.patience import AWAY_SECONDS, Patience
from maskray.training.throughput import IMAGES_PER_SECOND

log = logging.getLogger(__name__)

_CLOSED = ("FINISHED", "FAILED", "KILLED")


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
    number = last_number(root, config.name)
    if not number:
        raise ConfigError("there is no sweep of this name", key="name", found=config.name, allowed="a begun one")
    folder = folder_of(root, config.name, number)
    begun_as = load_text(
        SweepConfig, folder.read_bytes(record.SWEEP_YAML).decode(), folder.join(record.SWEEP_YAML)
    ).model_copy(update={"confidence": config.confidence})
    # MLflow as it is given now: what is on record has no password.
    prepared = assembled(begun_as, Space(begun_as), (), number, {}, space.base.tracking)
    run_id = mlflow_runs.find_run(prepared.store, _fingerprint(prepared.folder))
    return write_report(prepared, run_id, record.results(prepared.folder), Patience(prepared.store.uri))


def has_failed(config: SweepConfig, results: Mapping[str, Result]) -> bool:
    """Whether the sweep's exit code is that of a failure."""
    statuses = {result.status for result in results.values()}
    return "finished" not in statuses or (config.trials.fail_if == "any_failed" and "failed" in statuses)


def _fingerprint(folder: Storage) -> str:
    """Of a sweep's run in MLflow."""
    return fingerprint({"sweep": folder.uri})


def _card_of_trial(prepared: Prepared, parent: str, trial: Trial) -> RunCard:
    config, dataset = prepared.space.run_config(trial), prepared.space.dataset
    folder = prepared.folder.child(record.TRIALS, trial.key)
    place = (Storage(config.storage.path), folder, prepared.store, prepared.code)
    alone = launch.card(PreparedRun(config, plan_of(config, dataset), dataset, *place))
    return mlflow_runs.child_card(alone, parent, trial.key, trial.name, prepared.folder.uri)


def _card(prepared: Prepared) -> RunCard:
    config, dataset = prepared.config, prepared.space.dataset
    place = dataset.storage.uri
    axes = ", ".join(f"`{key}`" for key in config.space)
    return RunCard(
        name=prepared.name,
        fingerprint=_fingerprint(prepared.folder),
        params={**meaning(config), mlflow_runs.DATASET_PARAM: dataset.manifest.fingerprint},
        tags={**prepared.code, "maskray.storage": prepared.folder.uri, launch.HOST_TAG: socket.gethostname()},
        config_yaml=dump(config),
        dataset=DatasetCard(Path(place).name, place, dataset.manifest.fingerprint, dataset.num_rows()),
        source="maskray sweep",
        description=f"Sweep over {axes}, judged by {config.objective.metric}: {prepared.num_trials} trials.",
        page=("Report", f"{record.REPORT}/{report.PAGE}"),
    )
