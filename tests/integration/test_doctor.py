"""`maskray doctor` on real clusters: one that it joins with a token, and one that is too small."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import ray

from maskray.config.load import dump
from maskray.data.local import is_walked_locally
from maskray.doctor import cluster, machine
from maskray.doctor.finding import Level, Subject

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


class Head(NamedTuple):
    address: str
    dashboard: str
    environment: dict[str, str]


def free_ports(num: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` with a dashboard and a token."""
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        options = [f"--{name}={port}" for name, port in ports.items()]
        options += ["--num-cpus=3", "--object-store-memory=200000000", f"--temp-dir={folder}/ray"]
        options += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--block", "--head"]
        command = [str(Path(sys.executable).with_name("ray")), "start", *options]
        with Path(folder, "log").open("w") as log:
            # In a process group of its own: it has children.
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        found = Head(
            f"127.0.0.1:{ports['port']}",
            f"http://127.0.0.1:{ports['dashboard-port']}",
            environment | {"PYTHONPATH": str(ROOT / "platform")},
        )
        try:
            until = time.monotonic() + 120
            while cluster.dashboard(Subject(address=found.dashboard)).found.startswith(f"{found.dashboard} does not"):
                assert time.monotonic() < until, Path(folder, "log").read_text()[-2000:]
                time.sleep(0.5)
            yield found
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_a_cluster_with_a_token_is_joined_and_has_room(head, tiny, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump(tiny(data={"stream": "ray"}, cluster={"workers": 2})))
    command = [sys.executable, "-m", "maskray.cli", "doctor", "--config", str(path), "--address", head.address]
    done = subprocess.run(
        command, env=head.environment | {"COLUMNS": "200"}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for words in (
        f"ok cluster {head.address}: 1 node with 3 CPUs",
        f"ok dashboard {head.dashboard}, Ray {ray.__version__}",
        "ok room for workers 2 of 3 CPUs for 2 workers, and 1 for Ray Data",
        f"ok shared places {tmp_path}/runs and the dataset, from 1 node",
    ):
        assert words in lines
    assert [line for line in lines if line.startswith("ok memory ") and line.endswith(" a worker")]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("mode", "token", "says"), [("disabled", "", "wants a token"), ("token", "x", "another token")]
)
def test_a_dashboard_that_wants_another_token(head, looked, monkeypatch, mode, token, says):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    found = looked(cluster.dashboard, Subject(address=head.dashboard))
    assert (found.level, says in found.found) == (Level.FAIL, True), found
    assert "RAY_AUTH_TOKEN_PATH" in found.fix


def test_a_dashboard_of_another_ray(head, looked, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text())
    assert looked(cluster.dashboard, Subject(address=head.dashboard)).level is Level.OK
    monkeypatch.setattr(ray, "__version__", "2.59.0")
    found = looked(cluster.dashboard, Subject(address=head.dashboard))
    assert (found.level, "pip install" in found.fix) == (Level.FAIL, True)


def test_a_cluster_that_does_not_let_us_in(head, looked):
    start = time.monotonic()
    found = looked(cluster.joined, Subject(address=head.address))  # the tests' own mode is `disabled`
    assert (found.level, "wants a token" in found.found) == (Level.FAIL, True), found
    assert time.monotonic() - start < 5  # Ray itself asks again for half a minute


def test_a_cluster_that_is_too_small_is_said_without_waiting(ray_cluster, looked, known):
    subject = known(data={"stream": "ray"}, cluster={"workers": 2})
    subject.address, subject.nodes = "auto", ray.nodes()
    assert not is_walked_locally(subject.config.data, subject.dataset)
    assert looked(cluster.room, subject).level is Level.OK
    assert looked(machine.memory, subject).level is Level.OK
    assert looked(cluster.dashboard, subject).level is Level.WARNING  # it has none
    subject = known(data={"stream": "ray"}, cluster={"workers": 4, "cpus_per_worker": 2})
    subject.address, subject.nodes = "auto", ray.nodes()
    found = looked(cluster.room, subject)
    assert (found.level, "3 CPUs short" in found.found) == (Level.FAIL, True), found
