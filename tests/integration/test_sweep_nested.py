"""Trials of several workers under Ray Tune: whatever ends one, nothing of it is left, and the next one starts."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest
import ray
import torch
import yaml
from mlflow import MlflowClient
from ray import tune
from ray._private.state import actors
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.util.placement_group import placement_group_table

from maskray import cli
from maskray.config.schema import RunConfig
from maskray.data import cache
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.evaluation import judgement
from maskray.on_ray.stream import registered_checkpoint
from maskray.on_ray.sweep import nested
from maskray.sweeps import record
from maskray.tracking.mlflow_runs import FIGURES
from maskray.training import checkpoint

pytestmark = pytest.mark.ray

PACKAGE = str(Path(__file__).parents[2] / "platform")
CPUS = 2
STEPS, RUNG = 12, 5
GONE_SECONDS = 10.0
PATIENCE_SECONDS = 480.0  # with a sweep that does not get on
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

    judge = Judge(Path(point["notes"]), point["key"], point["fault"])
    found = nested.train(config, root, folder, point["uri"], point["run_id"], judge, tell, STEPS)
    if point["fault"] == "killed at its end":
        os.kill(os.getpid(), signal.SIGKILL)  # before anybody has heard what it is worth
    tune.report({"step": STEPS, "score": None, "loss": None, "complete": True, "found": found})


class Judge:
    """As a run's probe; and the first time that it is asked at a step, it may be the end of a process."""

    def __init__(self, notes: Path, key: str, fault: str) -> None:
        self.notes, self.key, self.fault = notes, key, fault

    def __call__(self, config: RunConfig, folder: Path) -> judgement.Finding:
        assert checkpoint.is_whole(folder)
        step, before = checkpoint.read_facts(folder).step, judged_at(self.notes / self.key)
        is_first = not before
        with (self.notes / self.key).open("a") as file:
            file.write(f"{step}\n")
        if (is_first and self.fault == "worker") or (before == [RUNG] and self.fault == "worker at its end"):
            os.kill(os.getpid(), signal.SIGKILL)
        if is_first and self.fault == "controller":
            (controller,) = [p for p in psutil.Process().parent().children() if "ray::_Controller" in str(p.cmdline())]
            controller.kill()
            time.sleep(60)  # and goes with it
        return judgement.probe(config, folder, torch.device("cpu"), first=False)[-1]._replace(title=self.key)


def judged_at(notes: Path) -> list[int]:
    """The steps whose checkpoints were judged, in order."""
    return [int(line) for line in notes.read_text().split()] if notes.exists() else []


# ---------------------------------------------------------------------------------------------------------- the driver


class StopsSome(FIFOScheduler):
    """Ends trials at their rung."""

    def on_trial_result(self, tune_controller, trial, result):
        stops = trial.config["point"]["fault"] == "stopped" and result["score"] is not None
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE


class KillsSome(tune.Callback):
    """Ends the process of a trial that trains, or is at its rung, as a watchdog does; and keeps what all said."""

    def __init__(self):
        self.said, self.was_there = defaultdict(list), set()

    def on_trial_result(self, iteration, trials, trial, result, **_):
        point = trial.config["point"]
        self.said[point["key"]].append((result["step"], result["score"], result["loss"]))
        self.was_there.update(left())
        if point["fault"] == "killed" or (point["fault"] == "killed at its rung" and result["score"] is not None):
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


@contextmanager
def background(function: Callable[[], None]) -> Iterator[None]:
    """A thread that runs a function while the block runs, and has ended when it is left."""
    thread = threading.Thread(target=function)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def left() -> list[str]:
    """What there still is of trials in the cluster that this process started."""
    groups = [f"placement group of {len(g['bundles'])}" for g in placement_group_table().values() if is_there(g)]
    alive = [f"actor {each['ActorClassName']}" for each in actors().values() if each["State"] != "DEAD"]
    return [*groups, *alive, *processes(), *(["CPUs"] if ray.available_resources().get("CPU") != CPUS else [])]


def is_there(group: dict) -> bool:
    return group["state"] != "REMOVED"


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
def sweep(tiny: Callable[..., RunConfig], tmp_path: Path, store) -> Callable[..., tuple[list, KillsSome]]:
    """Runs trials, each with what befalls it: how they ended, and what they said by the way."""
    (tmp_path / "notes").mkdir()
    client, run_ids = MlflowClient(store.uri), {}

    def run(name: str, *faults: str, cpus_per_worker=1.0, root=None, keys=None, kills=None) -> tuple[list, KillsSome]:
        config = tiny(
            optim={"steps": STEPS},
            training={"log_steps": 1, "checkpoint_steps": 4, "probe_at": [RUNG], "threads": 1},
            probe={"draws": 2, "figure_images": 1},
            cluster={"workers": 2, "cpus_per_worker": cpus_per_worker},
            storage={"path": root or str(tmp_path / "runs"), "keep_checkpoints": 1},
        )
        points, common = [], {"uri": store.uri, "notes": str(tmp_path / "notes")}
        for number, fault in enumerate(faults):
            raw = config.model_dump(mode="json")
            if fault == "nan":
                raw["optim"]["base_lr"] = 1e30
            key = keys[number] if keys else f"{name}{number}"
            raw["training"]["ledger"] = str(tmp_path / "ledger" / key)
            run_ids.setdefault(key, client.create_run(store.experiment_id).info.run_id)
            points.append({"key": key, "fault": fault, "config": raw, "run_id": run_ids[key], **common})
        kills = kills or KillsSome()
        tuner = tune.Tuner(
            tune.with_resources(trial, nested.resources(config.cluster)),
            param_space={"point": tune.grid_search(points)},
            tune_config=tune.TuneConfig(
                scheduler=StopsSome(),
                reuse_actors=True,
                time_budget_s=PATIENCE_SECONDS,
                max_concurrent_trials=nested.concurrency(config.cluster, [ray.cluster_resources()]),
            ),
            run_config=tune.RunConfig(name=name, storage_path=str(tmp_path / "tune"), verbose=0, callbacks=[kills]),
        )
        return list(tuner.fit()), kills

    return run


def weights(root: Path | str, key: str) -> str:
    folder = Storage(root).child("sweeps", "tiny-1", "trials", key)
    newest = folder.child(registered_checkpoint(folder))
    return hashlib.sha256(newest.read_bytes(checkpoint.WEIGHTS)).hexdigest()


def pictures(client: MlflowClient, run_id: str) -> list[str]:
    return [file.path for file in client.list_artifacts(run_id, f"{FIGURES}/pretrain")]


# ----------------------------------------------------------------------------------------------------------- the tests


def judged(said: list[tuple]) -> list[tuple]:
    """What a trial said of its rungs: (step, score, loss)."""
    return [each for each in said if each[1] is not None]


def test_whatever_ends_a_trial_nothing_of_it_is_left_and_the_next_one_starts(sweep, tmp_path, ray_folder, store):
    """Each takes all of the cluster. Without a dashboard."""
    with cluster(ray_folder):
        (stopped, killed, quiet), seen = sweep("t", "stopped", "killed", "none")
        seconds_until_nothing_is_left()

    # One group, of Tune's, and none of Train's; nothing that outlives the trial by design.
    there = {name for name in seen.was_there if name.startswith(("placement", "actor", "CPUs"))}
    known = {"_Controller", "RayTrainWorker", "TrialBoard", "SynchronizationActor", "PreemptionWatcher", "ImplicitFunc"}
    assert there == {"placement group of 2", "CPUs", *(f"actor {name}" for name in known)}

    assert stopped.error is None
    assert "complete" not in stopped.metrics
    ((step, score, loss),) = judged(seen.said["t0"])
    assert step == stopped.metrics["step"] == RUNG
    assert 0.1 < score < 1

    assert "died" in str(killed.error)

    assert quiet.error is None
    assert quiet.metrics["complete"]
    assert judged(seen.said["t2"])[0][:2] == (RUNG, score)
    history = MlflowClient(store.uri).get_metric_history(quiet.config["point"]["run_id"], "pretrain/loss")
    assert [m.step for m in history] == list(range(1, STEPS + 1))
    assert loss == history[RUNG - 1].value

    # Judged by the first worker after its last step too, which is no rung.
    assert judged_at(tmp_path / "notes" / "t2") == [RUNG, STEPS]
    found, client, run_id = quiet.metrics["found"], MlflowClient(store.uri), quiet.config["point"]["run_id"]
    assert found["pretrain/loss"] == history[-1].value
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, SCORE)] == [(5, score), (12, found[SCORE])]
    assert pictures(client, run_id) == ["figures/pretrain/reconstruction-step-000012.png"]
    assert record.painted(Storage(tmp_path / "runs" / "sweeps" / "tiny-1" / "trials" / "t2")).keys() >= {"painted"}


@pytest.mark.slow
def test_lost_processes_change_no_bit_and_a_loss_that_is_not_finite_is_said(sweep, tmp_path, ray_folder):
    with cluster(ray_folder):
        results, seen = sweep("b", "none", "worker", "controller", "nan")
        seconds_until_nothing_is_left()
    *trained, nan = results
    # Lost between a checkpoint and its judgement: judged when they come again, told once, and the same to the bit.
    assert all(each.metrics["complete"] for each in trained)
    quiet, *lost = [weights(tmp_path / "runs", f"b{number}") for number in range(3)]
    assert lost == [quiet] * 2
    # With the loss, which who came again had not logged.
    assert len({tuple(judged(seen.said[f"b{number}"])) for number in range(3)}) == 1
    assert all(loss > 0 for _, _, loss in judged(seen.said["b0"]))
    notes = [judged_at(tmp_path / "notes" / f"b{number}") for number in range(3)]
    assert notes == [[5, 12], [5, 5, 12], [5, 5, 12]]
    assert len({each.metrics["found"][SCORE] for each in trained}) == 1
    assert "not finite at step" in str(nan.error)


@pytest.mark.slow
def test_a_trial_that_was_killed_goes_on_and_says_again_what_it_was_worth(sweep, tmp_path, ray_folder, store):
    """Nobody may have heard it."""
    with cluster(ray_folder):
        (_, killed), seen = sweep("g", "none", "killed at its rung")
        (again,), seen_then = sweep("h", "none", keys=["g1"])
        seconds_until_nothing_is_left()
    assert "died" in str(killed.error)
    assert again.metrics["complete"]
    quiet, before, then = (judged(said) for said in (seen.said["g0"], seen.said["g1"], seen_then.said["g1"]))
    assert quiet[0][:2] == before[0][:2] == then[0][:2]
    assert len(quiet) == len(before) == len(then) == 1
    assert weights(tmp_path / "runs", "g0") == weights(tmp_path / "runs", "g1")
    history = MlflowClient(store.uri).get_metric_history(again.config["point"]["run_id"], "pretrain/loss")
    assert [m.step for m in history] == list(range(1, STEPS + 1))
    steps = [json.loads(line)["step"] for line in (tmp_path / "ledger" / "g1" / "0.jsonl").read_text().splitlines()]
    # From its rung on, or from the checkpoint before, where Train had not yet put that one on record.
    assert steps.count(0) == 1
    assert steps[-(STEPS - RUNG) :] == list(range(RUNG, STEPS))


@pytest.mark.slow
def test_a_trial_that_was_killed_after_its_last_judgement_is_not_judged_again(sweep, tmp_path, ray_folder, store):
    with cluster(ray_folder):
        (quiet, killed), _ = sweep("l", "none", "killed at its end")
        (again,), seen_then = sweep("m", "none", keys=["l1"])
        seconds_until_nothing_is_left()
    assert "died" in str(killed.error)
    assert again.metrics["complete"]
    assert judged_at(tmp_path / "notes" / "l1") == [RUNG, STEPS]
    assert again.metrics["found"][SCORE] == quiet.metrics["found"][SCORE]
    assert again.metrics["found"]["pretrain/loss"] == quiet.metrics["found"]["pretrain/loss"]
    assert judged(seen_then.said["l1"]) == [], "its rung was told before"
    client, run_id = MlflowClient(store.uri), again.config["point"]["run_id"]
    assert [m.step for m in client.get_metric_history(run_id, SCORE)] == [RUNG, STEPS]
    assert pictures(client, run_id) == ["figures/pretrain/reconstruction-step-000012.png"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "ledger" / "l1" / "0.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS)), "nothing is trained again"


@pytest.mark.slow
def test_a_worker_that_is_lost_in_the_last_judgement_judges_when_it_comes_again(sweep, tmp_path, ray_folder):
    with cluster(ray_folder):
        (quiet, lost), _ = sweep("e", "none", "worker at its end")
        seconds_until_nothing_is_left()
    assert judged_at(tmp_path / "notes" / "e1") == [RUNG, STEPS, STEPS]
    assert lost.metrics["found"][SCORE] == quiet.metrics["found"][SCORE]
    assert weights(tmp_path / "runs", "e0") == weights(tmp_path / "runs", "e1")


@pytest.mark.slow
def test_a_trial_that_waits_for_its_images_to_be_decoded_says_that_it_lives(sweep, tmp_path, ray_folder, digits):
    """Another process of the machine decodes them, and takes its time."""
    entry = tmp_path / "cache" / cache._name(Dataset.open(str(digits)), 1)
    entry.parent.mkdir()
    seen = KillsSome()
    told = seen.said["w0"]

    def let_it_go_on():
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(told) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        fcntl.flock(lock, fcntl.LOCK_UN)

    with entry.with_name(f"{entry.name}.lock").open("ab") as lock, cluster(ray_folder):
        fcntl.flock(lock, fcntl.LOCK_EX)
        with background(let_it_go_on):
            (waited,), _ = sweep("w", "none", kills=seen)
        seconds_until_nothing_is_left()
    assert waited.metrics["complete"]
    assert told[:3] == [(0, None, None)] * 3
    assert judged(told)[0][0] == RUNG


@pytest.mark.slow
def test_trials_that_are_kept_in_a_bucket(sweep, tmp_path, ray_folder, bucket):
    with cluster(ray_folder):
        (kept, copied), seen = sweep("k", "none", "worker", root=f"{bucket}/runs")
        seconds_until_nothing_is_left()
    assert kept.metrics["complete"]
    assert copied.metrics["complete"]
    assert weights(f"{bucket}/runs", "k0") == weights(f"{bucket}/runs", "k1")
    assert judged(seen.said["k0"])[0][0] == judged(seen.said["k1"])[0][0] == RUNG
    assert kept.metrics["found"][SCORE] == copied.metrics["found"][SCORE]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_a_sweep_whose_trials_take_several_workers(tiny, tmp_path, ray_folder, monkeypatch):
    """As a user starts it: two workers of a CPU each, on two CPUs."""
    monkeypatch.setenv("RAY_TMPDIR", ray_folder)
    base = tiny(
        optim={"steps": 40},
        cluster={"workers": 2, "embedded_cpus": CPUS},
        probe={"draws": 2},
        storage={"path": str(tmp_path / "runs")},
    )
    asked = {
        "name": "two",
        "base": base.model_dump(mode="json"),
        "space": {"mask.ratio": [0.5, 0.75]},
        "seeds": [0, 1],
        "stopping": {"kind": "asha", "unit": "steps", "first": 10, "reduction": 2},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(asked))
    assert cli.main(["sweep", "--config", str(tmp_path / "sweep.yaml"), "--rate", "1e11"]) == 0
    assert processes() == []

    results = record.results(Storage(tmp_path / "runs" / "sweeps" / "two-1")).values()
    assert len(results) == 4
    ended = Counter(each.status for each in results)
    assert set(ended) == {"finished", "pruned"}
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    for each in results:
        run = client.get_run(each.run_id)
        assert run.info.status == ("FINISHED" if each.status == "finished" else "KILLED")
        curve = client.get_metric_history(each.run_id, SCORE)
        assert [m.step for m in curve] == [step for step in (10, 20, 40) if step <= each.steps]
        assert curve[-1].value == each.value
        is_painted = record.painted(Storage(tmp_path / "runs" / "sweeps" / "two-1" / "trials" / each.trial.key))
        assert (is_painted is not None) == bool(pictures(client, each.run_id)) == (each.status == "finished")


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
