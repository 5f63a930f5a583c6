"""Memory, disks and GPUs of a machine."""

import pytest
import torch

from maskray.doctor import cluster, machine
from maskray.doctor.examination import examine
from maskray.doctor.finding import Check, Level, Subject, ok

WIDE = {"width": 4096, "depth": 24, "decoder": {"width": 64, "depth": 1, "heads": 2}}
ON_RAY = {"stream": "ray", "groups_per_task": 16}


def node(**resources):
    return {"Alive": True, "Resources": {"CPU": 8.0, "memory": 16e9, "object_store_memory": 4e9, **resources}}


def test_shared_memory_that_is_enough(looked):
    assert looked(machine.shared_memory, Subject()).level is Level.OK
    assert machine.shared_memory(Subject(address="head:6379")) is None


@pytest.mark.parametrize(("gpus", "level"), [(0, Level.WARNING), (1, Level.FAIL)])
def test_shared_memory_of_a_container(looked, tiny, small_disk, monkeypatch, gpus, level):
    monkeypatch.setattr(machine, "SHARED_MEMORY", small_disk)
    found = looked(machine.shared_memory, Subject(config=tiny(cluster={"workers": 2, "gpus_per_worker": gpus})))
    assert (found.level, "--shm-size" in found.fix) == (level, True)


def test_a_disk_that_is_full_stops_ray(looked, small_disk, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", f"{small_disk}/not/yet/there")
    assert looked(machine.temporary_files, Subject()).level is Level.OK
    (small_disk / "full").write_bytes(bytes(1_020_000))
    found = looked(machine.temporary_files, Subject())
    assert (found.level, found.fix) == (Level.FAIL, f"free some space in {small_disk}")


def test_an_object_store_that_is_enough(looked, known):
    assert looked(machine.object_store, known(data=ON_RAY)).level is Level.OK
    local = looked(machine.object_store, known())
    assert "the workers decode for themselves" in local.found


@pytest.mark.parametrize(
    ("bytes_of_store", "more", "level"),
    [
        (4e9, {}, Level.OK),
        # 16 row groups of 16 gray images of 8 × 8 pixels are 16 kB, and a task's output lies there twice.
        (60e3, {}, Level.WARNING),
        (20e3, {}, Level.FAIL),
        (4e9, {"object_store_bytes": 5_000_000_000}, Level.FAIL),
    ],
)
def test_an_object_store_of_a_cluster(looked, known, bytes_of_store, more, level):
    subject = known(data=ON_RAY | more)
    subject.address, subject.nodes = "head:6379", [node(object_store_memory=bytes_of_store)]
    found = looked(machine.object_store, subject)
    assert found.level is level, found
    assert level is Level.OK or "data.groups_per_task=8" in found.fix


def test_workers_that_memory_holds(looked, tiny, monkeypatch):
    assert looked(machine.memory, Subject(config=tiny())).level is Level.OK
    found = looked(machine.memory, Subject(config=tiny(model=WIDE, cluster={"workers": 4})))
    assert (found.level, "training.micro_batch" in found.fix) == (Level.FAIL, True)
    monkeypatch.setattr(machine, "get_used_memory", machine.get_system_memory)
    assert looked(machine.memory, Subject(config=tiny())).level is Level.WARNING


def test_workers_that_the_nodes_of_a_cluster_hold(looked, tiny, monkeypatch):
    subject = Subject(config=tiny(cluster={"workers": 2}), address="head:6379", nodes=[node(), node()])
    assert looked(machine.memory, subject).level is Level.OK
    subject.nodes = [node(memory=1e6), node()]
    subject.config = tiny(model={"width": 256}, cluster={"workers": 3})
    assert looked(machine.memory, subject).level is Level.OK  # all on one
    subject.nodes = [node(memory=1e6)]
    monkeypatch.setattr(machine, "may_grow", lambda: False)
    found = looked(machine.memory, subject)
    assert (found.level, "no node has room for 3 of 3" in found.found) == (Level.FAIL, True)
    monkeypatch.setattr(machine, "may_grow", lambda: True)
    found = looked(machine.memory, subject)
    assert (found.level, "an autoscaler may bring one" in found.found) == (Level.WARNING, True)


def test_the_nodes_of_a_cluster_are_known_when_it_is_their_turn(tiny, monkeypatch):
    def joined(subject):
        subject.nodes = [node(memory=1e6, object_store_memory=7e6)]
        return ok("as if")

    checks = [Check("cluster", joined) if check.name == "cluster" else check for check in cluster.CHECKS]
    of_nodes = ("cluster", "memory", "object store size")
    monkeypatch.setattr(cluster, "CHECKS", [check for check in checks if check.name in of_nodes])
    monkeypatch.setattr(machine, "may_grow", lambda: False)
    found = dict(examine(Subject(config=tiny(), address="head:6379"), ["machine", "cluster"]))
    assert "no node has room for 1 of 1" in found["memory"].found
    assert found["object store size"].found == "7 MB"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_asked_for_and_not_there(looked, tiny):
    assert looked(machine.gpu, Subject()).level is Level.OK
    found = looked(machine.gpu, Subject(config=tiny(cluster={"gpus_per_worker": 1})))
    assert (found.level, found.fix) == (Level.FAIL, "--set cluster.gpus_per_worker=0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("built", "says"), [("13.2", "cannot use the driver: NVRM"), (None, "is a CPU build")])
def test_a_driver_that_torch_cannot_use(looked, tmp_path, monkeypatch, built, says):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01\nGCC\n")
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", built)
    found = looked(machine.gpu, Subject())
    assert (found.level, says in found.found) == (Level.FAIL, True), found
