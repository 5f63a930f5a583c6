"""Whether a cluster has room for a sweep's trials: one that grows, and one that others have taken."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import _internal_kv_get, internal_kv_get_gcs_client

from maskray import sweeping
from maskray.config.load import merge, parse
from maskray.config.schema import RunConfig
from maskray.config.sweep import SweepConfig
from maskray.errors import ClusterError
from maskray.on_ray import sweep
from maskray.on_ray.board import Board
from maskray.sweeping import Prepared
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
        prepared = sweeping.prepare(
            parse(SweepConfig, {"name": "grows", "base": base, "space": space, "seeds": [0], "trials": trials})
        )
        return replace(prepared, store=replace(prepared.store, uri=SERVER))

    return make


def may_bring(*kinds: tuple[int, int]) -> None:
    """What an autoscaler tells Ray when it starts: CPUs of each kind of node, and how many there may be."""
    config = autoscaler_pb2.ClusterConfig()
    for number, (cpus, most) in enumerate(kinds):
        kind = config.node_group_configs.add(name=f"kind-{number}", max_count=most)
        kind.resources["CPU"] = cpus
    internal_kv_get_gcs_client().report_cluster_config(config.SerializeToString())


def asked_for() -> list[dict[str, float]]:
    """What an autoscaler is asked for."""
    return list(json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or b"[]"))


def test_what_can_never_be_is_refused_and_what_may_still_be_is_waited_for(sweep_of, caplog):
    with head() as nodes:
        with pytest.raises(ClusterError, match=r"no room for a trial.*Found: 1 CPU .*what one node has: 0 CPUs"):
            sweep.concurrency_of(sweep_of())

        may_bring((1, 2))
        with pytest.raises(ClusterError, match=r"trials\.concurrency: .*room for 2 trials at once\. Found: 3 of 1 CPU"):
            sweep.concurrency_of(sweep_of(concurrency=3))
        with pytest.raises(ClusterError, match=r"no room for a trial.*what one node has: 0 CPUs; or 1 CPUs"):
            sweep.concurrency_of(sweep_of(cpus_per_worker=2))
        assert caplog.messages == [], "what can never be is not waited for"
        with pytest.raises(
            ClusterError, match=r"cluster\.wait_seconds: .*not free within 0\.5 s\. Found: nothing free"
        ):
            sweep.concurrency_of(sweep_of())

        caplog.clear()
        patient = sweep_of(wait_seconds=PATIENCE_SECONDS)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(sweep.concurrency_of, patient)
            while not (asked := asked_for()) and not waiting.done():
                time.sleep(0.05)
            add_node(nodes, num_cpus=1)  # as an autoscaler does then
            assert waiting.result() == 2
        assert asked == [{"CPU": 1.0, "GPU": 0.0}]
        assert "Waiting for 1 CPU; nothing free" in caplog.messages
        assert asked_for() == [], "nodes may go again"
        assert sweep.concurrency_of(sweep_of(concurrency=1)) == 1

        # Two workers of a CPU each: one of them has its place.
        with pytest.raises(ClusterError, match=r"not free within 0\.5 s\. Found: 1 CPU free\. Allowed: 2 CPUs"):
            sweep.concurrency_of(sweep_of(workers=2))

        # The only place is taken, and becomes free.
        holds = ray.remote(num_cpus=1)(Board).remote()
        ray.get(holds.read.remote(0))
        with pytest.raises(ClusterError, match=r"not free within 0\.5 s\. Found: nothing free"):
            sweep.concurrency_of(sweep_of())
        caplog.clear()
        end = threading.Timer(1.0, ray.kill, [holds])
        end.start()
        assert sweep.concurrency_of(sweep_of(wait_seconds=PATIENCE_SECONDS)) == 2
        end.join()
        assert "Waiting for 1 CPU; nothing free" in caplog.messages
