"""What an autoscaler may still bring. It alone knows, and answers when it is asked for nodes.

Ray has a place for what it may bring at most (`get_cluster_config`), which nothing fills in 2.60. Nor is
`request_resources` of any use here: there is one such request for a whole cluster, which each overwrites, and it is met
by nodes that others have taken. So what is asked for is a placement group, as Ray Train and Tune ask too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply
from ray.experimental.internal_kv import _internal_kv_get, internal_kv_get_gcs_client
from ray.util.placement_group import placement_group, remove_placement_group

_SECONDS = 10.0  # for an answer
_ONLOOKERS = "node_"
"""How an autoscaler of the first version that brings nothing, as each head has one, begins the names of node kinds."""


def may_grow() -> bool:
    """Whether an autoscaler is at work.

    One of the second version that brings nothing says so only when it is asked: `Wish.is_refused`.
    """
    if is_autoscaler_v2(fetch_from_server=True):
        return True
    status = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    report = (json.loads(status) if status else {}).get("autoscaler_report") or {}
    return any(not kind.startswith(_ONLOOKERS) for kind in report.get("node_type_mapping", {}).values())


class Wish:
    """A free place for each of some bundles, asked for while the context lasts; then what was granted is free again.

    Args:
        bundles: each on one node.
    """

    def __init__(self, bundles: Sequence[Mapping[str, float]]) -> None:
        amounts = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
        self._group = placement_group([bundle for bundle in amounts if bundle], strategy="PACK")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(ray.exceptions.RayError):  # Ray removes it when the job ends; what else went wrong is worth more
            remove_placement_group(self._group)

    def is_granted(self, seconds: float) -> bool:
        """Whether all have their places, within so many seconds."""
        return bool(self._group.wait(seconds))

    def is_refused(self) -> bool:
        """Whether an autoscaler, of the second version, has no kinds of nodes for it, or too few, and never will.

        Where others hold some of what there is, it may be had when they end: then that is not known.
        """
        if not is_autoscaler_v2(fetch_from_server=True):
            return False
        try:
            refused = _state().infeasible_gang_resource_requests
        except ray.exceptions.RayError:  # it is asked again
            return False
        return any(self._group.id.hex() in each.details for each in refused) and _nothing_is_taken()


def _nothing_is_taken() -> bool:
    total, free = ray.cluster_resources(), ray.available_resources()
    return all(free.get(name, 0.0) >= total.get(name, 0.0) for name in ("CPU", "GPU"))


def _state() -> AutoscalingState:
    reply = GetClusterStatusReply()
    reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=_SECONDS))
    return reply.autoscaling_state
