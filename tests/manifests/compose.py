"""The part of the compose format that our file uses, and what must hold for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from manifests.finding import SECRET, Finding, Model, check_image, check_mlflow_server

_VARIABLE = re.compile(r"\$\{(\w+)([^}]*)\}|\$(\w+)")
# Root, and then the user of its image, by its own entry point.
_BECOMES_A_USER = re.compile(r"^postgres:")


class Build(Model):
    context: str
    dockerfile: str


class Healthcheck(Model):
    test: Annotated[list[str], Field(min_length=2)]
    interval: str = "30s"
    timeout: str = "30s"
    retries: Annotated[int, Field(ge=1)] = 3
    start_period: str = "0s"


class Condition(Model):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class ComposeService(Model):
    image: str
    build: Build | None = None
    restart: Literal["no", "always", "on-failure", "unless-stopped"] = "no"
    user: str | None = None
    command: list[str] = []
    environment: dict[str, str] = {}
    ports: list[str] = []
    volumes: list[str] = []
    networks: list[str] = []
    depends_on: dict[str, Condition] = {}
    healthcheck: Healthcheck | None = None
    read_only: bool = False
    tmpfs: list[str] = []
    privileged: bool = False
    network_mode: str | None = None
    security_opt: list[str] = []
    cap_drop: list[str] = []
    cap_add: list[str] = []
    mem_limit: Annotated[str, Field(pattern=r"^\d+[bkmg]$")] | None = None
    cpus: Annotated[float, Field(gt=0)] | None = None


class Network(Model):
    internal: bool = False


class Compose(Model):
    name: str
    services: dict[str, ComposeService]
    volumes: dict[str, dict[str, Any]] = {}
    networks: dict[str, Network] = {}


def check_compose(file: Compose) -> Iterator[Finding]:
    """Versions, rights, limits, ports, and secrets without a default."""
    for name, service in file.services.items():
        where = f"services.{name}"
        yield from check_image(f"{where}.image", service.image)
        yield from _check_rights(where, service)
        yield from _check_limits(where, service)
        yield from _check_ports(where, service)
        yield from _check_variables(where, service)
        if any("--app-name" in word or "--backend-store-uri" in word for word in service.command):
            yield from check_mlflow_server(f"{where}.command", service.command)
            yield from _check_disk(where, service)
        unknown = (set(service.networks) - set(file.networks)) | (set(service.depends_on) - set(file.services))
        unknown |= {v.partition(":")[0] for v in service.volumes if v[0] not in "./~"} - set(file.volumes)
        for one in sorted(unknown):
            yield Finding("no-match", where, f"there is no {one} in this file")


def _check_rights(where: str, service: ComposeService) -> Iterator[Finding]:
    if service.privileged or service.cap_drop != ["ALL"] or "no-new-privileges:true" not in service.security_opt:
        yield Finding("privilege", where, "not privileged; cap_drop: [ALL]; security_opt: no-new-privileges:true")
    own = (service.user or "").partition(":")[0]
    if not _BECOMES_A_USER.match(service.image) and (not own.isdigit() or own == "0"):
        yield Finding("root", where, f"user {service.user}: give a number other than 0")
    if service.network_mode == "host":
        yield Finding("host", where, "network_mode: host opens all of its ports")
    for volume in service.volumes:
        if volume[0] in "/~":
            yield Finding("host", f"{where}.volumes", f"{volume} opens the machine's own files")


def _check_limits(where: str, service: ComposeService) -> Iterator[Finding]:
    if service.mem_limit is None or service.cpus is None:
        yield Finding("no-limit", where, "mem_limit and cpus: it may take what others need")
    if service.healthcheck is None:
        yield Finding("no-probe", where, "healthcheck: nobody would notice that it hangs")
    if service.restart == "no":
        yield Finding("restart", where, "restart: unless-stopped, or it stays away after the machine's next start")


def _check_disk(where: str, service: ComposeService) -> Iterator[Finding]:
    """MLflow writes an upload to a temporary file, whole, before it passes it on."""
    if not any(volume.rpartition(":")[2] == "/tmp" for volume in service.volumes):
        yield Finding("no-disk", f"{where}.volumes", "NAME:/tmp: in memory, or in the container, weights have no room")


def _check_ports(where: str, service: ComposeService) -> Iterator[Finding]:
    for port in service.ports:
        bound = re.match(r"(\$\{[^}]*\}|[^:]+):[^:]+:[^:]+$", port)
        if bound is None or bound[1] in ("0.0.0.0", "[::]"):
            yield Finding(
                "open-port", f"{where}.ports", f"{port} listens on every address of the machine: bind it to one"
            )


def _check_variables(where: str, service: ComposeService) -> Iterator[Finding]:
    for name, value in service.environment.items():
        if SECRET.search(name) and not _VARIABLE.search(value):
            yield Finding("plain-secret", f"{where}.environment", f"{name} has its value in the file")
    for text in (*service.environment.values(), *service.command, *service.ports):
        for braced, rest, bare in _VARIABLE.findall(text):
            if not re.match(r":\?\S", rest):
                name = braced or bare
                yield Finding("default", where, f"${name} may be empty or has a default: ${{{name}:?what to give}}")
