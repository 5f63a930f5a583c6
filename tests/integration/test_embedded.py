"""The cluster that a run starts for itself: what its processes are given, and what they are prepared for."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[2] / "platform"
LOOK = """
import json, os, sys
import ray
from maskray.config.schema import ClusterConfig
from maskray.on_ray import stream
from maskray.on_ray.cluster import connected

def seen():
    names = ("PYTHONPATH", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S")
    return {
        "prepared": "maskray.data.stream" in sys.modules,
        "environment": dict(ray.get_runtime_context().runtime_env),
        "variables": {name: os.environ.get(name) for name in names},
    }

class Splitter:
    # As Ray Data's: its tasks are children of an actor.
    def ask(self):
        return ray.get(ray.remote(seen).remote())

before = dict(os.environ)
with connected(ClusterConfig(embedded_cpus=1)):
    changed = sorted(k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k))
    ray.get(stream.prepare_tasks(1))
    splitter = ray.remote(num_cpus=0)(Splitter).remote()
    print(json.dumps({"changed": changed, **ray.get(splitter.ask.remote())}))
"""

pytestmark = pytest.mark.ray


def look() -> dict[str, Any]:
    """What a task of an embedded cluster sees, and what became of its driver's variables."""
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_TRAIN_", "RAY_WARN_", "PYTHONPATH"))}
        # A job's file finds the package by itself, as this script does.
        script = f"import sys\nsys.path.insert(0, {str(PACKAGE)!r})\n{LOOK}"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=kept | {"RAY_TMPDIR": folder},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_its_processes_inherit_what_they_need_and_the_driver_keeps_what_it_had():
    found = look()
    assert found["environment"] == {}, "each process waits for an agent, and none that Ray had started is used"
    assert found["prepared"], "Ray started another process than the one that was prepared"
    assert found["variables"] == {
        "PYTHONPATH": str(PACKAGE),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    }
    assert "PYTHONPATH" not in found["changed"]
    assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in found["changed"], "a cluster that is joined later has notices"
