"""Train's record of a run's checkpoints: the only word on what a run goes on from, and what to do when it is torn.

Ray writes `checkpoint_manager_snapshot.json` with a plain stream: a launch that is killed in the middle leaves it empty
or cut short. The folders say of themselves whether they are whole, so the record can be made again from them.
"""

from __future__ import annotations

import json
import logging
import re
from typing import NamedTuple

from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState as State,
)
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _TrainingResultState as Result,
)

from maskray.data.storage import Storage
from maskray.errors import CheckpointError, StorageError
from maskray.on_ray.stream import SNAPSHOT
from maskray.training import checkpoint
from maskray.training.folders import FOLDER_PREFIX, SCORE, score_of, step_of

log = logging.getLogger(__name__)

_NAME = re.compile(rf"{FOLDER_PREFIX}\d+-\w+(\.partial)?")


class Record(NamedTuple):
    """What Train has on record."""

    names: list[str]
    """Of the checkpoints' folders, the worst first."""
    newest: str | None
    """Of them: what the run goes on from."""


def settle(run: Storage) -> None:
    """Before Train starts: a record that it can read, and no folder that is not in it.

    Folders are deleted by a record that was read, never for want of one, nor by one whose newest checkpoint is damaged
    while another may not be.

    Raises:
        CheckpointError: the record is torn, and none of the checkpoints is whole.
    """
    folders = folders_of(run)
    try:
        found = read(run)
        if found is None:  # none was ever registered: a launch was killed before, or they are those of bare torch
            listed = make_again(run, _whole(run, folders))
        else:
            listed = found.names
            _refuse_for_a_better_one(run, found, folders)
    except ValueError as error:
        whole = _whole(run, folders)
        if folders and not whole:
            raise _nothing_left(run, str(error)) from error
        listed = make_again(run, whole)
    for name in folders:
        if name not in listed:
            log.info("Removing %s, which was not finished", name)
            run.delete(name)


def folders_of(run: Storage) -> list[str]:
    """Names of the checkpoints' folders, whole or not, the oldest first. What else is there is not Train's."""
    return [name for name in run.list_names() if _NAME.fullmatch(name)]


def read(run: Storage) -> Record | None:
    """The record; None where there is none.

    Raises:
        ValueError: Train would refuse it.
    """
    try:
        content = run.read_bytes(SNAPSHOT)
    except FileNotFoundError:
        return None
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise ValueError(f"it is cut short: {error}" if content else "it is empty") from error
    try:
        state = State.model_validate(raw)
    except ValueError as error:
        raise ValueError(f"this version of Ray writes it otherwise: {_in_a_line(error)}") from error
    names = [result.checkpoint_dir_name for result in state.checkpoint_results]
    newest = state.latest_checkpoint_result and state.latest_checkpoint_result.checkpoint_dir_name
    if missing := set(names) - set(folders_of(run)):
        raise ValueError(f"it lists folders that are not there: {', '.join(sorted(missing))}")
    if newest is not None and newest not in names:
        raise ValueError(f"its newest checkpoint, {newest}, is not in its list")
    return Record(names, newest)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _refuse_for_a_better_one(run: Storage, found: Record, folders: list[str]) -> None:
    """Only where there is another that was finished are files read: those of a checkpoint may be many GB."""
    others = [name for name in folders if name not in found.names and run.exists(f"{name}/{checkpoint.STATE}")]
    if others and found.newest is not None and not _whole(run, [found.newest]):
        raise ValueError(f"its newest checkpoint, {found.newest}, is damaged")


def _nothing_left(run: Storage, problem: str) -> CheckpointError:
    return CheckpointError(
        "Ray Train's record of the checkpoints cannot be read, and no checkpoint is whole",
        key="storage.path",
        found=f"{run.join(SNAPSHOT)} ({' '.join(problem.split())[:200]})",
        allowed="a record, or at least one folder whose files are as its state.json says",
        fix=f"see what is wrong: maskray repair {run.uri}; restore one from a copy, or delete the folder to begin anew",
    )


def make_again(run: Storage, whole: list[str]) -> list[str]:
    """Make a record of checkpoints that are whole, the oldest first; their names.

    Raises:
        StorageError: it cannot be written.
    """
    if not whole and not run.exists(SNAPSHOT):
        return []
    results = [Result(checkpoint_dir_name=name, metrics=_metrics(run, name)) for name in whole]
    by_score = sorted(results, key=lambda result: result.metrics[SCORE])  # stable: of equals the newest is the last
    state = State(
        checkpoint_results=by_score,
        checkpoint_report_indices=[results.index(result) for result in by_score],
        latest_checkpoint_result=results[-1] if results else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    try:
        run.write_bytes(SNAPSHOT, state.model_dump_json().encode())
    except StorageError as error:
        raise type(error)(error.problem, key="storage.path", found=error.found, fix=error.fix) from error
    newest = f"its newest whole checkpoint, {whole[-1]}" if whole else "the start"
    log.warning("There was no record of the checkpoints that Ray Train could read; the run goes on from %s", newest)
    return whole


def _metrics(run: Storage, name: str) -> dict[str, float]:
    return {"step": step_of(name), SCORE: score_of(run.child(name).read_bytes)}


def _whole(run: Storage, folders: list[str]) -> list[str]:
    return [name for name in folders if not flaws(run.child(name))]


def flaws(folder: Storage) -> list[str]:
    """What keeps a checkpoint from being whole, in words."""
    with checkpoint.on_disk(folder) as local:
        return checkpoint.flaws(local)
