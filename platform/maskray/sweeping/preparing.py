"""A sweep before its first trial: all that can be checked is checked, whoever runs it then."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maskray.calibration import seconds_per_step
from maskray.config.load import dotted_keys, identity, load_text
from maskray.config.schema import RunConfig, TrackingConfig
from maskray.config.sweep import SweepConfig
from maskray.data import lease
from maskray.data.lease import Kind
from maskray.data.storage import Storage
from maskray.errors import ConfigError
from maskray.offering import promotion_of
from maskray.sweeps import record
from maskray.sweeps.record import Result, Trial
from maskray.sweeps.search import Queue, open_queue
from maskray.sweeps.space import Space, name_of, point_key, refuse_equal_points
from maskray.sweeps.stopping import refuse_idle_rungs
from maskray.tracking import mlflow_runs
from maskray.tracking.mlflow_store import Store, open_store

log = logging.getLogger(__name__)

CALIBRATION = "calibration.json"
"""Seconds that a step of each point took, before the first trial."""
_JUDGED = {
    "init_from",
    *(f"probe.{key}" for key in ("k", "temperature", "labels_per_class", "draws", "max_rows")),
}
"""Operational keys of a run that say what its trials begin with, and what they are worth."""
SWEEP = Kind("the sweep", "name", "wait for it, or stop it")


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
    number = last_number(root, config.name)
    if number and not new:
        _refuse_unless_resumed(folder_of(root, config.name, number), space, resume=resume)
    number = number + 1 if new or not number else number
    folder = folder_of(root, config.name, number)
    if space.unmeasured() and (measured := _measured(folder)):
        space = Space(config, measured)
        trials = _trials(space)
    code = mlflow_runs.provenance(Path(__file__).parent, commit)
    return assembled(config, space, trials, number, code, space.base.tracking)


def assembled(
    config: SweepConfig,
    space: Space,
    trials: tuple[Trial, ...],
    number: int,
    code: Mapping[str, str],
    tracking: TrackingConfig,
) -> Prepared:
    """What is known of a sweep, in one."""
    root = Storage(space.base.storage.path)
    folder = folder_of(root, config.name, number)
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


def folder_of(root: Storage, name: str, number: int) -> Storage:
    """Of a sweep, below where runs are kept."""
    return root.child(record.SWEEPS, f"{name}-{number}")


def last_number(root: Storage, name: str) -> int:
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
    then, now = map(meaning, (before, space.config))
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


def meaning(config: SweepConfig) -> dict[str, str]:
    """Dotted keys and values of a sweep that say what is learned in it: the others may change when it goes on."""
    may_change = [f"{key}." for key, is_operational in dotted_keys(RunConfig) if is_operational and key not in _JUDGED]

    def counts(key: str) -> bool:
        section, _, rest = key.partition(".")
        if section not in ("base", "overrides"):
            return True
        # Where there is no rest the section is empty.
        return bool(rest) and not f"{rest}.".startswith(tuple(may_change))

    return {key: value for key, value in mlflow_runs.flatten(identity(config)).items() if counts(key)}
