"""What an autoscaler may still bring. It alone knows, and answers when it is asked for nodes.

Ray has a place for what it may bring at most (`get_cluster_config`), which nothing fills in 2.60.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply
from ray.experimental.internal_kv import _internal_kv_get, internal_kv_get_gcs_client

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
    """What an autoscaler is asked for, while the context lasts: a standing request would keep the nodes up for ever."""

    def __init__(self) -> None:
        self._asked_at: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        request_resources(bundles=[])

    def ask(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """For a free place for each, and for nothing that was asked for before."""
        request_resources(bundles=[dict(bundle) for bundle in bundles])
        if is_autoscaler_v2(fetch_from_server=True):
            # Counts what autoscalers and we have read of it.
            self._asked_at = get_cluster_resource_state(internal_kv_get_gcs_client()).cluster_resource_state_version

    def is_refused(self) -> bool:
        """Whether an autoscaler has seen it, and has no kinds of nodes for it: then it brings none at all.

        Of the first version none says so.
        """
        if self._asked_at is None:
            return False
        state = _state()
        seen = state.last_seen_cluster_resource_state_version > self._asked_at
        return seen and bool(state.infeasible_cluster_resource_constraints)


def _state() -> AutoscalingState:
    reply = GetClusterStatusReply()
    reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=_SECONDS))
    return reply.autoscaling_state
