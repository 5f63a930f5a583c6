"""Trials of several workers under Ray Tune: whatever ends one, nothing of it is left, and the next one starts."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from ray import tune
from ray._private.state import actors
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.util.placement_group import placement_group_table

from maskray.config.schema import RunConfig
from maskray.data.storage import Storage
from maskray.evaluation import judgement
from maskray.on_ray import nested
from maskray.on_ray.stream import registered_checkpoint
from maskray.training import checkpoint

pytestmark = pytest.mark.ray

PACKAGE = str(Path(__file__).parents[2] / "platform")
CPUS = 2
STEPS, RUNG = 12, 5
GONE_SECONDS = 10.0
PATIENCE_SECONDS = 240.0  # with a sweep that does not get on
SCORE = "probe/knn"
# What Ray starts of itself, for no trial.
RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


# ---------------------------------------------------------------------------------------------------------- in a trial


def trial(parameters: dict) -> None:
    """What Tune runs."""
    point = parameters["point"]
    config = RunConfig.model_validate(point["config"])
    root = Storage(config.storage.path)
    folder = root.child("sweeps", "tiny-1", "trials", point["key"])

    def tell(step, metrics):
        tune.report({"step": step, "score": metrics.get(SCORE), "loss": metrics.get("pretrain/loss")})

    judge = Judge(Path(root.uri), point["key"], dies=point["fault"] == "worker")
    nested.train(config, root, folder, point["uri"], point["run_id"], judge, tell)
    tune.report({"step": config.optim.steps, "score": None, "loss": None, "complete": True})


class Judge:
    """As a run's probe. The first of the workers that asks may be killed at that."""

    def __init__(self, notes: Path, key: str, *, dies: bool) -> None:
        self.notes, self.key, self.dies = notes, key, dies

    def __call__(self, config: RunConfig, folder: Path) -> dict[str, float]:
        assert checkpoint.is_whole(folder)
        with (self.notes / f"{self.key}.judged").open("a") as file:
            file.write(f"{checkpoint.read_facts(folder).step}\n")
        if self.dies and not (self.notes / f"{self.key}.died").exists():
            (self.notes / f"{self.key}.died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return judgement.probe(config, folder, torch.device("cpu"), first=False)[-1].scores.metrics()


# ---------------------------------------------------------------------------------------------------------- the driver


class StopsSome(FIFOScheduler):
    """Ends trials at their rung."""

    def on_trial_result(self, tune_controller, trial, result):
        stops = trial.config["point"]["fault"] == "stopped" and result["score"] is not None
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE


class KillsSome(tune.Callback):
    """Ends the process of a trial that trains, as a watchdog does; and keeps what all of them said."""

    def __init__(self):
        self.said = defaultdict(list)

    def on_trial_result(self, iteration, trials, trial, result, **_):
        point = trial.config["point"]
        self.said[point["key"]].append((result["step"], result["score"], result["loss"]))
        if point["fault"] == "killed":
            ray.kill(trial.temporary_state.ray_actor)


@contextmanager
def cluster(folder: str, *, dashboard: bool = False) -> Iterator[None]:
    """An embedded one, all of whose CPUs two workers take."""
    ray.init(
        address="local",
        num_cpus=CPUS,
        include_dashboard=dashboard,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
        runtime_env={"env_vars": {"PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}},
    )
    try:
        yield
    finally:
        ray.shutdown()


ANOTHER = """
import sys, tempfile, ray
with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=folder)
    print("up", flush=True)
    sys.stdin.read()
    ray.shutdown()
"""


@contextmanager
def another_cluster() -> Iterator[None]:
    """On this machine: what asks for a cluster without saying which is told that there are two."""
    process = subprocess.Popen([sys.executable, "-c", ANOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert b"up" in process.stdout.readline()
        yield
    finally:
        process.communicate(timeout=60)


@pytest.fixture
def ray_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


def left() -> list[str]:
    """What there still is of trials in the cluster that this process started."""
    groups = [f"placement group {key}" for key, each in placement_group_table().items() if each["state"] != "REMOVED"]
    alive = [f"actor {each['ActorClassName']}" for each in actors().values() if each["State"] != "DEAD"]
    return [*groups, *alive, *processes(), *(["CPUs"] if ray.available_resources().get("CPU") != CPUS else [])]


def processes() -> list[str]:
    names = []
    for process in psutil.Process().children(recursive=True):
        try:
            names.append(" ".join(process.cmdline()[:1]))
        except psutil.Error:  # gone in the meantime
            continue
    return [name for name in names if name.startswith("ray::") and not name.startswith(RAYS_OWN)]


def seconds_until_nothing_is_left() -> float:
    start = time.monotonic()
    while found := left():
        assert time.monotonic() - start < GONE_SECONDS, found
        time.sleep(0.1)
    return time.monotonic() - start


@pytest.fixture
def sweep(tiny: Callable[..., RunConfig], tmp_path: Path, store) -> Callable[..., tuple[list, dict]]:
    """Runs trials, each with what befalls it: how they ended, and what they said by the way."""
    (tmp_path / "runs").mkdir()
    client = MlflowClient(store.uri)

    def run(name: str, *faults: str, cpus_per_worker: float = 1.0) -> tuple[list, dict]:
        config = tiny(
            optim={"steps": STEPS},
            training={"log_steps": 1, "checkpoint_steps": 4, "probe_at": [RUNG], "threads": 1},
            probe={"draws": 2, "figure_images": 1},
            cluster={"workers": 2, "cpus_per_worker": cpus_per_worker},
            storage={"path": str(tmp_path / "runs"), "keep_checkpoints": 1},
        )
        points = []
        for number, fault in enumerate(faults):
            raw = config.model_dump(mode="json")
            if fault == "nan":
                raw["optim"]["base_lr"] = 1e30
            run_id = client.create_run(store.experiment_id).info.run_id
            points.append({"key": f"{name}{number}", "fault": fault, "config": raw, "uri": store.uri, "run_id": run_id})
        kills = KillsSome()
        tuner = tune.Tuner(
            tune.with_resources(trial, nested.resources(config)),
            param_space={"point": tune.grid_search(points)},
            tune_config=tune.TuneConfig(
                scheduler=StopsSome(),
                reuse_actors=True,
                time_budget_s=PATIENCE_SECONDS,
                max_concurrent_trials=nested.concurrency(config, [ray.cluster_resources()]),
            ),
            run_config=tune.RunConfig(name=name, storage_path=str(tmp_path / "tune"), verbose=0, callbacks=[kills]),
        )
        return list(tuner.fit()), kills.said

    return run


def weights(folder: Path) -> str:
    newest = folder / registered_checkpoint(Storage(folder))
    return hashlib.sha256((newest / checkpoint.WEIGHTS).read_bytes()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- the tests


def judged(said: list[tuple]) -> list[tuple]:
    """What a trial said of its rungs: (step, score, loss)."""
    return [each for each in said if each[1] is not None]


def test_whatever_ends_a_trial_nothing_of_it_is_left_and_the_next_one_starts(sweep, tmp_path, ray_folder, store):
    """Each takes all of the cluster. Without a dashboard."""
    with cluster(ray_folder):
        (stopped, lost, killed), said = sweep("t", "stopped", "worker", "killed")
        seconds_until_nothing_is_left()

    assert stopped.error is None
    assert "complete" not in stopped.metrics
    ((step, score, loss),) = judged(said["t0"])
    assert step == stopped.metrics["step"] == RUNG
    assert 0.1 < score < 1

    # Lost between the checkpoint and its judgement: judged when it comes again, told once, and the same to the bit.
    assert lost.error is None
    assert lost.metrics["complete"]
    assert (tmp_path / "runs" / "t1.judged").read_text().split() == [str(RUNG)] * 2
    assert [each[:2] for each in judged(said["t1"])] == [(RUNG, score)]
    history = MlflowClient(store.uri).get_metric_history(lost.config["point"]["run_id"], "pretrain/loss")
    assert [m.step for m in history] == list(range(1, STEPS + 1))
    assert loss == history[RUNG - 1].value

    assert "died" in str(killed.error)


@pytest.mark.slow
def test_a_lost_worker_changes_no_bit_and_a_loss_that_is_not_finite_is_said(sweep, tmp_path, ray_folder):
    with cluster(ray_folder):
        (quiet, lost, nan), said = sweep("b", "none", "worker", "nan")
        seconds_until_nothing_is_left()
    trials = tmp_path / "runs" / "sweeps" / "tiny-1" / "trials"
    assert quiet.metrics["complete"]
    assert lost.metrics["complete"]
    assert weights(trials / "b0") == weights(trials / "b1")
    assert judged(said["b0"])[0][:2] == judged(said["b1"])[0][:2]
    assert "not finite at step" in str(nan.error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dashboard", "beside", "repeats"), [(False, False, 4), (True, False, 3), (True, True, 3)], ids=str
)
def test_ten_sweeps_whose_trials_take_all_there_is(sweep, ray_folder, dashboard, beside, repeats):
    """Two at once, or each alone."""
    with another_cluster() if beside else nullcontext(), cluster(ray_folder, dashboard=dashboard):
        for repeat in range(repeats):
            last = "killed" if repeat == 1 else "none"
            share = 0.5 if repeat % 2 == 0 else 1.0
            results, _ = sweep(f"r{repeat}-", "none", "stopped", "stopped", last, cpus_per_worker=share)
            gone = seconds_until_nothing_is_left()
            print(f"dashboard {dashboard}, beside {beside}, {share} CPUs a worker, {last}: gone in {gone:.1f} s")
            first, second, third, fourth = results
            assert first.metrics["complete"]
            assert second.metrics["score"] == third.metrics["score"] > 0
            assert "complete" not in second.metrics | third.metrics
            assert fourth.metrics["complete"] if last == "none" else "died" in str(fourth.error)
