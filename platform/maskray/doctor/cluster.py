"""Ray's clusters: which there are, whose doors are closed, and whether one has room."""

from __future__ import annotations

import json
import os
from pathlib import Path

import grpc
import ray
import torch
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import find_gcs_addresses
from ray._private.utils import get_num_cpus
from ray._private.worker import get_dashboard_url
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from maskray.config.resolve import RunPlan, worker_counts
from maskray.config.schema import RunConfig
from maskray.data.local import is_walked_locally
from maskray.data.storage import Storage
from maskray.doctor import machine
from maskray.doctor.asking import SECONDS, asked
from maskray.doctor.finding import Check, Finding, Subject, counted, fail, ok, warning
from maskray.errors import ClusterError
from maskray.on_ray import cluster, probe, shared
from maskray.on_ray.growth import may_grow
from maskray.tracking.mlflow_store import embedded_uri

_JOIN_SECONDS = 30.0
_TOKEN_FIX = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE, a file with the cluster's token"


def clusters(subject: Subject) -> Finding:
    """Whether it is clear which cluster is meant."""
    find_gcs_addresses.cache_clear()
    here = sorted(find_gcs_addresses())
    named = os.environ.get("RAY_ADDRESS")
    found = f"{len(here)} on this machine" + (f" ({', '.join(here)})" if here else "")
    if subject.address == "auto" and named in (None, "", "auto") and len(here) > 1:
        return fail(f"{found}, and `auto` may mean any", f"export RAY_ADDRESS={here[0]}, or --address {here[0]}")
    if subject.address is None:
        return ok(f"{found}; a run starts one of its own, apart from others")
    return ok(f"{found}; a run joins {subject.address}")


def token(subject: Subject) -> Finding:
    """Whether only who has the token can run code on the cluster."""
    mode, given = os.environ.get("RAY_AUTH_MODE", "").lower(), os.environ.get("RAY_AUTH_TOKEN")
    if mode == "disabled":
        return warning(
            "RAY_AUTH_MODE=disabled: whoever reaches the ports of the cluster runs code on it",
            "unset RAY_AUTH_MODE; of a cluster, RAY_AUTH_MODE=token and one token on all nodes",
        )
    problem = None if given else _problem_of(_token_file(), subject, mode)
    if problem is not None:
        return problem
    if subject.address is not None and mode != "token":
        return fail("there is a token, but clients send it only in mode `token`", "export RAY_AUTH_MODE=token")
    if not given and not _token_file().is_file():
        return ok("none yet: Ray makes one for a cluster that a run starts")
    return ok("in RAY_AUTH_TOKEN" if given else f"{_token_file()}, for this user alone")


def _problem_of(file: Path, subject: Subject, mode: str) -> Finding | None:
    if not file.is_file() or not file.read_text().strip():
        if mode == "token" or "RAY_AUTH_TOKEN_PATH" in os.environ:
            return fail(f"no token in {file}", "ray get-auth-token --generate; of a cluster: copy its token there")
        if subject.address is not None:
            return warning(
                f"no token in {file}: only a cluster without one lets us in", "copy the cluster's token there"
            )
        return None
    if file.stat().st_mode & 0o077:
        found = f"{file} has mode {file.stat().st_mode & 0o777:o}: others on this machine may read it"
        return (warning if subject.address is None else fail)(found, f"chmod 600 {file}")
    return None


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def joined(subject: Subject) -> Finding | None:
    """Whether the cluster can be joined."""
    address = subject.address
    if address is None or address.startswith("http"):
        return None
    if address != "auto" and "://" not in address and (problem := _refusal(address)) is not None:
        return problem
    subject.closing.enter_context(cluster.connected(subject.cluster))
    subject.nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    amounts = ", ".join(f"{total[name]:g} {name}s" for name in ("CPU", "GPU") if total.get(name))
    return ok(f"{address}: {counted(len(subject.nodes), 'node')} with {amounts or 'no CPUs'}")


def _refusal(address: str) -> Finding | None:
    """One call to the head, which is answered at once: Ray asks again for half a minute, and says little."""
    headers = [(name.lower(), value) for name, value in _authorization().items()]
    with init_grpc_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=SECONDS, metadata=headers)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return fail(f"{address} {'has another token' if headers else 'wants a token'}", _TOKEN_FIX)
            words = f"no head of Ray's answers at {address}: {error.code().name}"
            return fail(words, "set cluster.address to host:port of the head's GCS (6379), and start Ray there")
    return None


def dashboard(subject: Subject) -> Finding | None:
    """Whether jobs can be submitted, and to the same Ray."""
    address = subject.address
    if address is not None and address.startswith("http"):
        url, bad = address.rstrip("/"), fail
    elif subject.nodes is not None:
        url, bad = f"http://{get_dashboard_url()}", warning
    else:
        return None
    try:
        answer = asked(f"{url}/api/version", _authorization())
    except OSError as error:
        return bad(
            f"{url} does not answer ({error}): jobs cannot be submitted", "start Ray with its dashboard (ray[default])"
        )
    with answer:
        status, text = answer.status, answer.read(300).decode(errors="replace")
    if status in (401, 403):
        which = "wants a token" if status == 401 else "has another token"
        return fail(f"{url} {which}: {text}", _TOKEN_FIX)
    try:
        theirs = json.loads(text)["ray_version"]
    except (ValueError, LookupError, TypeError):
        return bad(f"{url} is no dashboard of Ray's: {status} {text[:80]}", "give http://HEAD:8265")
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        return fail(f"Ray {theirs} on the cluster, {ray.__version__} here", f"pip install 'ray[default]=={theirs}'")
    return ok(f"{url}, Ray {theirs}")


def room(subject: Subject) -> Finding | None:
    """Whether workers fit, and leave CPUs for Ray Data."""
    config = subject.config
    if config is None or (subject.address is not None and subject.nodes is None):
        return None
    on_ray = config.data.stream != "local"
    if subject.dataset is not None:
        on_ray = not is_walked_locally(config.data, subject.dataset)
    machine_has = None
    if subject.nodes is None:
        machine_has = {
            "CPU": float(config.cluster.embedded_cpus or get_num_cpus()),
            "GPU": float(torch.cuda.device_count()),
        }
    least = config.cluster.min_workers if subject.plan is None else _fewest(config, subject.plan)
    try:
        cluster.check_room(config, probe.bundles(config), streams_on_ray=on_ray, least=least, machine=machine_has)
    except ClusterError as error:
        if machine_has is not None or not may_grow():
            raise
        return warning(f"{error.problem} now; an autoscaler may bring it, and is not asked here", "ray status")
    of_data = f", and {config.cluster.data_cpus} for Ray Data" if on_ray else ""
    has = ray.cluster_resources() if machine_has is None else machine_has
    taken = config.cluster.workers * config.cluster.cpus_per_worker
    return ok(f"{taken:g} of {has.get('CPU', 0):g} CPUs for {counted(config.cluster.workers, 'worker')}{of_data}")


def _fewest(config: RunConfig, plan: RunPlan) -> int:
    return worker_counts(config.cluster, plan.groups_per_step)[-1]


def shared_places(subject: Subject) -> Finding | None:
    """Whether all nodes see the dataset and the folder of the runs, and reach MLflow's store."""
    config = subject.config
    if config is None or subject.nodes is None or subject.is_away(config.storage.path):
        return None
    storage = Storage(config.storage.path)
    shared.check_runs(storage, config.tracking.uri or embedded_uri(config.storage.path))
    shared.refuse_if_not_everywhere(config.data.path, "data.path", "pretrain")
    return ok(f"{storage.uri} and the dataset, from {counted(len(subject.nodes), 'node')}")


def _authorization() -> dict[str, str]:
    """What a client of Ray's sends."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {}
    file = _token_file()
    text = os.environ.get("RAY_AUTH_TOKEN") or (file.read_text().strip() if file.is_file() else "")
    return {"Authorization": f"Bearer {text}"} if text else {}


CHECKS = [
    Check("clusters", clusters),
    Check("token", token),
    Check("cluster", joined, _JOIN_SECONDS),
    Check("dashboard", dashboard),
    Check("room for workers", room),
    Check("shared places", shared_places, _JOIN_SECONDS),
    *machine.AFTER_JOINING,
]
