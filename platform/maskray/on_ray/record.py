"""Train's record of a run's checkpoints: the only word on what a run goes on from, and what to do when it is torn.

Ray writes `checkpoint_manager_snapshot.json` with a plain stream: a launch that is killed in the middle leaves it empty
or cut short. The folders say of themselves whether they are whole, so the record can be made again from them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState as State,
)
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _TrainingResultState as Result,
)

from maskray.data.storage import Storage
from maskray.errors import CheckpointError, StorageError
from maskray.on_ray.stream import SNAPSHOT
from maskray.training import checkpoint, rewinds
from maskray.training.folders import FOLDER_PREFIX, NO_SCORE, PROBE, SCORE, score_of, step_of

log = logging.getLogger(__name__)

IsJudged = Callable[[int], bool]
"""Whether the checkpoint after so many steps is to be judged."""
_NAME = re.compile(rf"{FOLDER_PREFIX}\d+-\w+(\.partial)?")
_JUDGED = (
    "validated_checkpoint_dir_names",
    "timed_out_validation_checkpoint_dir_names",
    "failed_validation_checkpoint_dir_names",
)


class Record(NamedTuple):
    """What Train has on record."""

    names: list[str]
    """Of the checkpoints' folders, the worst first."""
    newest: str | None
    """Of them: what the run goes on from."""


def nothing_is_judged(_step: int) -> bool:
    """Of what has no probes."""
    return False


def settle(run: Storage, is_judged: IsJudged = nothing_is_judged) -> None:
    """Before Train starts: a record that it can read, and no folder that is not in it.

    Folders are deleted by a record that was read, never for want of one, nor by one whose newest checkpoint is damaged
    while another may not be. One that is whole and newer than all on record is taken up: who should have registered it
    was killed, or could not write.

    Args:
        run: the run's folder.
        is_judged: tells which of those that come on record wait to be judged, where Train is to have that done.

    Raises:
        CheckpointError: the record is torn, and none of the checkpoints is whole; or that of the rewinds is.
        StorageError: the folder cannot be read or written.
    """
    folders, left_out = folders_of(run), steps_left_out(run)
    found, problem = None, None
    try:
        found = read(run)
        if found is not None:
            _refuse_for_a_better_one(run, found, folders)
    except StorageError:  # a ValueError too; the record may be sound
        raise
    except ValueError as error:
        found, problem = None, error
    if found is None:  # torn; or none was ever registered: a launch was killed before, or they are those of bare torch
        whole = _whole(run, folders)
        if problem is not None and folders and not whole:
            raise _nothing_left(run, str(problem)) from problem
        sound = [name for name in whole if not has_trained_on(run.child(name), left_out)]
        listed = make_again(run, sound, is_judged)
    elif newer := _newer(run, found, folders, left_out):
        listed = make_again(run, [name for name in folders if name in found.names or name in newer], is_judged)
        log.warning("%s is whole, and was not on record: the run goes on from it", newer[-1])
    else:
        listed = found.names
    for name in (name for name in folders if name not in listed):
        was_finished = run.exists(f"{name}/{checkpoint.STATE}")
        log.info("Removing %s, which %s", name, "is not on record" if was_finished else "was not finished")
        run.delete(name)


def folders_of(run: Storage) -> list[str]:
    """Names of the checkpoints' folders, whole or not, the oldest first. What else is there is not Train's."""
    return [name for name in run.list_names() if _NAME.fullmatch(name)]


def read(run: Storage) -> Record | None:
    """The record; None where there is none.

    Raises:
        ValueError: Train would refuse it.
        StorageError: it cannot be read, which says nothing of it. A ValueError too.
    """
    state = _state(run)
    if state is None:
        return None
    names = [result.checkpoint_dir_name for result in state.checkpoint_results]
    newest = state.latest_checkpoint_result and state.latest_checkpoint_result.checkpoint_dir_name
    if missing := set(names) - set(folders_of(run)):
        raise ValueError(f"it lists folders that are not there: {', '.join(sorted(missing))}")
    if newest is not None and newest not in names:
        raise ValueError(f"its newest checkpoint, {newest}, is not in its list")
    return Record(names, newest)


def _state(run: Storage) -> State | None:
    """What Train wrote, though it may not be true; None where there is nothing. Raises as `read` does."""
    try:
        content = run.read_bytes(SNAPSHOT)
    except FileNotFoundError:
        return None
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise ValueError(f"it is cut short: {error}" if content else "it is empty") from error
    try:
        return State.model_validate(raw)
    except ValueError as error:
        raise ValueError(f"this version of Ray writes it otherwise: {_in_a_line(error)}") from error


def _what_is_legible(run: Storage) -> State | None:
    try:
        return _state(run)
    except StorageError:
        raise
    except ValueError:
        return None


def ever_listed(run: Storage) -> list[str] | None:
    """Names that the record has, though it be wrong in other things; None where it is torn, or there is none.

    Raises:
        StorageError: it cannot be read.
    """
    state = _what_is_legible(run)
    return None if state is None else [result.checkpoint_dir_name for result in state.checkpoint_results]


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _refuse_for_a_better_one(run: Storage, found: Record, folders: list[str]) -> None:
    """Only where there is another that was finished are files read: those of a checkpoint may be many GB."""
    others = [name for name in folders if name not in found.names and run.exists(f"{name}/{checkpoint.STATE}")]
    if others and found.newest is not None and not _whole(run, [found.newest]):
        raise ValueError(f"its newest checkpoint, {found.newest}, is damaged")


def _newer(run: Storage, found: Record, folders: list[str], left_out: set[int]) -> list[str]:
    """Whole checkpoints that the record should know of."""
    others = [name for name in folders if name not in found.names and run.exists(f"{name}/{checkpoint.STATE}")]
    newer = _whole(run, [name for name in others if is_newer(name, found)])
    return [name for name in newer if not has_trained_on(run.child(name), left_out)]


def is_newer(name: str, found: Record) -> bool:
    """Whether a checkpoint is newer than all on record."""
    return found.newest is None or step_of(name) > step_of(found.newest)


def steps_left_out(run: Storage) -> set[int]:
    """Steps that a run has gone back from.

    Raises:
        CheckpointError: the record of them cannot be read.
    """
    return {each.step for each in rewinds.read(run)}


def has_trained_on(folder: Storage, left_out: set[int]) -> bool:
    """Whether a whole checkpoint has trained on a step that is left out: the run cannot go on from it.

    It may be of workers that were lost before Train knew of it: those after them went back, and it stayed.
    """
    if not left_out:
        return False
    said = json.loads(folder.read_bytes(checkpoint.STATE))
    return bool({step for step in left_out if step < said["step"]} - set(said.get("skipped", [])))


def _nothing_left(run: Storage, problem: str) -> CheckpointError:
    return CheckpointError(
        "Ray Train's record of the checkpoints cannot be read, and no checkpoint is whole",
        key="storage.path",
        found=f"{run.join(SNAPSHOT)} ({' '.join(problem.split())[:200]})",
        allowed="a record, or at least one folder whose files are as its state.json says",
        fix=f"see what is wrong: maskray repair {run.uri}; restore one from a copy, or delete the folder to begin anew",
    )


def make_again(run: Storage, whole: list[str], is_judged: IsJudged = nothing_is_judged) -> list[str]:
    """Make a record of checkpoints that are whole, the oldest first; their names. What is known of them is kept.

    Args:
        run: the run's folder.
        whole: their names.
        is_judged: as for `settle`.

    Raises:
        StorageError: it cannot be written.
    """
    before = _what_is_legible(run)
    if not whole and not run.exists(SNAPSHOT):
        return []
    known = {} if before is None else {result.checkpoint_dir_name: result for result in before.checkpoint_results}
    results = [known.get(name) or Result(checkpoint_dir_name=name, metrics=_metrics(run, name)) for name in whole]
    missed = [each for each in results if each.checkpoint_dir_name not in known and _is_missed(run, each, is_judged)]
    # Stable: of equals the newest is the last.
    by_score = sorted(results, key=lambda result: float(result.metrics.get(SCORE, NO_SCORE)))
    state = State(
        checkpoint_results=by_score,
        checkpoint_report_indices=[results.index(result) for result in by_score],
        latest_checkpoint_result=results[-1] if results else None,
        current_report_index=len(results),
        **_judgements(before, set(whole), missed),
    )
    try:
        run.write_bytes(SNAPSHOT, state.model_dump_json().encode())
    except StorageError as error:
        raise type(error)(error.problem, key="storage.path", found=error.found, fix=error.fix) from error
    if before is None:
        newest = f"its newest whole checkpoint, {whole[-1]}" if whole else "the start"
        log.warning("There was no record of the checkpoints that Ray Train could read; the run goes on from %s", newest)
    return whole


def _is_missed(run: Storage, result: Result, is_judged: IsJudged) -> bool:
    name = result.checkpoint_dir_name
    return is_judged(step_of(name)) and not run.exists(f"{name}/{PROBE}")


def _judgements(before: State | None, kept: set[str], missed: list[Result]) -> dict[str, Any]:
    """Who waits to be judged, and who was: as an earlier record has it, as far as they are kept, and those missed."""
    waiting: list[tuple[Result, Any]] = []
    if before is not None:
        pending = zip(before.pending_training_results, before.pending_validation_specs, strict=False)
        waiting = [(result, how) for result, how in pending if result.checkpoint_dir_name in kept]
    waiting += [(result, True) for result in missed]
    return {
        "pending_training_results": [result for result, _ in waiting],
        "pending_validation_specs": [how for _, how in waiting],
        **{each: [name for name in getattr(before, each, []) if name in kept] for each in _JUDGED},
    }


def _metrics(run: Storage, name: str) -> dict[str, float]:
    return {"step": step_of(name), SCORE: score_of(run.child(name).read_bytes)}


def _whole(run: Storage, folders: list[str]) -> list[str]:
    return [name for name in folders if not flaws(run.child(name))]


def flaws(folder: Storage) -> list[str]:
    """What keeps a checkpoint from being whole, in words."""
    with checkpoint.on_disk(folder) as local:
        return checkpoint.flaws(local)
