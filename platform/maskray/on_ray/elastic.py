"""A number of workers that follows the nodes: fewer where some are lost, up to all again where some come.

Ray Train's own policy takes any number for which its view of the cluster, up to 20 s old, has room, counts nodes that
are being taken away, leaves nothing for Ray Data, tries a number that cannot start for ever, and starts more workers at
any moment, which throws away what was trained since the last checkpoint. This one:

* takes numbers that divide the row groups of a step, so that the plan deals the same to all;
* asks for the cluster as it is now, and leaves room for what lies beside the workers;
* tries the next smaller number where one could not be started;
* starts more workers when the next checkpoint is on record, and only on what is free.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as ray_state
from ray.train.v2._internal.execution.scaling_policy import (
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from maskray.data.storage import Storage
from maskray.errors import MaskrayError
from maskray.on_ray import fit
from maskray.on_ray.room import place
from maskray.on_ray.stream import registered_checkpoint

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Terms:
    """What a run's workers may become."""

    counts: Sequence[int]
    """How many, the largest first."""
    beside: Sequence[dict[str, float]]
    """What must find room beside them, each on one node."""
    grow_seconds: float
    """Between two looks for room for more of them."""
    run: Storage
    """The run's folder, with Train's record of checkpoints."""
    board: Any
    """Is told of changes."""


class Trainer(fit.Trainer):
    """A trainer whose workers change in number by `terms`."""

    def __init__(self, *arguments: Any, terms: Terms, scaling_config: ray.train.ScalingConfig, **options: Any) -> None:
        scaling = replace(scaling_config, num_workers=(terms.counts[-1], terms.counts[0]))
        super().__init__(*arguments, scaling_config=scaling, **options)
        self._terms = terms

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        policy = Policy(self.scaling_config, self._terms)
        return super()._initialize_and_run_controller(**arguments | {"scaling_policy": policy})


class Policy(ElasticScalingPolicy):
    """Decides in Train's controller how many workers there are."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, terms: Terms) -> None:
        super().__init__(scaling_config)
        self._terms = terms
        self._running = 0
        self._tried: list[int] = []
        """In vain, since workers last ran."""
        self._larger: ResizeDecision | None = None
        """To come with the next checkpoint after that which is named below."""
        self._record_then: str | None = None
        self._grown = self._looked = float("-inf")
        self._reserved: Any = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many as there is room for; of those that could not be started the next smaller."""
        self._maybe_send_resource_request()
        most = self._room(_nodes(ray_state.get_draining_nodes()))
        if most == 0:
            self._say(f"Waiting for room for {self._terms.counts[-1]} of {self._terms.counts[0]} workers")
            time.sleep(_LOOK_SECONDS)  # Train asks again at once
            return NoopDecision()
        fewer = [n for n in self._terms.counts if n <= most and n not in self._tried]
        if not fewer:
            self._tried.clear()
            fewer = [most]
        self._tried.append(fewer[0])
        return self._get_resize_decision(fewer[0])

    def make_decision_for_running_worker_group(
        self,
        worker_group_state: Any,
        worker_group_status: Any,  # noqa: ARG002
    ) -> ScalingDecision:
        """More, where there is room for them and a checkpoint has come since that was seen; fewer where there is not.

        That is where a node is lost that had no workers: Ray Data has no CPU left, and nothing would move.
        """
        self._maybe_send_resource_request()
        running, now = worker_group_state.num_workers, time.monotonic()
        self._tried.clear()
        if running != self._running:
            if self._running or running < self._terms.counts[0]:
                self._say(f"{running} of {self._terms.counts[0]} workers train on from {self._record() or 'the start'}")
            self._running, self._larger, self._grown = running, None, now
        nodes = _nodes()
        held = next((n for n in self._terms.counts if n <= running and self._fits(n, nodes.values())), running)
        if held < running:
            return self._get_resize_decision(held)
        if self._larger is None and now - self._grown >= self._terms.grow_seconds and self._room(nodes) > running:
            self._larger, self._record_then = self._get_resize_decision(self._room(nodes)), self._record()
        if self._larger is None or self._record() == self._record_then:
            return NoopDecision()
        larger, self._larger, self._grown = self._larger, None, now
        if not self._is_free(larger.num_workers - running):
            return NoopDecision()
        self._tried.append(larger.num_workers)
        return larger

    def _room(self, nodes: Mapping[str, Mapping[str, float]]) -> int:
        """Workers for which there is room on nodes, of what Train has been given there; 0 for too few.

        What is free counts, whoever has it: a run that was killed keeps what it was given for three minutes.
        """
        given = {node: each for node, each in (self._get_reserved_resources() or {}).items() if node in nodes}
        most = self._count_possible_workers(given)
        free = [each for node, each in available_resources_per_node().items() if node in nodes]
        counts = self._terms.counts
        return next((n for n in counts if self._fits(n, free) or (n <= most and self._fits(n, nodes.values()))), 0)

    def _fits(self, count: int, nodes: Iterable[Mapping[str, float]]) -> bool:
        left = [dict(node) for node in nodes]
        worker = self.scaling_config._resources_per_worker_not_none
        return all(place(bundle, left) for bundle in [*[worker] * count, *self._terms.beside])

    def _is_free(self, count: int) -> bool:
        """Whether so many more workers can be started beside those that run, and whatever else runs."""
        left = [dict(node) for node in available_resources_per_node().values()]
        return all(place(self.scaling_config._resources_per_worker_not_none, left) for _ in range(count))

    def _get_reserved_resources(self) -> Any:
        """What Train has been given of the cluster as it is now; the coordinator's own view may be 20 s old."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            asked = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            try:
                self._reserved = ray.get(asked, timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S)
            except ray.exceptions.RayError:
                log.warning("What the cluster has cannot be read", exc_info=True)
                self._reserved = None
            self._looked = now
        return self._reserved

    def _record(self) -> str | None:
        try:
            return registered_checkpoint(self._terms.run)
        except (MaskrayError, ValueError, LookupError, TypeError):  # it is being written, or out of reach
            return self._record_then

    def _say(self, text: str) -> None:
        self._terms.board.warn.remote(text)


def _nodes(leaving: Container[str] = ()) -> dict[str, Mapping[str, float]]:
    """What the nodes have that are alive, and not about to leave."""
    return {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving}
