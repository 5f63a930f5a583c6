"""What a cluster of several nodes can hold, on real nodes of one machine."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from maskray.config.schema import IngestConfig, RunConfig
from maskray.data.storage import Storage
from maskray.errors import ClusterError
from maskray.on_ray import cluster, fit, growth, probe, shared
from maskray.on_ray.board import Seen
from nodes import add_node, head

pytestmark = pytest.mark.ray

PROBED = {"checkpoint_steps": 4, "probe_steps": 4}
SERVER = "http://mlflow:5000"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """A head, and a worker node with three CPUs."""
    with head() as nodes:
        add_node(nodes, num_cpus=3)
        yield


@pytest.fixture
def preflight(two_nodes: None, tiny: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., None]:
    def run(
        uri: str = SERVER,
        storage: str | None = None,
        probe_cpus: float = 0,
        least: int | None = None,
        images: str | None = None,
        **of_cluster: object,
    ) -> None:
        config = tiny(cluster={"wait_seconds": 0, **of_cluster}, probe={"cpus": probe_cpus}, training=PROBED)
        beside = probe.bundles(config)
        if images is not None:
            config = config.model_copy(update={"data": config.data.model_copy(update={"path": images})})
        cluster.preflight(config, Storage(storage or tmp_path), uri, beside, streams_on_ray=True, least=least)

    return run


def test_a_head_without_cpus_is_a_node_too(preflight):
    with pytest.raises(ClusterError, match=r"tracking.uri: an SQLite store cannot serve a cluster of 2 nodes"):
        preflight("sqlite:////runs/mlflow.db")


def test_a_folder_that_only_the_driver_sees_is_refused(preflight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the nodes' processes were started in another folder
    with pytest.raises(ClusterError, match=r"storage.path: the folder is not the same on all of the cluster's 2 nodes"):
        preflight(storage="/proc/self/cwd")


def test_images_that_only_the_driver_sees_are_refused(preflight):
    with pytest.raises(ClusterError, match=r"data.path: the pictures are not on all of the cluster's 2 nodes"):
        preflight(images=f"/proc/self/task/{os.getpid()}")  # of this process alone


def test_what_fits_is_let_through(preflight):
    preflight(workers=2, data_cpus=1)


def test_more_than_there_is_on_any_node(preflight):
    with pytest.raises(ClusterError, match="can never hold this run: 1 CPU short"):
        preflight(workers=3, data_cpus=1)
    with pytest.raises(ClusterError, match=r"1 CPU short\..* 1 CPU for a probe.*or let probes share .*: probe.cpus=0"):
        preflight(workers=2, data_cpus=1, probe_cpus=1)


def test_a_run_that_may_have_fewer_workers_starts_with_what_there_is(preflight, caplog):
    with pytest.raises(ClusterError, match=r"can never hold this run: 1 CPU short\. Found: 4 CPUs .*\(3 workers"):
        preflight(workers=4, data_cpus=1, least=3)
    preflight(workers=4, data_cpus=1, least=2)
    assert caplog.messages == ["Starting with what there is: 3 CPUs free"]


def test_heads_have_an_autoscaler_that_only_looks_on(two_nodes):
    assert not growth.may_grow()


@pytest.mark.parametrize("key", ["source", "destination"])
def test_an_ingest_from_or_into_a_folder_that_only_the_driver_sees_is_refused(two_nodes, tmp_path, monkeypatch, key):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    seen = {"source": str(tmp_path / "pictures"), "destination": str(tmp_path / "out")}
    shared.check_ingest(IngestConfig(**seen))
    with pytest.raises(ClusterError, match=rf"^{key}: .*all of the cluster's 2 nodes.*Found: /proc/self/cwd/pictures"):
        shared.check_ingest(IngestConfig(**seen | {key: "/proc/self/cwd/pictures"}))


def test_what_workers_warn_of_reaches_the_driver_once_and_without_rays_noise(two_nodes, caplog):
    board = fit.board()

    def warn() -> None:
        from maskray.on_ray.worker import tell_driver

        tell_driver(board)
        logging.getLogger("ray.data").warning("noise")
        for _ in range(3):
            logging.getLogger("maskray.training").warning("resumed with %d threads", 7)

    with fit.followed(board, lambda step, metrics: None):
        ray.get([ray.remote(warn).remote() for _ in range(2)])
    assert caplog.messages == ["resumed with 7 threads"]


def test_a_board_whose_process_is_lost_is_started_again(two_nodes, caplog):
    board, lines = fit.board("tiny-0"), list[tuple[int, dict[str, float]]]()

    def pid() -> int:
        found = ray.get(board.__ray_call__.remote(lambda _: os.getpid()))
        assert isinstance(found, int)
        return found

    def wait(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not until():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    with fit.followed(board, lambda step, metrics: lines.append((step, dict(metrics)))):
        board.started.remote()
        board.post.remote(4, {"pretrain/loss": 0.5})
        board.warn.remote("before")
        wait(lambda: bool(lines) and "before" in caplog.messages)
        time.sleep(2)  # what it has shown was read
        lost = pid()
        os.kill(lost, signal.SIGKILL)
        wait(lambda: pid() != lost)
        board.warn.remote("after")
        board.post.remote(8, {"pretrain/loss": 0.25})
        wait(lambda: len(lines) == 2 and "after" in caplog.messages)
    assert lines == [(4, {"pretrain/loss": 0.5}), (8, {"pretrain/loss": 0.25})]
    assert caplog.messages == ["before", "after"]
    totals = ray.get(board.read.remote(Seen())).totals
    assert (totals.starts, totals.values["maskray_step", ""]) == (1, 8.0)


def test_boards_outlive_the_nodes_of_the_workers(two_nodes):
    boards = [fit.board() for _ in range(6)]
    ray.get([board.read.remote(Seen()) for board in boards])
    nodes = {ray._private.state.actors(board._actor_id.hex())["Address"]["NodeID"] for board in boards}
    assert nodes == {ray.get_runtime_context().get_node_id()}
