"""A run's folder, and what has been found of it so far; what is no folder of a run is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from maskray.config.resolve import resolve
from maskray.config.schema import RunConfig
from maskray.data.places import with_absolute_paths
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import ConfigError, StorageError
from maskray.launch import LAUNCHER
from maskray.models.foreign import weights_digest
from maskray.on_ray import record
from maskray.on_ray.stream import SNAPSHOT
from maskray.preparing import DATASET, FINISHED
from maskray.sweeps import record as sweeps
from maskray.training import checkpoint

_BEGINS_ANEW = "no checkpoint is left, and the run begins anew"
_MARKS = (LAUNCHER, DATASET, FINISHED, SNAPSHOT)


class State(StrEnum):
    """What has become of something that is wrong."""

    NOTED = "noted"
    """Nothing: it only wants to be known."""
    MENDED = "mended"
    """Or would be, in a dry run."""
    LEFT = "left"
    """For whoever reads this."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: State
    what: str
    """A file or folder of the run, or MLflow."""
    why: str
    """What is wrong with it."""
    done: str
    """What was done, or what to do."""


@dataclass
class Case:
    """A run's folder, and what has been found of it so far."""

    run: Storage
    config: RunConfig | None = None
    """None: that of its newest whole checkpoint is taken, where there is one."""
    dry_run: bool = False
    launcher: str | None = None
    """That the run is to go on with; None: with its own."""
    folders: list[str] = field(default_factory=list)
    """Of checkpoints, the oldest first."""
    whole: list[str] = field(default_factory=list)
    """Of these, those that are whole."""
    unnamed: dict[str, str] = field(default_factory=dict)
    """In a dry run: what a folder would be renamed to, and the name that it has."""
    is_finished: bool = False

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.address[0].rstrip("/").rpartition("/")[2]

    @property
    def root(self) -> Storage:
        """Where it is kept beside others."""
        base, options = self.run.address
        return Storage(base.rstrip("/").rpartition("/")[0] + options)

    @property
    def newest(self) -> str | None:
        """The newest whole checkpoint."""
        return self.whole[-1] if self.whole else None

    def folder(self, name: str) -> Storage:
        """Of a checkpoint."""
        return self.run.child(self.unnamed.get(name, name))

    @property
    def goes_on(self) -> str:
        """What comes next, in words."""
        return f"the run goes on from {self.newest}" if self.newest else _BEGINS_ANEW

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run, if this is no dry run."""
        if not self.dry_run:
            self.run.write_bytes(name, content)

    def delete(self, name: str) -> None:
        """Delete a file or folder of the run, if this is no dry run."""
        if not self.dry_run:
            self.run.delete(name)

    def rename(self, name: str, new: str) -> None:
        """Rename a checkpoint's folder, on a local disk, over what is there; if this is no dry run."""
        self.folders = sorted({*self.folders, new} - {name})
        if self.dry_run:
            self.unnamed[new] = name
            return
        self.run.delete(new)
        try:
            Path(self.run.join(name)).rename(self.run.join(new))
        except OSError as error:
            raise StorageError(f"cannot rename {self.run.join(name)}", found=str(error)) from error


def run_of(config: RunConfig) -> tuple[RunConfig, Storage]:
    """A config with absolute paths, and the folder of its run.

    Raises:
        MaskrayError: as `preparing.prepare`, of config and dataset.
    """
    config = with_absolute_paths(config)
    dataset = Dataset.open(config.data.path, config.data.version, unreadable=config.data.unreadable)
    plan = resolve(config, dataset.facts(), weights_digest(config.init_from))
    return config, Storage(config.storage.path).child(plan.run_name)


def refuse_other_folders(case: Case) -> None:
    """Before anything is changed.

    Raises:
        ConfigError: it is no folder of a run, or one that the launcher asked for cannot go on with; trials of a sweep
            and evaluations are none.
        StorageError: it cannot be read.
    """
    if case.launcher == "torch" and not case.run.is_local:
        raise ConfigError("bare torch writes to a local folder", key="--launcher", found=f"torch, for {case.run.uri}")
    names = case.run.list_names()
    if sweeps.SWEEP_YAML in names or _is_a_trial(case):
        raise ConfigError(
            "this belongs to a sweep, which mends its trials itself",
            key="RUN_FOLDER",
            found=case.run.uri,
            allowed="the folder of a run",
            fix="give the sweep's command again: maskray sweep --config sweep.yaml --resume; a trial whose folder "
            "below `trials` was deleted begins anew",
        )
    if _is_an_evaluation(case):
        raise ConfigError(
            "this is the folder of an evaluation, and no run's",
            key="RUN_FOLDER",
            found=case.run.uri,
            allowed="the folder of a run",
            fix="give its command again, as maskray evaluate --config evaluation.yaml: it goes on from what is there, "
            "or begins anew where the folder was deleted",
        )
    if not any(mark in names for mark in _MARKS) and not record.folders_of(case.run):
        raise ConfigError(
            "this is no folder of a run",
            key="RUN_FOLDER",
            found=f"{case.run.uri}, {'which has nothing of one' if names else 'where nothing is'}",
            allowed="the folder below storage.path that is named after the run",
            fix="name that folder, or the run's config: --config run.yaml",
        )


def _is_a_trial(case: Case) -> bool:
    base, options = case.run.address
    above, _, below = base.rstrip("/").rpartition(f"/{sweeps.TRIALS}/")
    return bool(above) and "/" not in below and Storage(above + options).exists(sweeps.SWEEP_YAML)


def _is_an_evaluation(case: Case) -> bool:
    """As the newest checkpoint has it that says anything: those of a run are of no kind."""
    for name in reversed(record.folders_of(case.run)):
        try:
            return checkpoint.KIND in json.loads(case.run.read_bytes(f"{name}/{checkpoint.STATE}"))
        except StorageError:
            raise
        except (FileNotFoundError, ValueError, TypeError):  # one that was not finished, or is damaged
            continue
    return False
