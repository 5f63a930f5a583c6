"""`maskray repair`: what is wrong in a run's folder, why, and what is done about it.

A launch mends what its own kill can leave. This is for the rest: folders that were deleted, copied or damaged by hand
or by a disk, records that contradict them, and what a launch that nobody gives again has left open. No checkpoint that
was finished is ever deleted here.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from maskray.config.load import load_text
from maskray.config.resolve import resolve
from maskray.config.schema import RunConfig, TrackingConfig
from maskray.data import lease
from maskray.data.places import with_absolute_paths
from maskray.data.shards import Dataset
from maskray.data.storage import TEMPORARY, Storage
from maskray.errors import CheckpointError, ConfigError, MaskrayError, StorageError, TrackingError
from maskray.launch import DATASET, FINISHED, HOST_TAG, LAUNCHER, Summary
from maskray.models.foreign import weights_digest
from maskray.on_ray import record
from maskray.on_ray.stream import SNAPSHOT
from maskray.sweeps import record as sweeps
from maskray.tracking import mlflow_runs, mlflow_store
from maskray.tracking.mlflow_store import Store
from maskray.training import checkpoint, rewinds

LAUNCHERS = ("ray", "torch")
_OF_BARE_TORCH, _PARTIAL = "-local", ".partial"
_ON_A_BAD_STEP = "it has trained on a step that the run has since gone back from"
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
        MaskrayError: as `launch.prepare`, of config and dataset.
    """
    config = with_absolute_paths(config)
    dataset = Dataset.open(config.data.path, config.data.version, unreadable=config.data.unreadable)
    plan = resolve(config, dataset.facts(), weights_digest(config.init_from))
    return config, Storage(config.storage.path).child(plan.run_name)


def repair(case: Case) -> Iterator[Finding]:
    """Each thing that is wrong, after it was mended; the run's lease is held meanwhile, but in a dry run.

    Raises:
        ConfigError: it is no folder of a run, or one that the launcher asked for cannot go on with; trials of a sweep
            and evaluations are none.
        RunConflictError: a launch has the run.
        StorageError: the folder cannot be read or written.
    """
    _refuse_other_folders(case)
    lease.refuse_if_held(case.run, case.name, at_once=False)
    yield from _lease(case)
    with nullcontext() if case.dry_run else lease.hold(case.run, case.name):
        yield from _temporary(case)
        yield from _checkpoints(case)
        launcher, findings = _launcher(case)
        yield from findings
        yield from _record_of_torch(case) if launcher == "torch" else _record(case)
        if case.config is None and case.newest is not None:
            case.config = _config_of(case.folder(case.newest))
        yield from _dataset(case)
        yield from _rewinds(case)
        yield from _finished(case)
        yield from _mlflow(case)


def _refuse_other_folders(case: Case) -> None:
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


def _lease(case: Case) -> Iterator[Finding]:
    if not case.run.exists(lease.LEASE):
        return
    holder = lease.holder_of(case.run)
    why = "it cannot be read" if holder is None else f"process {holder.pid} on {holder.host}, which had it, is gone"
    yield Finding(State.MENDED, lease.LEASE, why, "removed: the run is free")


def _temporary(case: Case) -> Iterator[Finding]:
    places = ["", *(f"{name}/" for name in record.folders_of(case.run))]
    found = [f"{place}{n}" for place in places for n in case.run.list_names(place) if n.startswith(TEMPORARY)]
    for name in found:
        case.delete(name)
    if found:
        others = f" and {len(found) - 1} more" * (len(found) > 1)
        yield Finding(State.MENDED, found[0] + others, "a launch was killed while it wrote this", "removed")


# --------------------------------------------------------------------------------------------------------- checkpoints


def _checkpoints(case: Case) -> Iterator[Finding]:
    """All files of all checkpoints are read: a launch reads but those that it goes on from."""
    case.folders = record.folders_of(case.run)
    wrong = {name: record.flaws(case.run.child(name)) for name in case.folders}
    yield from _without_a_name(case, wrong)
    case.whole = sorted(name for name, flaws in wrong.items() if not flaws)
    listed = record.ever_listed(case.run)
    for name, flaws in ((name, flaws) for name, flaws in wrong.items() if flaws):
        why = "; ".join(flaws)
        if not case.whole:
            yield Finding(State.LEFT, name, why, "kept: there is no checkpoint that is whole")
        elif _may_have_been_finished(case, name, listed):
            yield Finding(State.NOTED, name, why, "left out; a later launch removes it, so copy it now if you want it")
        else:
            case.delete(name)
            yield Finding(State.MENDED, name, why, "removed: it never was a checkpoint")


def _without_a_name(case: Case, wrong: dict[str, list[str]]) -> Iterator[Finding]:
    """Bare torch names a folder once it is full, and goes on from none that has no name yet."""
    left_out = _left_out(case)
    for name in [each for each, flaws in wrong.items() if each.endswith(_PARTIAL) and not flaws and case.run.is_local]:
        named, why = name.removesuffix(_PARTIAL), "bare torch was killed before it named this, which is whole"
        is_there = wrong.get(named) == []
        if is_there or record.has_trained_on(case.run.child(name), left_out):
            case.delete(name)
            yield Finding(
                State.MENDED, name, f"{why}; but {'there is another' if is_there else _ON_A_BAD_STEP}", "removed"
            )
        else:
            case.rename(name, named)
            wrong[named] = []
            yield Finding(State.MENDED, name, why, f"renamed to {named}")
        del wrong[name]


def _may_have_been_finished(case: Case, name: str, listed: list[str] | None) -> bool:
    """`state.json` is written last, and may be lost all the same: who put a folder on record had seen all of it."""
    if case.run.exists(f"{name}/{checkpoint.STATE}"):
        return True
    if _is_of_torch(name):  # which names a folder once it is full
        return not name.endswith(_PARTIAL)
    return listed is None or name in listed  # without a record nobody knows


def _launcher(case: Case) -> tuple[str, list[Finding]]:
    """Who the run goes on with."""
    try:
        said = case.run.read_bytes(LAUNCHER).decode(errors="replace").strip()
    except FileNotFoundError:
        said = ""
    of_ray = case.run.exists(SNAPSHOT) or any(not _is_of_torch(name) for name in case.folders)
    wrote = "ray" if of_ray or not case.folders else "torch"
    wanted = case.launcher or (said if said in LAUNCHERS else wrote)
    if said == wanted or not (said or case.folders or case.launcher):
        return wanted, []
    case.write(LAUNCHER, wanted.encode())
    why = f"it says {said[:40]!r}" if said else "it is missing"
    done = "as was asked for" if case.launcher else "who wrote the checkpoints"
    return wanted, [Finding(State.MENDED, LAUNCHER, why, f"written anew: {wanted}, {done}")]


def _is_of_torch(name: str) -> bool:
    return name.removesuffix(_PARTIAL).endswith(_OF_BARE_TORCH)


def _record_of_torch(case: Case) -> Iterator[Finding]:
    """Bare torch goes by the folders."""
    if case.run.exists(SNAPSHOT):
        case.delete(SNAPSHOT)
        yield Finding(
            State.MENDED, SNAPSHOT, "bare torch does not keep Ray's record: it grows old", f"removed; {_from(case)}"
        )


def _record(case: Case) -> Iterator[Finding]:
    is_lost = bool(case.folders) and not case.whole
    yield from _of_bad_steps(case)
    try:
        found = record.read(case.run)
        why = _contradiction(case, found)
    except StorageError:  # a ValueError too; the record may be sound
        raise
    except ValueError as error:
        why = " ".join(str(error).split())[:200]
    if not why:
        return
    if is_lost:
        again = f"restore a checkpoint from a copy, or delete {case.run.uri} to begin anew"
        yield Finding(State.LEFT, SNAPSHOT, f"{why}; and no checkpoint is whole", again)
        return
    if not case.dry_run:
        record.make_again(case.run, case.whole)
    yield Finding(State.MENDED, SNAPSHOT, why, f"made again from what is whole; {_from(case)}")


def _of_bad_steps(case: Case) -> Iterator[Finding]:
    left_out = _left_out(case)
    for name in [each for each in case.whole if record.has_trained_on(case.folder(each), left_out)]:
        case.whole.remove(name)
        yield Finding(State.NOTED, name, _ON_A_BAD_STEP, "left out; a later launch removes it")


def _left_out(case: Case) -> set[int]:
    try:
        return record.steps_left_out(case.run)
    except CheckpointError:  # `_rewinds` tells of it
        return set()


def _contradiction(case: Case, found: record.Record | None) -> str:
    """What the folders say against the record; nothing where they do not."""
    if found is None:
        return "there is none" if case.whole else ""
    if damaged := sorted(set(found.names) - set(case.whole)):
        return f"it lists what is not whole: {', '.join(damaged)}"
    newer = [name for name in case.whole if record.is_newer(name, found)]
    return f"it does not know of {', '.join(newer)}, newer and whole" if newer else ""


def _from(case: Case) -> str:
    return f"the run goes on from {case.newest}" if case.newest else "no checkpoint is left, and the run begins anew"


# ------------------------------------------------------------------------------------------------- what is beside them


def _config_of(folder: Storage) -> RunConfig | None:
    """The config that a checkpoint was made under; None where this version of maskray does not find or read it."""
    try:
        return load_text(RunConfig, folder.read_bytes(checkpoint.CONFIG).decode(), folder.uri)
    except (ConfigError, UnicodeDecodeError, FileNotFoundError):
        return None


def _dataset(case: Case) -> Iterator[Finding]:
    version = None if case.config is None else case.config.data.version
    if version is None or case.newest is None:
        return
    try:
        said = case.run.read_bytes(DATASET).decode(errors="replace")
    except FileNotFoundError:
        said = ""
    if said != version:
        case.write(DATASET, version.encode())
        why = "it names another version of the dataset" if said else "it is missing or empty"
        needs = f"written anew: {version[:12]}, so that `maskray data gc` keeps what the run reads"
        yield Finding(State.MENDED, DATASET, why, needs)


def _rewinds(case: Case) -> Iterator[Finding]:
    try:
        rewinds.read(case.run)
    except CheckpointError as error:
        skipped = _skipped(case.folder(case.newest)) if case.newest else []
        told = f"delete it and give the run --set training.skip_steps={json.dumps(skipped, separators=(',', ':'))}"
        yield Finding(State.LEFT, rewinds.REWINDS, f"it cannot be read: {error.found}", f"restore it, or {told}")


def _skipped(folder: Storage) -> Sequence[int]:
    with checkpoint.on_disk(folder) as local:
        return checkpoint.read_facts(local).skipped


def _finished(case: Case) -> Iterator[Finding]:
    try:
        content = case.run.read_bytes(FINISHED)
    except FileNotFoundError:
        return
    case.is_finished = True
    try:
        Summary.load(content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"it cannot be read: {error!r}"
        if _has_another_version(content):
            yield Finding(State.NOTED, FINISHED, why, "kept: the run is finished")
        elif case.newest is None:
            yield Finding(State.LEFT, FINISHED, why, "kept: without a checkpoint the run would begin anew")
        else:
            case.delete(FINISHED)
            case.is_finished = False
            again = f"removed: the next launch judges and registers again what is there, and {_from(case)}"
            yield Finding(State.MENDED, FINISHED, why, again)


def _has_another_version(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content)["schema_version"], int)
    except (ValueError, LookupError, TypeError):
        return False


# -------------------------------------------------------------------------------------------------------------- MLflow


def _mlflow(case: Case) -> Iterator[Finding]:
    """MLflow's run says RUNNING, and nobody runs it: the lease is ours."""
    try:
        store = _store(case)
        running = [] if store is None else mlflow_runs.running(store)
    except MaskrayError as error:
        where = "--config run.yaml, with tracking.uri" if case.config is None else "mend that, and repair again"
        yield Finding(State.LEFT, "MLflow", f"not asked: {error.problem} ({error.found})", where)
        return
    for run in (each for each in running if each.data.tags.get("maskray.storage") == case.run.uri):
        host = run.data.tags.get(HOST_TAG)
        if case.run.is_local and host != socket.gethostname():
            why = f"run {run.info.run_id} says RUNNING; it was launched on {host}, whose folder this may not be"
            yield Finding(State.LEFT, "MLflow", why, "repair it there, or launch it: a launch takes it over")
            continue
        status: mlflow_runs.Ended = "FINISHED" if case.is_finished else "KILLED"
        if store is not None and not case.dry_run:
            message = "" if status == "FINISHED" else "its launch ended without a word"
            mlflow_runs.close_run(store, run.info.run_id, status, message)
        why = f"run {run.info.run_id} says RUNNING, and nobody runs it"
        yield Finding(State.MENDED, "MLflow", why, f"closed: {status}; a launch opens it again")


def _store(case: Case) -> Store | None:
    """The experiment that has the run; None where there is none."""
    tracking = TrackingConfig() if case.config is None else case.config.tracking
    if tracking.uri is None and not mlflow_store.has_embedded_store(case.root.uri):
        return None
    if tracking.uri is not None and re.search(r"//\*\*\*@", tracking.uri):
        raise TrackingError("its password is not kept with the run", key="tracking.uri", found=tracking.uri)
    return mlflow_store.look(tracking, case.root.uri).store
