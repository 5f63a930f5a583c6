"""Whole nodes that go and come, on real ones of one machine: the same images in the same steps, whatever is left."""

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from launches import Launches
from maskray.on_ray.stream import SNAPSHOT
from maskray.training.folders import step_of
from mlflow_server import Server
from outages import seconds_to_train, train_workers, wait_for

from .conftest import check_against, check_complete, note

pytestmark = pytest.mark.ray

NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}


class Nodes:
    """A head without CPUs, where the driver and the controller are, and nodes with two CPUs each."""

    def __init__(self, folder: str, num: int) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20, "temp_dir": folder}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(num):
            self.cluster.add_node(**NODE)

    def of(self, worker: psutil.Process) -> ray._private.node.Node:
        """The node that a process runs on: its raylet is the process's parent."""
        (node,) = [n for n in self.cluster.worker_nodes if raylet(n).pid in {p.pid for p in worker.parents()}]
        return node

    def with_workers(self) -> list[ray._private.node.Node]:
        return list({n.node_id: n for n in map(self.of, train_workers())}.values())

    def kill(self, node: ray._private.node.Node) -> None:
        """SIGKILL of all that runs there."""
        lost = [raylet(node), *raylet(node).children(recursive=True)]
        for process in lost:
            process.kill()
        psutil.wait_procs(lost)
        self.cluster.remove_node(node, allow_graceful=False)


def raylet(node: ray._private.node.Node) -> psutil.Process:
    (info,) = node.all_processes["raylet"]
    return psutil.Process(info.process.pid)


@pytest.fixture
def nodes() -> Iterator[Callable[[int], Nodes]]:
    """A cluster of so many nodes with CPUs."""
    made: list[Nodes] = []
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield lambda num: made.append(Nodes(folder, num)) or made[0]
        for each in made:
            each.cluster.shutdown()


@pytest.fixture
def on_nodes(launches, mlflow_tables: Path, tmp_path: Path) -> Iterator[Callable[..., Launches]]:
    """A run of two workers on a cluster of several nodes, tracked by a server that all of them reach."""
    shutil.copy(mlflow_tables, tmp_path / "mlflow.db")
    server = Server(tmp_path, tmp_path / "mlflow.db")
    server.start()

    def make(name: str, nodes: Nodes, steps: int, **of_cluster: object) -> Launches:
        of_cluster |= {"address": nodes.cluster.address, "wait_seconds": 60}
        run = launches(name, 2, cluster=of_cluster, optim={"steps": steps}, tracking={"uri": server.uri})
        run.tracking_uri = server.uri
        return run

    yield make
    server.kill()


def training(run: Launches, nodes: Nodes, step: int):
    """Launch, and wait until a step is trained."""
    process = run.start()
    run.wait_for_step(process, step)
    (node,) = nodes.with_workers()  # Ray packs them
    return process, node


@pytest.mark.slow
def test_a_node_lost_and_another_come(nodes, on_nodes, quiet):
    wanted, nodes = quiet(2), nodes(2)
    run = on_nodes("node", nodes, 40)
    process, node = training(run, nodes, 18)
    known = train_workers()
    nodes.kill(node)
    nodes.cluster.add_node(**NODE)
    seconds = seconds_to_train(run, known)
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    note("SIGKILL of a node, another one comes", "2", run, wanted, seconds)


@pytest.mark.slow
def test_a_node_that_is_taken_away_after_a_notice(nodes, on_nodes, quiet):
    """As a cloud does it: a notice with a deadline, SIGTERM to the node then."""
    notice_seconds = 10
    wanted, nodes = quiet(2, 120), nodes(3)
    run = on_nodes("notice", nodes, 120)
    process, node = training(run, nodes, 10)
    known = train_workers()
    deadline = time.time() + notice_seconds
    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=nodes.cluster.address).drain_node(
        node.node_id, preemption, "spot", int(1000 * deadline)
    )
    assert accepted, why
    at_notice = run.last_step()
    time.sleep(deadline - time.time())
    raylet(node).send_signal(signal.SIGTERM)
    assert run.last_step() > at_notice, "the time until the deadline was not used"
    assert "Notice that a node will be taken away: a checkpoint is made at once" in run.output()
    seconds = seconds_to_train(run, known)
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    note("SIGTERM of a node after a notice", "2", run, wanted, seconds)


@pytest.mark.slow
def test_workers_become_fewer_and_more_again(nodes, on_nodes, quiet, launches):
    steps = 400
    wanted, nodes = quiet(2, steps), nodes(2)
    run = on_nodes("elastic", nodes, steps, min_workers=1, grow_seconds=3)
    process, node = training(run, nodes, 18)
    known = train_workers()
    nodes.kill(node)
    shrunk = seconds_to_train(run, known)
    assert len(train_workers()) == 1
    known = train_workers()
    nodes.cluster.add_node(**NODE)
    wait_for(lambda: not set(known) & set(train_workers()), run)
    grown = seconds_to_train(run, known)
    assert len(train_workers()) == 2
    assert run.finish(process) == 0, run.output()
    check_complete(run)
    assert run.final_weights() == replayed(run, launches, steps).final_weights()
    like = "quiet run, stopped and restarted so"
    note("SIGKILL of a node, none comes", "2 → 1", run, wanted, shrunk, like)
    note("a node comes", "1 → 2", run, wanted, grown, like)


def replayed(run: Launches, launches: Callable[..., Launches], steps: int) -> Launches:
    """A run that is stopped, and started again with another number of workers, where the elastic one changed it."""
    counts = [workers for workers, _ in run.steps_trained().values()]
    changes = [step for step in range(1, steps) if counts[step] != counts[step - 1]]
    assert [counts[step] for step in (0, *changes)] == [2, 1, 2]
    other = launches("replayed", 2, optim={"steps": steps}, storage={"keep_checkpoints": steps})
    for start, stop in zip([0, *changes], [*changes, steps], strict=True):
        process = other.start("--set", f"cluster.workers={counts[start]}")
        if stop == steps:
            assert other.finish(process) == 0, other.output()
            break
        other.wait(process, lambda stop=stop: list(other.folder.glob(f"runs/kills-*/step_{stop:09d}-*/state.json")))
        other.kill(process)
        forget_what_is_newer(other, stop)
    return other


def forget_what_is_newer(run: Launches, step: int) -> None:
    """The record is made again from the checkpoints that are left."""
    for folder in run.run.glob("step_*"):
        if step_of(folder.name) > step:
            shutil.rmtree(folder)
    (run.run / SNAPSHOT).unlink(missing_ok=True)
