"""A run that was begun under another Ray than the one that it is to go on under."""

from __future__ import annotations

import json
import logging
from typing import Any

import ray
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _TrainingResultState as Result

from maskray.data.storage import Storage
from maskray.errors import CheckpointError
from maskray.on_ray.stream import SNAPSHOT

log = logging.getLogger(__name__)

UNKNOWN = "an unknown version"


def look_at_record(run: Storage) -> None:
    """Say which Ray a run was begun under, where it is not this one. Where nothing can be read, `record` sees to it.

    Checkpoints are our own and know nothing of Ray; only Train's record of them is Ray's. Each row group says its place
    in the plan, and another than the one that is due ends the run: so another Ray cannot train on other images unseen.

    Raises:
        CheckpointError: the record is of a kind that this Ray does not know.
    """
    try:
        found: Any = json.loads(run.read_bytes(SNAPSHOT))
    except (FileNotFoundError, ValueError):
        return
    if not isinstance(found, dict):
        return
    then, known = found.get("ray_version", UNKNOWN), Result.model_fields["version"].default
    results = [*found.get("checkpoint_results", []), found.get("latest_checkpoint_result")]
    kinds = {result.get("version", known) for result in results if isinstance(result, dict)}
    if kinds - {known}:
        raise CheckpointError(
            "Ray Train's record of the checkpoints is of a kind that this Ray does not know",
            key="version",
            found=f"{max(kinds, key=str)} in {run.join(SNAPSHOT)}, by Ray {then}",
            allowed=f"{known}, by Ray {ray.__version__}",
            fix=f"go on under Ray {then}; or move that file away, and the run goes on from its newest whole checkpoint",
        )
    if then != ray.__version__:
        log.warning(
            "The run was begun under Ray %s, and goes on under %s: the same images in the same steps, or it stops",
            then,
            ray.__version__,
        )
