"""What a trial of several workers takes, and how often it says that it goes on."""

import pytest

from maskray.config.schema import ClusterConfig
from maskray.data.storage import Storage
from maskray.on_ray.sweep import nested


def test_tune_holds_a_bundle_for_each_worker_and_nothing_for_the_trials_own_process():
    asked = nested.resources(ClusterConfig(workers=2, cpus_per_worker=0.5))
    assert asked.head_bundle_is_empty
    assert asked.bundles == [{"CPU": 0.5}, {"CPU": 0.5}]
    on_gpus = nested.resources(ClusterConfig(workers=3, cpus_per_worker=4, gpus_per_worker=1))
    assert on_gpus.bundles == [{"CPU": 4, "GPU": 1}] * 3


@pytest.mark.parametrize(
    ("of_cluster", "nodes", "trials"),
    [
        ({"workers": 2}, [{"CPU": 2.0}], 1),
        ({"workers": 2, "cpus_per_worker": 0.5}, [{"CPU": 2.0}], 2),
        ({"workers": 2, "cpus_per_worker": 0.1}, [{"CPU": 1.0}], 5),
        ({"workers": 2, "cpus_per_worker": 3}, [{"CPU": 4.0}, {"CPU": 4.0}], 1),  # not the 8 / 6 of the sums
        ({"workers": 2, "cpus_per_worker": 3}, [{"CPU": 5.0}, {"CPU": 2.0}], 0),  # nor the 7 / 6
        ({"workers": 2, "gpus_per_worker": 1}, [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}], 2),
        ({"workers": 4, "gpus_per_worker": 1}, [{"CPU": 8.0, "GPU": 2.0}] * 5, 2),
    ],
)
def test_every_worker_lies_on_one_node(of_cluster, nodes, trials):
    assert nested.concurrency(ClusterConfig(**of_cluster), nodes) == trials


def test_what_the_nodes_have_is_not_touched():
    nodes = [{"CPU": 2.0}]
    nested.concurrency(ClusterConfig(workers=2), nodes)
    assert nodes == [{"CPU": 2.0}]


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("/runs", "/runs/sweeps/a"),
        ("/runs/", "/runs/sweeps/a"),
        ("s3://b/runs?region=x", "s3://b/runs/sweeps/a?region=x"),
    ],
)
def test_train_keeps_its_files_in_the_trials_folder(root, name):
    assert Storage(root).child("sweeps", "a").address == Storage(name).address
    assert nested._below(Storage(root), Storage(name)) == "sweeps/a"


def test_a_trial_says_that_it_goes_on_only_where_it_does_and_not_too_often(monkeypatch):
    now = 100.0
    monkeypatch.setattr(nested.time, "monotonic", lambda: now)
    pulse = nested._Pulse()
    now += 60
    assert not pulse.is_due(beats=0)  # no line yet, however long it takes
    assert pulse.is_due(beats=1)  # its stream is being made ready
    assert pulse.step == 0
    now += 60
    assert not pulse.is_due(beats=1)
    pulse.line(10, {})
    assert pulse.is_due(beats=1)
    assert pulse.step == 10
    now += 60
    assert not pulse.is_due(beats=1)  # it hangs
    pulse.line(20, {})
    assert pulse.is_due(beats=1)
    now += nested._HEARTBEAT_SECONDS / 2
    pulse.line(30, {})
    assert not pulse.is_due(beats=1)
    now += nested._HEARTBEAT_SECONDS / 2
    assert pulse.is_due(beats=1)
    assert pulse.step == 30
