"""What this machine has for a cluster that a run starts on it; of a cluster that was joined, what its nodes have."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from ray._common.utils import get_default_system_temp_dir, get_system_memory
from ray._private.utils import get_used_memory, resolve_object_store_memory

from maskray.data.local import is_walked_locally
from maskray.data.storage import nearest_folder
from maskray.doctor.finding import Check, Finding, Subject, counted, fail, ok, warning
from maskray.estimate import estimate
from maskray.on_ray.growth import may_grow
from maskray.on_ray.room import place
from maskray.wording import short

SHARED_MEMORY = Path("/dev/shm")
DRIVER = Path("/proc/driver/nvidia/version")
_FULL = 0.95  # Ray makes no objects on a disk that is fuller
_OF_THE_STORE = 0.5  # what Ray Data takes of it at most
_TASKS_UNDER_WAY = 2  # of one CPU: one at work, one whose output waits
_MEMORY_FIX = "--set training.micro_batch=N with a smaller N; maskray estimate says what takes it"
_SHM_FIX = "docker run --shm-size=8g, or on Kubernetes an emptyDir of medium Memory at /dev/shm"


def shared_memory(subject: Subject) -> Finding | None:
    """Whether Ray's object store fits where it is fast."""
    if subject.address is not None:
        return None
    free, store = shutil.disk_usage(SHARED_MEMORY).free, _embedded_store()
    found = f"{short(free, 'B')} free in {SHARED_MEMORY}, for an object store of {short(store, 'B')}"
    if free >= store:
        return ok(found)
    cluster = subject.cluster
    if cluster.gpus_per_worker and cluster.workers > 1:
        return fail(f"{found}; NCCL needs it, too", _SHM_FIX)
    return warning(f"{found}: what does not fit lies on a disk, and is slow", _SHM_FIX)


def object_store(subject: Subject) -> Finding | None:
    """Whether what Ray Data has under way fits into the object store."""
    if subject.nodes is None:
        size = _embedded_store()
    else:
        size = int(sum(node["Resources"].get("object_store_memory", 0) for node in subject.nodes))
    config, plan = subject.config, subject.plan
    if config is None or plan is None or subject.dataset is None:
        return ok(short(size, "B")) if subject.address is None or subject.nodes is not None else None
    if is_walked_locally(config.data, subject.dataset):
        return ok(f"{short(size, 'B')}; hardly used: the workers decode for themselves")
    data, (height, width) = config.data, config.data.image_size
    limit = data.object_store_bytes or int(_OF_THE_STORE * size)
    group = plan.group_rows * data.views_per_image * data.channels * height * width
    task = group * data.groups_per_task
    needed = group * data.prefetch_groups * config.cluster.workers + task * _TASKS_UNDER_WAY * config.cluster.data_cpus
    found = f"{short(size, 'B')}, of which Ray Data may take {short(limit, 'B')}; it needs about {short(needed, 'B')}"
    if limit > size or task > limit:
        return fail(f"{found}, {short(task, 'B')} for one task", _smaller(data.groups_per_task, size))
    return ok(found) if needed <= limit else warning(f"{found}: it will wait", _smaller(data.groups_per_task, size))


def memory(subject: Subject) -> Finding | None:
    """Whether the workers fit into memory, by arithmetic."""
    if subject.config is None or subject.is_away(subject.config.data.path):
        return None
    cluster, needs = subject.config.cluster, estimate(subject.config).memory.total
    if cluster.gpus_per_worker:
        return _on_a_gpu(needs) if torch.cuda.is_available() else None
    if subject.nodes is not None:
        return _on_nodes(needs, cluster.workers, subject.nodes)
    if subject.address is not None:
        return None
    total, wanted = get_system_memory(), needs * cluster.workers
    free = total - get_used_memory()
    found = (
        f"{short(wanted, 'B')} for {counted(cluster.workers, 'worker')}; {short(free, 'B')} of {short(total, 'B')} free"
    )
    if wanted > total:
        return fail(found, _MEMORY_FIX)
    return ok(found) if wanted <= free else warning(found, f"end what fills it, or {_MEMORY_FIX}")


def _on_a_gpu(needs: int) -> Finding:
    has = torch.cuda.get_device_properties(0).total_memory
    found = f"{short(needs, 'B')} a worker, {short(has, 'B')} on a GPU here"
    return fail(found, _MEMORY_FIX) if needs > has else ok(found)


def _on_nodes(needs: int, workers: int, nodes: list[dict[str, Any]]) -> Finding:
    left = [{"memory": float(node["Resources"].get("memory", 0))} for node in nodes]
    lost = sum(not place({"memory": float(needs)}, left) for _ in range(workers))
    found = f"{short(needs, 'B')} a worker"
    if not lost:
        return ok(found)
    found = f"{found}: no node has room for {lost} of {workers}"
    if may_grow():
        return warning(
            f"{found} now; an autoscaler may bring one, and is not asked here", f"ray status, or {_MEMORY_FIX}"
        )
    return fail(found, _MEMORY_FIX)


def temporary_files(subject: Subject) -> Finding | None:
    """Whether Ray may write: it stops where a disk is nearly full."""
    if subject.address is not None:
        return None
    folder = nearest_folder(Path(get_default_system_temp_dir()))  # of its sessions, and of what spills
    usage = shutil.disk_usage(folder)
    # Of what a user may have: a part is kept for root.
    share = usage.used / (usage.used + usage.free)
    found = f"{short(usage.free, 'B')} free in {folder}, {share:.0%} full"
    if share < _FULL:
        return ok(found)
    return fail(f"{found}: Ray makes no objects above {_FULL:.0%}", f"free some space in {folder}")


def gpu(subject: Subject) -> Finding | None:
    """Whether torch sees the GPUs that the driver has, and those that the config asks for."""
    wanted = subject.config is not None and subject.config.cluster.gpus_per_worker > 0
    built = torch.version.cuda
    if torch.cuda.is_available():
        name, num = torch.cuda.get_device_name(0), torch.cuda.device_count()
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return ok(f"{num} × {name}, CUDA {built}, NCCL {nccl}")
    if DRIVER.exists():
        words = DRIVER.read_text().partition("\n")[0]
        if built is None:
            return fail(
                f"torch {torch.__version__} is a CPU build, and there is a driver: {words}", "pip install torch"
            )
        return fail(
            f"torch for CUDA {built} cannot use the driver: {words}",
            "install a driver that knows this CUDA, or torch for an older one; nvidia-smi says which CUDA it knows",
        )
    if wanted and subject.address is None:
        return fail(
            "the config asks for GPUs, and this machine has no driver for any", "--set cluster.gpus_per_worker=0"
        )
    return ok("none here, and none asked for") if not wanted else None


def _embedded_store() -> int:
    """Bytes that Ray takes for the object store of a cluster that it starts here."""
    return int(resolve_object_store_memory(get_system_memory() - get_used_memory()))


def _smaller(groups_per_task: int, size: int) -> str:
    return f"--set data.groups_per_task={max(1, groups_per_task // 2)}, or data.object_store_bytes below {size}"


CHECKS = [
    Check("shared memory", shared_memory),
    Check("temporary files", temporary_files),
    Check("GPU", gpu),
]
AFTER_JOINING = [Check("object store size", object_store), Check("memory", memory)]
