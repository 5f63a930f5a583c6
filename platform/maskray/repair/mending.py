"""All that is wrong with a run's folder, in the order in which it is mended."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from maskray.config.load import load_text
from maskray.config.schema import RunConfig, TrackingConfig
from maskray.data import lease
from maskray.data.storage import TEMPORARY, Storage
from maskray.errors import CheckpointError, ConfigError, MaskrayError, TrackingError
from maskray.launch import HOST_TAG, Summary
from maskray.on_ray import record
from maskray.preparing import DATASET, FINISHED
from maskray.repair.case import Case, Finding, State, refuse_other_folders
from maskray.repair.checkpoints import checkpoints, launcher, record_of_ray, record_of_torch
from maskray.tracking import mlflow_runs, mlflow_store
from maskray.tracking.mlflow_store import Store
from maskray.training import checkpoint, rewinds


def repair(case: Case) -> Iterator[Finding]:
    """Each thing that is wrong, after it was mended; the run's lease is held meanwhile, but in a dry run.

    Raises:
        ConfigError: it is no folder of a run, or one that the launcher asked for cannot go on with; trials of a sweep
            and evaluations are none.
        RunConflictError: a launch has the run.
        StorageError: the folder cannot be read or written.
    """
    refuse_other_folders(case)
    lease.refuse_if_held(case.run, case.name, at_once=False)
    yield from _lease(case)
    with nullcontext() if case.dry_run else lease.hold(case.run, case.name):
        yield from _temporary(case)
        yield from checkpoints(case)
        goes_on_with, findings = launcher(case)
        yield from findings
        yield from record_of_torch(case) if goes_on_with == "torch" else record_of_ray(case)
        if case.config is None and case.newest is not None:
            case.config = _config_of(case.folder(case.newest))
        yield from _dataset(case)
        yield from _rewinds(case)
        yield from _finished(case)
        yield from _mlflow(case)


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
            again = f"removed: the next launch judges and registers again what is there, and {case.goes_on}"
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
