"""Train's record of a run's checkpoints: the only word on what a run goes on from, and what to do when it is torn.

Ray writes `checkpoint_manager_snapshot.json` with a plain stream: a launch that is killed in the middle leaves it empty
or cut short. The folders say of themselves whether they are whole, so the record can be made again from them.
"""

from __future__ import annotations

import logging

from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState as State,
)
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _TrainingResultState as Result,
)

from maskray.data.storage import Storage
from maskray.errors import CheckpointError
from maskray.on_ray.stream import SNAPSHOT
from maskray.training import checkpoint
from maskray.training.folders import FOLDER_PREFIX, SCORE, score_of, step_of

log = logging.getLogger(__name__)


def settle(run: Storage) -> None:
    """Before Train starts: a record that it can read, and no folder that is not in it.

    Folders are deleted by a record that was read, never for want of one.

    Raises:
        CheckpointError: the record is torn, and none of the checkpoints is whole.
    """
    folders = [name for name in run.list_names() if name.startswith(FOLDER_PREFIX)]
    try:
        listed = _listed(run.read_bytes(SNAPSHOT), folders)
    except FileNotFoundError:  # none was ever registered: a launch was killed before, or they are those of bare torch
        listed = _made_again(run, [name for name in folders if _is_whole(run.child(name))])
    except ValueError as error:
        whole = [name for name in folders if _is_whole(run.child(name))]
        if folders and not whole:
            raise _nothing_left(run, str(error)) from error
        listed = _made_again(run, whole)
    for name in folders:
        if name not in listed:
            log.info("Removing %s, which was not finished", name)
            run.delete(name)


def _listed(content: bytes, folders: list[str]) -> set[str]:
    """Names in a record.

    Raises:
        ValueError: Train would refuse it.
    """
    state = State.model_validate_json(content)
    listed = {result.checkpoint_dir_name for result in state.checkpoint_results}
    if missing := listed - set(folders):
        raise ValueError(f"it lists folders that are not there: {', '.join(sorted(missing))}")
    return listed


def _nothing_left(run: Storage, problem: str) -> CheckpointError:
    return CheckpointError(
        "Ray Train's record of the checkpoints cannot be read, and no checkpoint is whole",
        key="storage.path",
        found=f"{run.join(SNAPSHOT)} ({' '.join(problem.split())[:200]})",
        allowed="a record, or at least one folder whose files are as its state.json says",
        fix=f"restore one of them from a copy, or delete {run.uri} to begin anew",
    )


def _made_again(run: Storage, whole: list[str]) -> set[str]:
    """A record of checkpoints that are whole; their names."""
    if not whole and not run.exists(SNAPSHOT):
        return set()
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
    run.write_bytes(SNAPSHOT, state.model_dump_json().encode())
    newest = f"its newest whole checkpoint, {whole[-1]}" if whole else "the start"
    log.warning("There was no record of the checkpoints that Ray Train could read; the run goes on from %s", newest)
    return set(whole)


def _metrics(run: Storage, name: str) -> dict[str, float]:
    return {"step": step_of(name), SCORE: score_of(run.child(name).read_bytes)}


def _is_whole(folder: Storage) -> bool:
    with checkpoint.on_disk(folder) as local:
        return checkpoint.is_whole(local)
