"""What our Ray clusters on Kubernetes must be."""

from __future__ import annotations

import math
from collections.abc import Iterator

import yaml

from manifests.finding import SECRET, Finding, check_plain_secret
from manifests.kuberay import RayCluster, RayClusterSpec, RayJob, WorkerGroup
from manifests.kubernetes import PodSpec, PodTemplate, amount
from manifests.pods import check_pod

# What Ray takes for its object store where nothing is said, of the container's memory.
STORE_FRACTION = 0.3
GPU = "nvidia.com/gpu"
QUEUE = "kueue.x-k8s.io/queue-name"


def check_cluster(cluster: RayCluster, ray_version: str) -> Iterator[Finding]:
    """A cluster that stays."""
    yield from _check_queue(cluster)
    yield from check_spec("spec", cluster.spec, ray_version)


def check_job(job: RayJob, ray_version: str) -> Iterator[Finding]:
    """A run with a cluster of its own: it ends, its cluster goes, and it is tried again."""
    spec = job.spec
    yield from _check_queue(job)
    if not spec.shutdownAfterJobFinishes:
        yield Finding("no-shutdown", "spec.shutdownAfterJobFinishes", "its machines would stay, and be paid for")
    if spec.activeDeadlineSeconds is None:
        yield Finding("no-deadline", "spec.activeDeadlineSeconds", "what hangs would be paid for ever")
    if spec.backoffLimit < 1:
        yield Finding(
            "no-retry", "spec.backoffLimit", "a run goes on where it stopped, if somebody gives its command again"
        )
    if spec.entrypointNumCpus <= 0:
        yield Finding("head-works", "spec.entrypointNumCpus", "without a CPU of its own the driver runs on the head")
    if spec.submissionMode == "K8sJobMode" and spec.submitterPodTemplate is None:
        yield Finding(
            "missing-field", "spec.submitterPodTemplate", "the submitter's pod would have no limits and rights set"
        )
    if spec.submitterPodTemplate is not None:
        yield from check_pod("spec.submitterPodTemplate.spec", spec.submitterPodTemplate.spec, probed=False)
    for word in spec.entrypoint.split():
        name, equals, value = word.partition("=")
        if equals and SECRET.search(name):
            yield from check_plain_secret("spec.entrypoint", name, value)
    yield from _check_runtime_env(spec.runtimeEnvYAML)
    yield from check_spec("spec.rayClusterSpec", spec.rayClusterSpec, ray_version)


def _check_queue(thing: RayCluster | RayJob) -> Iterator[Finding]:
    if not thing.metadata.labels.get(QUEUE):
        yield Finding(
            "no-queue", "metadata.labels", f"{QUEUE}: half of a run's pods could wait for another's other half"
        )


def _check_runtime_env(text: str) -> Iterator[Finding]:
    where = "spec.runtimeEnvYAML"
    try:
        environment = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        yield Finding("wrong-value", where, f"is no YAML: {error}")
        return
    for name, value in environment.get("env_vars", {}).items():
        if not isinstance(value, str):
            yield Finding("wrong-value", where, f"env_vars.{name} must be a string")
        yield from check_plain_secret(where, name, str(value))


def check_spec(where: str, spec: RayClusterSpec, ray_version: str) -> Iterator[Finding]:
    """Auth, autoscaler, fault tolerance, head and groups."""
    if spec.rayVersion != ray_version:
        yield Finding("ray-version", f"{where}.rayVersion", f"{spec.rayVersion}, and constraints.txt has {ray_version}")
    if spec.authOptions is None or spec.authOptions.mode != "token":
        yield Finding("open-auth", f"{where}.authOptions", "without mode: token whoever reaches Ray runs code on it")
    elif spec.authOptions.secretName is None:
        yield Finding("open-auth", f"{where}.authOptions", "secretName: clients must know where the token is")
    if not spec.enableInTreeAutoscaling or spec.autoscalerOptions.version != "v2":
        yield Finding("autoscaler", f"{where}.autoscalerOptions", "enableInTreeAutoscaling, with version: v2")
    if spec.autoscalerOptions.securityContext.allowPrivilegeEscalation is not False:
        yield Finding(
            "privilege", f"{where}.autoscalerOptions", "securityContext.allowPrivilegeEscalation must be false"
        )
    yield from _check_fault_tolerance(f"{where}.gcsFaultToleranceOptions", spec)
    head = spec.headGroupSpec
    if head.rayStartParams.get("num-cpus") != "0":
        yield Finding(
            "head-works", f"{where}.headGroupSpec.rayStartParams", 'num-cpus must be "0": tasks would land there'
        )
    if head.serviceType != "ClusterIP":
        yield Finding("open-port", f"{where}.headGroupSpec.serviceType", f"{head.serviceType} opens Ray to outside")
    yield from _check_node(f"{where}.headGroupSpec", head.template, head.rayStartParams)
    for index, group in enumerate(spec.workerGroupSpecs):
        yield from _check_group(f"{where}.workerGroupSpecs.{index}", group)


def _check_fault_tolerance(where: str, spec: RayClusterSpec) -> Iterator[Finding]:
    options = spec.gcsFaultToleranceOptions
    if options is None:
        yield Finding("head-lost", where, "with the head the whole cluster would be lost")
    elif options.redisPassword is None:
        yield Finding("open-auth", where, "redisPassword: who writes there controls the cluster")
    elif options.redisPassword.valueFrom is None:
        yield Finding("plain-secret", where, "redisPassword has its value in the file: refer to a Secret")


def _check_group(where: str, group: WorkerGroup) -> Iterator[Finding]:
    if not group.minReplicas <= group.replicas <= group.maxReplicas:
        yield Finding("replicas", where, f"{group.minReplicas} ≤ {group.replicas} ≤ {group.maxReplicas} does not hold")
    pod = group.template.spec
    if pod.automountServiceAccountToken:
        yield Finding("api-token", f"{where}.template.spec", "a worker has nothing to say to Kubernetes")
    if GPU in pod.containers[0].resources.limits:
        if not any(t.key == GPU for t in pod.tolerations):
            yield Finding(
                "placement", f"{where}.template.spec.tolerations", f"GPU machines are tainted: tolerate {GPU}"
            )
        if not pod.containers[0].image.endswith("-cuda"):
            yield Finding("placement", f"{where}.template.spec", f"{pod.containers[0].image} has no CUDA")
    yield from _check_node(where, group.template, group.rayStartParams)


def _check_node(where: str, template: PodTemplate, params: dict[str, str]) -> Iterator[Finding]:
    place = f"{where}.template.spec"
    yield from check_pod(place, template.spec, probed=True)
    if not template.spec.nodeSelector:
        yield Finding(
            "placement", f"{place}.nodeSelector", "the pod could land on any machine, a GPU's or a spot one too"
        )
    if template.spec.restartPolicy != "Never":
        yield Finding(
            "restart", f"{place}.restartPolicy", "Never: a container started anew is taken for the node that died"
        )
    yield from _check_shared_memory(place, template.spec, params)


def _check_shared_memory(where: str, spec: PodSpec, params: dict[str, str]) -> Iterator[Finding]:
    container = spec.containers[0]  # Ray's, by KubeRay's rule
    mounted = [mount.name for mount in container.volumeMounts if mount.mountPath == "/dev/shm"]
    volume = next((v for v in spec.volumes if v.name in mounted and v.emptyDir is not None), None)
    if volume is None or volume.emptyDir is None or volume.emptyDir.medium != "Memory":
        yield Finding(
            "no-shm", where, "/dev/shm is 64 MiB without an emptyDir of medium Memory: the store goes to disk"
        )
        return
    if volume.emptyDir.sizeLimit is None or "memory" not in container.resources.limits:
        return  # said elsewhere
    memory, shm = amount(container.resources.limits["memory"]), amount(volume.emptyDir.sizeLimit)
    store = int(params.get("object-store-memory") or math.ceil(float(memory) * STORE_FRACTION))
    if store > shm:
        yield Finding("shm-size", where, f"/dev/shm has {shm:.0f} bytes, and the object store takes {store}")
    if shm >= memory:
        yield Finding("shm-size", where, f"/dev/shm's {shm:.0f} bytes count as the container's memory, of {memory:.0f}")
