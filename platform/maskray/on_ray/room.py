"""Whether there is room: bundles of CPUs and GPUs that must lie on one node each, and what nodes have."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
from ray._private.state import available_resources_per_node

from maskray.config.schema import ClusterConfig
from maskray.errors import ClusterError
from maskray.on_ray.growth import Wish, may_grow

log = logging.getLogger(__name__)

Bundle = dict[str, float]
"""What must lie on one node."""

_LOOK_SECONDS, _SAY_EVERY_SECONDS = 0.5, 5.0


def bundles(cluster: ClusterConfig, beside: list[Bundle], *, streams_on_ray: bool) -> list[Bundle]:
    """Workers, and what is beside them."""
    worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return [worker] * cluster.workers + beside_workers(cluster, beside, streams_on_ray=streams_on_ray)


def beside_workers(cluster: ClusterConfig, probes: list[Bundle], *, streams_on_ray: bool) -> list[Bundle]:
    """What is beside the workers: probes, and tasks of Ray Data, which take a whole CPU."""
    return probes + [{"CPU": 1.0}] * (cluster.data_cpus if streams_on_ray else 0)


def refuse(needed: list[Bundle], beside: list[Bundle], cluster: ClusterConfig) -> None:
    """Refuse what no waiting brings; whether that is so, an autoscaler says only when it is asked, by `wait_for`.

    Raises:
        ClusterError: too few CPUs or GPUs, in all or on one node.
    """
    if not may_grow():
        refuse_if_short(needed, ray.cluster_resources(), beside, cluster)
        refuse_if_scattered(needed, beside, cluster)


def refuse_if_short(
    needed: list[Bundle], has: Mapping[str, float], beside: list[Bundle], cluster: ClusterConfig
) -> None:
    """Refuse more than there is in all.

    Raises:
        ClusterError: it is more.
    """
    short = _shortage(_total(needed), has)
    if not short:
        return
    parts = f"{cluster.workers} workers with {cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker:g} GPUs each"
    parts += "".join(f", {shown(each)} for a probe" for each in beside)
    raise ClusterError(
        f"the cluster can never hold this run: {shown(short)} short",
        key="cluster.workers",
        found=f"{shown(_total(needed))} asked for ({parts}; the rest of the CPUs is for Ray Data)",
        allowed=f"{shown(has)} at most",
        fix="lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker, or take a larger cluster"
        + (", or let probes share what there is: probe.cpus=0" if beside else ""),
    )


def refuse_if_scattered(needed: list[Bundle], beside: list[Bundle], cluster: ClusterConfig) -> None:
    """Refuse what does not fit on the nodes, each bundle on one: the sums may be enough where no node is.

    Raises:
        ClusterError: it does not.
    """
    unplaced = _unplaced(needed, [node["Resources"] for node in nodes()])
    if not unplaced:
        return
    lost = {id(bundle): sum(each is bundle for each in unplaced) for bundle in needed}
    workers, of_data = cluster.workers, len(needed) - cluster.workers - len(beside)
    room = [f"{workers - lost[id(needed[0])]} of {workers} workers"]
    room += [f"{1 - lost[id(bundle)]} of 1 probe" for bundle in beside]
    room += [f"{of_data - lost[id(needed[-1])]} of Ray Data's {of_data} CPUs"] if of_data else []
    raise ClusterError(
        f"the nodes have room for {' and for '.join(room)}",
        key="cluster.cpus_per_worker",
        found=f"{shown(needed[0])} for each worker" + "".join(f", {shown(each)} for a probe" for each in beside),
        allowed="what one node has: a worker lies on one node, and so does each whole CPU of cluster.data_cpus",
        fix="ask for smaller workers, or for fewer" + (", or let probes share: probe.cpus=0" if beside else ""),
    )


def wait_for(wanted: list[Bundle], cluster: ClusterConfig, enough: list[Bundle] | None = None) -> bool:
    """Wait until there is a free place for each bundle, and ask an autoscaler for them; whether that took any time.

    Args:
        wanted: the bundles.
        cluster: what they are of.
        enough: fewer that will do, where time is up or an autoscaler cannot bring so many; None: all.

    Raises:
        ClusterError: time is up, or the autoscaler has no kinds of nodes for them.
    """
    deadline, enough = time.monotonic() + cluster.wait_seconds, wanted if enough is None else enough
    if not _unplaced(wanted, _free()):
        return False
    for asked in (wanted, enough):
        end = _asked_for(asked, deadline)
        if end == "granted":
            return True
        if not _unplaced(enough, _free()):
            log.warning("Starting with what there is: %s free", shown(ray.available_resources()))
            return True
        if end == "late" or len(asked) == len(enough):
            raise _never(asked) if end == "refused" else _not_in_time(wanted, cluster)
    raise AssertionError("the last is granted, late or refused")


def _asked_for(bundles: list[Bundle], deadline: float) -> Literal["granted", "refused", "late"]:
    """Ask for a free place for each, and wait."""
    said = 0.0
    with Wish(bundles) as wish:
        while not wish.is_granted(_LOOK_SECONDS):
            if wish.is_refused():
                return "refused"
            if time.monotonic() > deadline:
                return "late"
            if time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                log.warning("Waiting for %s; %s free", shown(_total(bundles)), shown(ray.available_resources()))
    return "granted"


def _free() -> list[Bundle]:
    return list(available_resources_per_node().values())


def _never(needed: list[Bundle]) -> ClusterError:
    """The autoscaler's word."""
    return ClusterError(
        "the cluster can never hold this: its autoscaler has no kinds of nodes, or too few, for what is missing",
        key="cluster.workers",
        found=f"{shown(_total(needed))} asked for, each worker's on one node",
        allowed=f"{shown(ray.cluster_resources())} now, and what the autoscaler's kinds of nodes have",
        fix="ask for less, or let the autoscaler bring more: ray status, and maxReplicas or max_workers of its config",
    )


def _not_in_time(needed: list[Bundle], cluster: ClusterConfig) -> ClusterError:
    return ClusterError(
        f"the cluster's resources were not free within {cluster.wait_seconds:g} s",
        key="cluster.wait_seconds",
        found=shown(ray.available_resources()) + " free",
        allowed=f"{shown(_total(needed))}, each worker and each CPU of Ray Data's on one node",
        fix="wait longer, free some, or ask for less",
    )


def place(bundle: Mapping[str, float], left: Sequence[Bundle]) -> bool:
    """Take a bundle from the first of the nodes that has room for it, in what is left of each; whether one had."""
    amounts = {name: amount for name, amount in bundle.items() if amount}
    node = next((node for node in left if not _shortage(amounts, node)), None)
    if node is None:
        return False
    for name, amount in amounts.items():
        node[name] -= amount
    return True


def _unplaced(wanted: list[Bundle], there: Sequence[Mapping[str, float]]) -> list[Bundle]:
    """Bundles without a place on any one node, the others having theirs."""
    left = [dict(node) for node in there]
    return [bundle for bundle in wanted if not place(bundle, left)]


def nodes() -> list[dict[str, Any]]:
    """All that are alive. The driver's is one of them, whether or not it has CPUs to give."""
    return [node for node in ray.nodes() if node["Alive"]]


def amounts() -> list[Bundle]:
    """What each node has."""
    return [{name: float(node["Resources"].get(name, 0.0)) for name in ("CPU", "GPU")} for node in nodes()]


def _total(needed: list[Bundle]) -> Bundle:
    return {name: sum(bundle.get(name, 0.0) for bundle in needed) for name in ("CPU", "GPU")}


def _shortage(needed: Mapping[str, float], has: Mapping[str, float]) -> Bundle:
    return {name: n - has.get(name, 0.0) for name, n in needed.items() if n > has.get(name, 0.0) + 1e-6}


def shown(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs, as a user reads it."""
    found = {n: resources[n] for n in ("CPU", "GPU") if resources.get(n)}
    return ", ".join(f"{amount:g} {n}{'' if amount == 1 else 's'}" for n, amount in found.items()) or "nothing"
