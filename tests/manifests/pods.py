"""What every pod of ours must be, and what the objects around it must not open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from manifests.finding import Finding, check_image, check_plain_secret
from manifests.kubernetes import (
    Container,
    Deployment,
    NetworkPolicy,
    PodSpec,
    Probe,
    Service,
    StatefulSet,
    Volume,
)

WORLD = {"0.0.0.0/0", "::/0"}


def check_pod(where: str, spec: PodSpec, *, probed: bool, claims: Iterable[str] = ()) -> Iterator[Finding]:
    """A pod's rights, limits, probes and volumes.

    Args:
        where: the path of the spec.
        spec: of the pod.
        probed: it serves, so somebody must ask whether it still does.
        claims: volumes that come from elsewhere.
    """
    yield from _check_host(where, spec)
    if spec.automountServiceAccountToken is None:
        yield Finding(
            "api-token", where, "say whether the pod gets a token for Kubernetes: automountServiceAccountToken"
        )
    if spec.securityContext.seccompProfile is None or spec.securityContext.seccompProfile.type == "Unconfined":
        yield Finding("privilege", where, "securityContext.seccompProfile must be RuntimeDefault")
    volumes = {volume.name for volume in spec.volumes} | set(claims)
    for index, container in enumerate(spec.containers):
        place = f"{where}.containers.{index}"
        yield from check_image(f"{place}.image", container.image)
        yield from _check_rights(place, container, spec)
        yield from _check_resources(place, container)
        if probed:
            yield from _check_probes(place, container)
        for env in container.env:
            yield from check_plain_secret(f"{place}.env", env.name, env.value)
        for mount in container.volumeMounts:
            if mount.name not in volumes:
                yield Finding("no-volume", f"{place}.volumeMounts", f"there is no volume {mount.name}")


def _check_host(where: str, spec: PodSpec) -> Iterator[Finding]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if getattr(spec, name):
            yield Finding("host", f"{where}.{name}", "the pod would share this with its machine")
    for index, volume in enumerate(spec.volumes):
        yield from _check_volume(f"{where}.volumes.{index}", volume)


def _check_volume(where: str, volume: Volume) -> Iterator[Finding]:
    if volume.hostPath is not None:
        yield Finding("host", where, f"hostPath {volume.hostPath.path} opens the machine's own files")
    elif volume.emptyDir is not None and volume.emptyDir.sizeLimit is None:
        yield Finding("no-limit", where, "an emptyDir without sizeLimit can fill its machine")
    elif volume.emptyDir is None and volume.secret is None:
        yield Finding("missing-field", where, f"volume {volume.name} says nothing of what it is")


def _check_rights(where: str, container: Container, spec: PodSpec) -> Iterator[Finding]:
    own, pod = container.securityContext, spec.securityContext
    user = pod.runAsUser if own.runAsUser is None else own.runAsUser
    no_root = pod.runAsNonRoot if own.runAsNonRoot is None else own.runAsNonRoot
    if not user or not no_root:
        yield Finding("root", where, "runAsNonRoot: true and a numeric runAsUser other than 0, here or for the pod")
    if own.privileged:
        yield Finding("privilege", where, "privileged: the container would be its machine's root")
    if own.allowPrivilegeEscalation is not False:
        yield Finding("privilege", where, "securityContext.allowPrivilegeEscalation must be false")
    if own.capabilities.drop != ["ALL"] or own.capabilities.add:
        yield Finding("privilege", where, "securityContext.capabilities must drop ALL and add none")


def _check_resources(where: str, container: Container) -> Iterator[Finding]:
    resources = container.resources
    for name in ("cpu", "memory"):
        if name not in resources.limits:
            yield Finding("no-limit", f"{where}.resources.limits", f"no {name}: it may take what others need")
    if resources.requests != resources.limits:
        yield Finding(
            "requests", f"{where}.resources", "requests must equal limits: else the pod is the first to be evicted"
        )


def _check_probes(where: str, container: Container) -> Iterator[Finding]:
    ports = {port.name for port in container.ports}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe: Probe | None = getattr(container, name)
        if probe is None:
            if name != "startupProbe":
                yield Finding("no-probe", f"{where}.{name}", "nobody would notice that it hangs")
            continue
        asked = probe.httpGet or probe.tcpSocket
        if asked is not None and isinstance(asked.port, str) and asked.port not in ports:
            yield Finding("no-port", f"{where}.{name}", f"there is no port {asked.port}")


def check_workload(workload: Deployment | StatefulSet) -> Iterator[Finding]:
    """Pods that serve, under a controller."""
    spec, labels = workload.spec, workload.spec.template.metadata.labels
    if not spec.selector.matchLabels.items() <= labels.items() or not spec.selector.matchLabels:
        yield Finding("no-match", "spec.selector", f"{spec.selector.matchLabels} does not select {labels}")
    claims = [claim.metadata.name for claim in getattr(spec, "volumeClaimTemplates", [])]
    yield from check_pod("spec.template.spec", spec.template.spec, probed=True, claims=claims)
    for index, container in enumerate(spec.template.spec.containers):
        if container.securityContext.readOnlyRootFilesystem is not True:
            where = f"spec.template.spec.containers.{index}"
            yield Finding("privilege", where, "securityContext.readOnlyRootFilesystem must be true")


def check_service(service: Service) -> Iterator[Finding]:
    """Nothing of ours is reached from outside of the cluster by itself."""
    if service.spec.type != "ClusterIP":
        yield Finding(
            "open-port", "spec.type", f"{service.spec.type} opens it to outside: put an Ingress with TLS before it"
        )
    if not service.spec.selector:
        yield Finding("no-match", "spec.selector", "selects nothing")


def check_policy(policy: NetworkPolicy) -> Iterator[Finding]:
    """Who may come in is named; what goes out to anywhere goes to named ports."""
    spec = policy.spec
    for index, rule in enumerate(spec.ingress):
        where = f"spec.ingress.{index}"
        if not rule.from_:
            yield Finding("open-port", where, "no `from`: everybody may come in")
        for peer in rule.from_:
            if peer.ipBlock is not None and peer.ipBlock.cidr in WORLD:
                yield Finding("open-world", where, f"{peer.ipBlock.cidr}: the whole world may come in")
            if peer.namespaceSelector is not None and not peer.namespaceSelector.matchLabels and not peer.podSelector:
                yield Finding("open-port", where, "an empty namespaceSelector lets every pod of the cluster in")
    for index, out in enumerate(spec.egress):
        where, world = f"spec.egress.{index}", [p.ipBlock for p in out.to if p.ipBlock and p.ipBlock.cidr in WORLD]
        if not out.ports and (world or not out.to):
            yield Finding("open-world", where, "to anywhere at any port: name the ports")
        if any(not block.except_ for block in world):
            yield Finding(
                "open-world", where, "leave out the networks of the cluster and 169.254.0.0/16, where roles are"
            )
