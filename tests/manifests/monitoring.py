"""Prometheus' configuration, its alerts, and Grafana's dashboard: the parts that our files use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import Field

from manifests.finding import Finding, Model

GAUGES = {
    "maskray_checkpoint_wait_seconds",
    "maskray_data_wait_fraction",
    "maskray_images_per_second",
    "maskray_loss",
    "maskray_mfu",
    "maskray_probe_accuracy",
    "maskray_restarts_total",
    "maskray_step",
    "maskray_views_without_image_total",
}
"""What the platform emits; Ray puts `ray_` before it."""
RAYS_OWN = {"ray_object_store_memory", "ray_resources"}
KNOWN = {f"ray_{name}" for name in GAUGES} | RAYS_OWN
LABELS = {"run", "metric", "instance", "Location", "Name"}

_CHOSEN = "${datasource}"

Duration = Annotated[str, Field(pattern=r"^\d+(ms|s|m|h|d)$")]


class Global(Model):
    scrape_interval: Duration
    evaluation_interval: Duration


class Namespaces(Model):
    names: list[str]


class KubernetesDiscovery(Model):
    role: Literal["pod", "service", "endpoints", "endpointslice", "node", "ingress"]
    namespaces: Namespaces


class FileDiscovery(Model):
    files: list[str]


class Relabel(Model):
    source_labels: list[str]
    regex: str | None = None
    action: Literal["keep", "drop", "replace", "labelmap", "labeldrop", "labelkeep"] = "replace"
    target_label: str | None = None
    replacement: str | None = None


class ScrapeJob(Model):
    job_name: str
    metrics_path: str = "/metrics"
    kubernetes_sd_configs: list[KubernetesDiscovery] = []
    file_sd_configs: list[FileDiscovery] = []
    relabel_configs: list[Relabel] = []


class Prometheus(Model):
    global_: Global = Field(alias="global")
    rule_files: list[str]
    scrape_configs: list[ScrapeJob]


class Alert(Model):
    alert: str
    expr: str
    for_: Duration | None = Field(default=None, alias="for")
    labels: dict[str, str]
    annotations: dict[str, str]


class AlertGroup(Model):
    name: str
    rules: list[Alert]


class Alerts(Model):
    groups: list[AlertGroup]


class DataSource(Model):
    type: Literal["prometheus"]
    uid: str


class Target(Model):
    refId: str
    expr: str
    legendFormat: str
    datasource: DataSource


class Place(Model):
    x: Annotated[int, Field(ge=0, le=23)]
    y: Annotated[int, Field(ge=0)]
    w: Annotated[int, Field(ge=1, le=24)]
    h: Annotated[int, Field(ge=1)]


class Defaults(Model):
    unit: Literal["short", "percentunit", "s", "bytes"]
    min: float | None = None
    max: float | None = None
    decimals: int | None = None


class FieldConfig(Model):
    defaults: Defaults
    overrides: list[Any]


class Panel(Model):
    id: int
    type: Literal["timeseries", "stat"]
    title: Annotated[str, Field(min_length=1)]
    description: Annotated[str, Field(min_length=1)]
    datasource: DataSource
    gridPos: Place
    fieldConfig: FieldConfig
    targets: Annotated[list[Target], Field(min_length=1)]


class Dashboard(Model):
    uid: str
    title: str
    tags: list[str]
    schemaVersion: int
    version: int
    editable: bool
    refresh: Duration
    timezone: str
    time: dict[Literal["from", "to"], str]
    templating: dict[Literal["list"], list[dict[str, Any]]]
    annotations: dict[Literal["list"], list[Any]]
    panels: list[Panel]


def metrics(expression: str) -> set[str]:
    """Names of metrics in an expression: all of Ray's begin so."""
    return set(re.findall(r"\bray_\w+", re.sub(r'"[^"]*"', "", expression)))


def check_expression(where: str, expression: str) -> Iterator[Finding]:
    """Metrics and labels that exist, and brackets that close."""
    for name in sorted(metrics(expression) - KNOWN):
        yield Finding("no-metric", where, f"nothing emits {name}")
    if not metrics(expression):
        yield Finding("no-metric", where, f"{expression} asks for nothing of ours")
    for label in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', expression):
        if label not in LABELS:
            yield Finding("no-metric", where, f"no metric here has a label {label}")
    for series, window in re.findall(r"changes\((\w+)\[(\w+)\]\)", expression):
        if f"{series} offset {window}" not in expression:
            yield Finding(
                "young", where, f"{series} may be younger than {window}: ask for `{series} offset {window}` too"
            )
    bare = re.sub(r'"[^"]*"', "", expression)
    if any(bare.count(a) != bare.count(b) for a, b in ("()", "{}", "[]")):
        yield Finding("wrong-value", where, f"{expression}: a bracket does not close")


def check_prometheus(file: Prometheus) -> Iterator[Finding]:
    """Each job finds its targets somehow, and keeps no others."""
    for index, job in enumerate(file.scrape_configs):
        where = f"scrape_configs.{index}"
        if not job.kubernetes_sd_configs and not job.file_sd_configs:
            yield Finding("no-match", where, f"{job.job_name} has no targets")
        if job.kubernetes_sd_configs and not any(r.action == "keep" for r in job.relabel_configs):
            yield Finding("too-much", where, f"{job.job_name} keeps every pod of the namespace")
        for relabel in job.relabel_configs:
            if relabel.action == "replace" and relabel.target_label is None:
                yield Finding("missing-field", where, "replace without target_label")


def check_alerts(file: Alerts) -> Iterator[Finding]:
    """What is asked exists, and somebody is told what to do."""
    for group in file.groups:
        for alert in group.rules:
            where = f"{group.name}.{alert.alert}"
            yield from check_expression(where, alert.expr)
            if "summary" not in alert.annotations or "severity" not in alert.labels:
                yield Finding("missing-field", where, "labels.severity and annotations.summary")


def check_dashboard(file: Dashboard) -> Iterator[Finding]:
    """What is drawn exists, by whichever Prometheus is chosen, and no panel lies over another."""
    for variable in file.templating["list"]:
        if variable.get("datasource", {"uid": _CHOSEN})["uid"] != _CHOSEN:
            yield Finding("wrong-value", f"variable {variable['name']}", f"datasource.uid must be {_CHOSEN}")
    for panel in file.panels:
        where = f"panel {panel.id}"
        for target in panel.targets:
            yield from check_expression(where, target.expr)
        if {panel.datasource.uid, *(t.datasource.uid for t in panel.targets)} != {_CHOSEN}:
            yield Finding("wrong-value", where, f"datasource.uid must be {_CHOSEN}: any other is one of one Grafana")
    for one, other in combinations(file.panels, 2):
        a, b = one.gridPos, other.gridPos
        if one.id == other.id:
            yield Finding("wrong-value", f"panel {one.id}", "two panels have this id")
        if a.x < b.x + b.w and b.x < a.x + a.w and a.y < b.y + b.h and b.y < a.y + a.h:
            yield Finding("wrong-value", f"panel {one.id}", f"lies over panel {other.id}")
