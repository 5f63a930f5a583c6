"""What is known of clusters without joining one."""

import subprocess
import sys

import pytest
import ray

from maskray.doctor import cluster
from maskray.doctor.finding import Level, Subject
from maskray.on_ray import room, shared

LOCAL = {"stream": "local"}


@pytest.fixture
def two_clusters():
    """Two processes that `ps` shows as the raylets of two clusters."""
    wait = "import sys; sys.stdin.read()"
    started = [
        subprocess.Popen(["raylet", "-c", wait, f"--gcs-address=127.0.0.1:{port}"], executable=sys.executable, stdin=-1)
        for port in (9, 10)
    ]
    yield
    for process in started:
        process.stdin.close()
        process.wait()


def test_several_clusters_and_none_of_them_named(looked, two_clusters, monkeypatch):
    assert looked(cluster.clusters, Subject()).level is Level.OK
    assert "127.0.0.1:9" in looked(cluster.clusters, Subject()).found
    found = looked(cluster.clusters, Subject(address="auto"))
    assert (found.level, "export RAY_ADDRESS=" in found.fix) == (Level.FAIL, True)
    assert looked(cluster.clusters, Subject(address="127.0.0.1:9")).level is Level.OK
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert looked(cluster.clusters, Subject(address="auto")).level is Level.OK


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home without a token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


HEAD = "head:6379"


@pytest.mark.parametrize(
    ("environment", "mode", "address", "level", "words"),
    [
        ({}, None, None, Level.OK, "Ray makes one"),
        ({}, None, HEAD, Level.WARNING, "only a cluster without one"),
        ({"RAY_AUTH_MODE": "disabled"}, None, None, Level.WARNING, "whoever reaches the ports"),
        ({"RAY_AUTH_MODE": "token"}, None, None, Level.FAIL, "ray get-auth-token --generate"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, None, None, Level.FAIL, "no token in /nowhere"),
        ({}, 0o644, None, Level.WARNING, "chmod 600"),
        ({"RAY_AUTH_MODE": "token"}, 0o640, HEAD, Level.FAIL, "chmod 600"),
        ({}, 0o600, HEAD, Level.FAIL, "export RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token"}, 0o600, HEAD, Level.OK, "for this user alone"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, None, HEAD, Level.OK, "in RAY_AUTH_TOKEN"),
    ],
)
def test_the_token(looked, home, monkeypatch, environment, mode, address, level, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if mode is not None:
        (home / ".ray").mkdir()
        (home / ".ray/auth_token").write_text("secret")
        (home / ".ray/auth_token").chmod(mode)
    found = looked(cluster.token, Subject(address=address))
    assert (found.level, words in f"{found.found} {found.fix}") == (level, True), found
    assert "secret" not in f"{found.found} {found.fix}"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "head", "ray://head:10001"])
def test_a_cluster_that_is_not_there(looked, address):
    assert looked(cluster.joined, Subject(address=address)).level is Level.FAIL


def test_a_dashboard_that_is_not_there(looked):
    found = looked(cluster.dashboard, Subject(address="http://127.0.0.1:9"))
    assert (found.level, "does not answer" in found.found) == (Level.FAIL, True)


def test_room_on_this_machine(looked, known):
    few = {"workers": 1, "embedded_cpus": 2}
    on_ray = looked(cluster.room, known(data={"stream": "ray"}, cluster=few))
    assert (on_ray.level, on_ray.found) == (Level.OK, "1 of 2 CPUs for 1 worker, and 1 for Ray Data")
    found = looked(cluster.room, known(data={"stream": "ray"}, cluster=few | {"workers": 2}))
    assert (found.level, "1 CPU short" in found.found, "cluster.workers" in found.fix) == (Level.FAIL, True, True)
    assert looked(cluster.room, known(cluster=few | {"workers": 2})).level is Level.OK  # they decode for themselves


@pytest.mark.parametrize(("least", "cpus", "level"), [(2, 2, Level.OK), (3, 3, Level.FAIL), (3, 4, Level.OK)])
def test_a_run_that_may_have_fewer_workers_needs_room_for_what_divides_a_step(looked, known, least, cpus, level):
    subject = known(cluster={"workers": 4, "min_workers": least, "embedded_cpus": cpus})
    assert subject.plan.groups_per_step == 4
    assert looked(cluster.room, subject).level is level


@pytest.mark.parametrize(("grows", "level"), [(True, Level.WARNING), (False, Level.FAIL)])
def test_what_an_autoscaler_may_bring_is_not_known_before_it_is_asked(looked, known, monkeypatch, grows, level):
    subject = known(cluster={"workers": 2})
    subject.nodes = [{"Resources": {}}]
    monkeypatch.setattr(cluster, "may_grow", lambda: grows)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    found = looked(cluster.room, subject)
    assert (found.level, "2 CPUs short" in found.found) == (level, True)


def test_places_that_not_all_nodes_see(looked, known, monkeypatch, tmp_path):
    subject = known(tracking={"uri": "http://mlflow:5000"})
    subject.nodes = [{"NodeID": name, "Resources": {}} for name in "ab"]
    monkeypatch.setattr(room, "nodes", lambda: subject.nodes)
    for answers, level, words in (
        ([True, True], Level.OK, "and the dataset, from 2 nodes"),
        ([False], Level.FAIL, "storage.path: the folder is not the same on all"),
        ([True, False], Level.FAIL, "data.path: the pictures are not on all"),
    ):
        left = iter(answers)
        monkeypatch.setattr(shared, "_on_all", lambda nodes, look, left=left: look() and next(left))
        found = looked(cluster.shared_places, subject)
        assert (found.level, words in found.found, list(left)) == (level, True, []), found
        assert list(tmp_path.iterdir()) == [], "a look leaves no folder behind"
