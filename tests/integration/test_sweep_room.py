"""Whether a cluster has room for a sweep's trials: one that grows, and one that others have taken."""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from maskray.config.load import merge, parse
from maskray.config.schema import ClusterConfig, RunConfig
from maskray.config.sweep import SweepConfig
from maskray.data.storage import Storage
from maskray.errors import ClusterError
from maskray.on_ray import room, shared
from maskray.on_ray.board import Board, Seen
from maskray.on_ray.sweep import tune
from maskray.sweeping import preparing
from maskray.sweeping.preparing import Prepared
from maskray.tracking.mlflow_store import DATABASE
from nodes import add_node, head

pytestmark = pytest.mark.ray

SERVER = "http://mlflow:5000"
PATIENCE_SECONDS = 60.0


@pytest.fixture
def sweep_of(tiny: Callable[..., RunConfig], tmp_path: Path, mlflow_tables: Path) -> Callable[..., Prepared]:
    """Four trials that take a CPU each, on a cluster that is waited for a moment."""
    shutil.copy(mlflow_tables, tmp_path / DATABASE)

    def make(concurrency: int | None = None, wait_seconds: float = 0.5, **of_cluster: Any) -> Prepared:
        base = tiny(storage={"path": str(tmp_path)}).model_dump(mode="json")
        base = merge(base, {"cluster": {"wait_seconds": wait_seconds, **of_cluster}})
        space, trials = {"mask.ratio": [0.5, 0.6, 0.75, 0.9]}, {"concurrency": concurrency}
        prepared = preparing.prepare(
            parse(SweepConfig, {"name": "grows", "base": base, "space": space, "seeds": [0], "trials": trials})
        )
        return replace(prepared, store=replace(prepared.store, uri=SERVER))

    return make


def test_what_a_cluster_of_a_given_size_cannot_hold_is_refused(sweep_of, caplog):
    with head() as nodes:
        with pytest.raises(ClusterError, match=r"no room for a trial.*Found: 1 CPU .*what one node has: 0 CPUs"):
            tune.concurrency_of(sweep_of())
        add_node(nodes, num_cpus=2)
        with pytest.raises(ClusterError, match=r"trials\.concurrency: .*room for 2 trials at once\. Found: 3 of 1 CPU"):
            tune.concurrency_of(sweep_of(concurrency=3))
        with pytest.raises(ClusterError, match=r"no room for a trial.*what one node has: [02] CPUs; or [02] CPUs"):
            tune.concurrency_of(sweep_of(cpus_per_worker=3))
        assert caplog.messages == [], "what can never be is not waited for"
        assert tune.concurrency_of(sweep_of(wait_seconds=PATIENCE_SECONDS)) == 2  # the new node's CPUs are told late

        # All places are taken, and one becomes free.
        holds = ray.remote(num_cpus=2)(Board).remote()
        ray.get(holds.read.remote(Seen()))
        with pytest.raises(ClusterError, match=r"not free within 0\.5 s\. Found: nothing free"):
            tune.concurrency_of(sweep_of())
        caplog.clear()
        end = threading.Timer(1.0, ray.kill, [holds])
        end.start()
        assert tune.concurrency_of(sweep_of(wait_seconds=PATIENCE_SECONDS)) == 2
        end.join()
        assert "Waiting for 1 CPU; nothing free" in caplog.messages


def test_an_autoscaler_is_asked_and_brings_what_it_can(sweep_of, tmp_path, caplog):
    """Two nodes of one CPU at most, and none before they are asked for."""
    with head(brings=2):
        with pytest.raises(ClusterError, match=r"tracking\.uri: .* one node that can grow to several"):
            shared.check_runs(Storage(tmp_path), "sqlite:///x")
        # What it can never bring it says soon.
        for never in ({"cpus_per_worker": 2}, {"workers": 3}):
            with pytest.raises(ClusterError, match=r"can never hold this: its autoscaler has no kinds of nodes"):
                tune.concurrency_of(sweep_of(wait_seconds=PATIENCE_SECONDS, **never))
        with pytest.raises(ClusterError, match=r"not free within 0 s\. Found: nothing free"):
            tune.concurrency_of(sweep_of(wait_seconds=0))
        caplog.clear()
        assert tune.concurrency_of(sweep_of(wait_seconds=PATIENCE_SECONDS)) == 1
        assert "Waiting for 1 CPU; nothing free" in caplog.messages
        assert tune.concurrency_of(sweep_of(concurrency=2)) == 2, "for the second it is asked by trials"

        # What others have taken is not what is asked for: another node comes.
        holds = ray.remote(num_cpus=1)(Board).remote()
        ray.get(holds.read.remote(Seen()))
        one, two, three = (ClusterConfig(workers=n, wait_seconds=PATIENCE_SECONDS) for n in (1, 2, 3))
        assert room.wait_for(bundles(one), one)
        assert ray.cluster_resources()["CPU"] == 2
        # Nor may what is held be taken for what can never be.
        with pytest.raises(ClusterError, match=r"not free within 3 s\. Found: 1 CPU free\. Allowed: 2 CPUs"):
            room.wait_for(bundles(two), two.model_copy(update={"wait_seconds": 3}))
        ray.kill(holds)

        # More than it brings is wanted, and fewer are enough: they are taken as soon as it has said so.
        room.wait_for(bundles(two), two)  # until it is free again
        start = time.monotonic()
        assert room.wait_for(bundles(three), three, bundles(two))
        assert time.monotonic() - start < PATIENCE_SECONDS / 2
        assert "Starting with what there is: 2 CPUs free" in caplog.messages


def bundles(cluster: ClusterConfig) -> list[room.Bundle]:
    return room.bundles(cluster, [], streams_on_ray=False)
