"""Doors of the cluster that a run starts for itself: closed to who has no token, and to other machines."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planted_secrets import new_secret

ROOT = Path(__file__).parents[2]
LOOK = """
import json, os, pathlib, sys, urllib.error, urllib.request
import psutil, ray
from maskray.config.schema import ClusterConfig
from maskray.on_ray.cluster import connected

def status(token):
    request = urllib.request.Request(f"http://{ray._private.worker._global_node.webui_url}/api/jobs/")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code

with connected(ClusterConfig(embedded_cpus=1, dashboard=True)):
    file = pathlib.Path.home() / ".ray" / "auth_token"
    token = os.environ.get("RAY_AUTH_TOKEN") or (file.read_text().strip() if file.exists() else None)
    port = int(ray._private.worker._global_node.webui_url.rpartition(":")[2])
    mine = {p.pid for p in psutil.Process().children(recursive=True)}
    # Of one that ends meanwhile there is no command.
    commands = {p: " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}
    dashboards = [p for p, command in commands.items() if p.pid in mine and "dashboard.py" in command]
    found = {
        "statuses": [status(None), status("0" * 64), status(token)],
        "mode": file.stat().st_mode & 0o777 if file.exists() else None,
        "hosts": sorted({c.laddr.ip for p in dashboards for c in p.net_connections() if c.laddr.port == port}),
        "task": ray.get(ray.remote(lambda: 7).remote()),
        "in_commands": any(token and token in command for command in commands.values()),
    }
print(json.dumps(found))
"""

CLOSED = {"statuses": [401, 403, 200], "hosts": ["127.0.0.1"], "task": 7, "in_commands": False}

pytestmark = pytest.mark.ray


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def look(home: Path, **variables: str) -> dict[str, Any]:
    """What is found of an embedded cluster in an environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    mine = {"HOME": str(home), "RAY_TMPDIR": str(home), "PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=clean | mine | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_cluster_of_our_own_asks_for_a_token_that_it_has_made_and_only_this_user_can_read(home: Path):
    assert look(home) == CLOSED | {"mode": 0o600}


@pytest.mark.slow
def test_or_for_the_one_that_is_given(home: Path):
    assert look(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=new_secret("RAY_AUTH_TOKEN")) == CLOSED | {"mode": None}


@pytest.mark.slow
def test_without_a_token_the_dashboard_is_on_this_machine_alone(home: Path):
    found = look(home, RAY_AUTH_MODE="disabled")
    assert (found["statuses"], found["hosts"]) == ([200, 200, 200], ["127.0.0.1"])
