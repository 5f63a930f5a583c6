"""The part of KubeRay's RayCluster and RayJob (ray.io/v1, KubeRay 1.6 and 1.7) that our manifests use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from manifests.finding import Model
from manifests.kubernetes import (
    Count,
    Name,
    Object,
    PodTemplate,
    Positive,
    Resources,
    SecurityContext,
    ValueFrom,
)

StartParams = dict[str, str]
"""Of `ray start`: Kubernetes takes strings alone, also for numbers and switches."""


class AuthOptions(Model):
    mode: Literal["token", "disabled"]
    secretName: Name | None = None


class RedisCredential(Model):
    value: str | None = None
    valueFrom: ValueFrom | None = None


class GcsFaultTolerance(Model):
    redisAddress: str
    redisUsername: RedisCredential | None = None
    redisPassword: RedisCredential | None = None
    externalStorageNamespace: str | None = None


class AutoscalerOptions(Model):
    version: Literal["v1", "v2"] = "v1"
    idleTimeoutSeconds: Count = 60
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    resources: Resources = Resources()
    securityContext: SecurityContext = SecurityContext()


class HeadGroup(Model):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    rayStartParams: StartParams = {}
    template: PodTemplate


class WorkerGroup(Model):
    groupName: Name
    replicas: Count = 0
    minReplicas: Count
    maxReplicas: Positive
    numOfHosts: Positive = 1
    idleTimeoutSeconds: Count | None = None
    rayStartParams: StartParams = {}
    template: PodTemplate


class RayClusterSpec(Model):
    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: AuthOptions | None = None
    gcsFaultToleranceOptions: GcsFaultTolerance | None = None
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions = AutoscalerOptions()
    headGroupSpec: HeadGroup
    workerGroupSpecs: Annotated[list[WorkerGroup], Field(min_length=1)]


class RayCluster(Object):
    kind: Literal["RayCluster"]
    apiVersion: Literal["ray.io/v1"]
    spec: RayClusterSpec


class RayJobSpec(Model):
    entrypoint: str
    entrypointNumCpus: Annotated[float, Field(ge=0)] = 0
    entrypointNumGpus: Annotated[float, Field(ge=0)] = 0
    runtimeEnvYAML: str = ""
    metadata: dict[str, str] = {}
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"] = "K8sJobMode"
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    activeDeadlineSeconds: Positive | None = None
    backoffLimit: Count = 0
    submitterPodTemplate: PodTemplate | None = None
    rayClusterSpec: RayClusterSpec


class RayJob(Object):
    kind: Literal["RayJob"]
    apiVersion: Literal["ray.io/v1"]
    spec: RayJobSpec
