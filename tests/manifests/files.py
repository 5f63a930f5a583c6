"""A file of `infra/`, checked by what it is; and the folder, by what must fit together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from manifests.compose import Compose, check_compose
from manifests.dockerfiles import check_dockerfile
from manifests.finding import Finding, Model, check_accounts, check_logins, check_mlflow_server, misfits
from manifests.kuberay import RayCluster, RayJob
from manifests.kubernetes import (
    Deployment,
    Namespace,
    NetworkPolicy,
    Service,
    ServiceAccount,
    StatefulSet,
)
from manifests.launcher import check_launcher
from manifests.monitoring import Alerts, Dashboard, Prometheus, check_alerts, check_dashboard, check_prometheus
from manifests.pods import check_policy, check_service, check_workload
from manifests.ray_clusters import check_cluster, check_job

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KINDS: dict[str, type[Model]] = {
    "Deployment": Deployment,
    "Namespace": Namespace,
    "NetworkPolicy": NetworkPolicy,
    "RayCluster": RayCluster,
    "RayJob": RayJob,
    "Service": Service,
    "ServiceAccount": ServiceAccount,
    "StatefulSet": StatefulSet,
}


def manifests() -> list[Path]:
    """All that a machine reads, in `infra/`."""
    names = ("*.yaml", "*.json", "*.ini", "Dockerfile")
    return sorted(path for name in names for path in INFRA.rglob(name))


def check(name: str, text: str) -> list[Finding]:
    """What is wrong with a file.

    Args:
        name: of the file, below `infra/`.
        text: what is in it.
    """
    if name.endswith("Dockerfile"):
        return list(check_dockerfile(text))
    if name.endswith(".ini"):
        return list(check_accounts(text))
    try:
        documents = list(yaml.load_all(text, _Unique))  # JSON is YAML
    except yaml.YAMLError as error:
        return [Finding("wrong-value", "the file", " ".join(str(error).split()))]
    found: list[Finding] = []
    for document in documents:
        found += check_logins("", document)
        found += _check_document(name, document)
    return found


class _Unique(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys, and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.MarkedYAMLError(problem=f"{sorted(twice)} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _check_document(name: str, document: Any) -> Iterator[Finding]:
    try:
        if name == "mlflow/compose.yaml":
            yield from check_compose(Compose.model_validate(document))
        elif name.startswith("cluster/"):
            yield from check_launcher(document)
        elif name == "monitoring/prometheus.yaml":
            yield from check_prometheus(Prometheus.model_validate(document))
        elif name == "monitoring/alerts.yaml":
            yield from check_alerts(Alerts.model_validate(document))
        elif name == "monitoring/dashboard.json":
            yield from check_dashboard(Dashboard.model_validate(document))
        else:
            yield from _check_object(document)
    except ValidationError as error:
        yield from misfits(error)


def _check_object(document: Mapping[str, Any]) -> Iterator[Finding]:
    kind = document.get("kind")
    if kind == "Secret":
        yield Finding("plain-secret", "kind", "a Secret in a file is read by all who read the file: make it by hand")
        return
    if kind not in KINDS:
        yield Finding("unknown-field", "kind", f"{kind} is none of {', '.join(KINDS)}")
        return
    thing = KINDS[kind].model_validate(document)
    match thing:
        case RayCluster():
            yield from check_cluster(thing, pinned("ray"))
        case RayJob():
            yield from check_job(thing, pinned("ray"))
        case Deployment() | StatefulSet():
            yield from check_workload(thing)
            yield from _check_mlflow(thing)
        case Service():
            yield from check_service(thing)
        case NetworkPolicy():
            yield from check_policy(thing)


def _check_mlflow(workload: Deployment | StatefulSet) -> Iterator[Finding]:
    for index, container in enumerate(workload.spec.template.spec.containers):
        if "mlflow" in container.image:
            yield from check_mlflow_server(f"spec.template.spec.containers.{index}.args", container.args)


def pinned(package: str) -> str:
    """The version that the tests passed with."""
    found = re.search(
        rf"^{re.escape(package)}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE | re.IGNORECASE
    )
    assert found, f"{package} is not in constraints.txt"
    return found[1]
