"""The part of Kubernetes' objects that our manifests use."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field, model_validator

from manifests.finding import Model

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[kMGTP]|[KMGTP]i)?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]

_UNITS = {"m": Decimal("0.001")} | {
    f"{letter}{binary}": Decimal(1024 if binary else 1000) ** power
    for power, letter in enumerate("KMGTP", 1)
    for binary in ("i", "")
}
_UNITS["k"] = Decimal(1000)


def amount(quantity: str) -> Decimal:
    """Of a quantity, in cores or bytes."""
    digits = quantity.rstrip("mkKMGTPi")
    return Decimal(digits) * _UNITS.get(quantity[len(digits) :], Decimal(1))


class Meta(Model):
    name: Name
    namespace: Name | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class TemplateMeta(Model):
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class KeyRef(Model):
    name: Name
    key: str


class ValueFrom(Model):
    secretKeyRef: KeyRef


class Env(Model):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str | None = None
    valueFrom: ValueFrom | None = None

    @model_validator(mode="after")
    def _one(self) -> Env:
        if (self.value is None) == (self.valueFrom is None):
            raise ValueError("either value or valueFrom")
        return self


class Resources(Model):
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class HttpGet(Model):
    path: str
    port: Port | str


class Exec(Model):
    command: list[str]


class TcpSocket(Model):
    port: Port | str


class Probe(Model):
    httpGet: HttpGet | None = None
    exec: Exec | None = None
    tcpSocket: TcpSocket | None = None
    initialDelaySeconds: Count = 0
    periodSeconds: Positive = 10
    timeoutSeconds: Positive = 1
    failureThreshold: Positive = 3

    @model_validator(mode="after")
    def _one(self) -> Probe:
        if sum(way is not None for way in (self.httpGet, self.exec, self.tcpSocket)) != 1:
            raise ValueError("exactly one of httpGet, exec, tcpSocket")
        return self


class Seccomp(Model):
    type: Literal["RuntimeDefault", "Localhost", "Unconfined"]


class Capabilities(Model):
    add: list[str] = []
    drop: list[str] = []


class SecurityContext(Model):
    allowPrivilegeEscalation: bool | None = None
    privileged: bool | None = None
    readOnlyRootFilesystem: bool | None = None
    runAsNonRoot: bool | None = None
    runAsUser: Count | None = None
    runAsGroup: Count | None = None
    capabilities: Capabilities = Capabilities()
    seccompProfile: Seccomp | None = None


class PodSecurityContext(Model):
    runAsNonRoot: bool | None = None
    runAsUser: Count | None = None
    runAsGroup: Count | None = None
    fsGroup: Count | None = None
    seccompProfile: Seccomp | None = None


class ContainerPort(Model):
    name: Name | None = None
    containerPort: Port
    protocol: Literal["TCP", "UDP"] = "TCP"


class Mount(Model):
    name: Name
    mountPath: str
    subPath: str | None = None
    readOnly: bool = False


class Container(Model):
    name: Name
    image: str
    command: list[str] = []
    args: list[str] = []
    ports: list[ContainerPort] = []
    env: list[Env] = []
    resources: Resources = Resources()
    startupProbe: Probe | None = None
    readinessProbe: Probe | None = None
    livenessProbe: Probe | None = None
    securityContext: SecurityContext = SecurityContext()
    volumeMounts: list[Mount] = []


class EmptyDir(Model):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity | None = None


class HostPath(Model):
    path: str
    type: str | None = None


class SecretVolume(Model):
    secretName: Name
    defaultMode: int | None = None


class Volume(Model):
    name: Name
    emptyDir: EmptyDir | None = None
    hostPath: HostPath | None = None
    secret: SecretVolume | None = None


class Toleration(Model):
    key: str
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Model):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []
    serviceAccountName: Name | None = None
    automountServiceAccountToken: bool | None = None
    securityContext: PodSecurityContext = PodSecurityContext()
    nodeSelector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    terminationGracePeriodSeconds: Count | None = None
    hostNetwork: bool = False
    hostPID: bool = False
    hostIPC: bool = False


class PodTemplate(Model):
    metadata: TemplateMeta = TemplateMeta()
    spec: PodSpec


class Selector(Model):
    matchLabels: dict[str, str] = {}


class Object(Model):
    apiVersion: str
    metadata: Meta


class Namespace(Object):
    kind: Literal["Namespace"]


class ServiceAccount(Object):
    kind: Literal["ServiceAccount"]
    automountServiceAccountToken: bool | None = None


class Strategy(Model):
    type: Literal["Recreate", "RollingUpdate"]


class DeploymentSpec(Model):
    replicas: Count
    strategy: Strategy | None = None
    selector: Selector
    template: PodTemplate


class Deployment(Object):
    kind: Literal["Deployment"]
    spec: DeploymentSpec


class ClaimSpec(Model):
    accessModes: list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"]]
    resources: Resources
    storageClassName: str | None = None


class Claim(Model):
    metadata: Meta
    spec: ClaimSpec


class StatefulSetSpec(Model):
    serviceName: Name
    replicas: Count
    selector: Selector
    template: PodTemplate
    volumeClaimTemplates: list[Claim] = []


class StatefulSet(Object):
    kind: Literal["StatefulSet"]
    spec: StatefulSetSpec


class ServicePort(Model):
    name: Name | None = None
    port: Port
    targetPort: Port | str | None = None
    protocol: Literal["TCP", "UDP"] = "TCP"


class ServiceSpec(Model):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    selector: dict[str, str]
    ports: Annotated[list[ServicePort], Field(min_length=1)]


class Service(Object):
    kind: Literal["Service"]
    spec: ServiceSpec


class IpBlock(Model):
    cidr: str
    except_: list[str] = Field(default=[], alias="except")


class Peer(Model):
    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None
    ipBlock: IpBlock | None = None


class PolicyPort(Model):
    protocol: Literal["TCP", "UDP"]
    port: Port


class Ingress(Model):
    from_: list[Peer] = Field(default=[], alias="from")
    ports: list[PolicyPort] = []


class Egress(Model):
    to: list[Peer] = []
    ports: list[PolicyPort] = []


class NetworkPolicySpec(Model):
    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[Ingress] = []
    egress: list[Egress] = []


class NetworkPolicy(Object):
    kind: Literal["NetworkPolicy"]
    spec: NetworkPolicySpec
