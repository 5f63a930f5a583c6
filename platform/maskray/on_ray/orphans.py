"""What a killed controller of Ray Train leaves behind, and nobody else takes away in time.

Its workers die with it, but not the placement group that they were in: Ray removes that when the whole job has ended
too, and what Train has against it, a detached actor, asks the dashboard, which is not always there. The next controller
would find too few CPUs for its workers, or none for Ray Data, and wait without a word. What it had reserved for Train
would stay reserved for three minutes, and Ray Data and an elastic run be given what is left.
"""

from __future__ import annotations

import logging
import time

import ray
from ray._private.state import state as ray_state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.util.placement_group import PlacementGroup, remove_placement_group

log = logging.getLogger(__name__)

_SECONDS = 5.0  # until Ray knows whose groups they were, and for an answer


def remove(train_run_id: str) -> int:
    """Remove what a controller of this job has left that is dead.

    Args:
        train_run_id: of the trainer whose `fit` it was, under which it had reserved resources.

    Returns:
        Placement groups that were removed.
    """
    asked = get_or_create_autoscaling_coordinator().cancel_request.remote(f"train-{train_run_id}")
    try:
        ray.get(asked, timeout=_SECONDS)
    except ray.exceptions.RayError:  # it ends by itself
        log.warning("What Ray Train had reserved cannot be given back", exc_info=True)
    until = time.monotonic() + _SECONDS
    while not (left := _left()) and time.monotonic() < until:
        time.sleep(0.1)
    for group in left:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return len(left)


def _left() -> list[Group]:
    """Placement groups of this job whose makers, actors, are dead. The driver is none: Ray calls that one dead too."""
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    groups = map(Group.FromString, ray_state._connect_and_get_accessor().get_placement_group_table())
    return [
        group
        for group in groups
        if group.creator_job_id == job
        and group.creator_actor_dead
        and not ray.ActorID(group.creator_actor_id).is_nil()
        and group.state != Group.REMOVED
        and not group.is_detached
    ]
