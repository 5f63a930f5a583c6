"""kill -9 of a sweep's driver: resumed, it ends as one that was not, to the bit; MLflow holds each trial once."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from conftest import TINY
from maskray.cli import INTERRUPTED, TERMINATED
from maskray.config.load import merge
from maskray.config.sweep import LOSS, load_sweep
from maskray.sweeping import preparing
from maskray.sweeps import record
from maskray.sweeps.record import Result
from maskray.tracking.mlflow_runs import NOTE_TAG, PARENT_TAG, TRIAL_TAG
from maskray.tracking.mlflow_store import DATABASE
from trials import alone

pytestmark = pytest.mark.ray

STEPS, LOG_STEPS = 40, 2
RATIOS, SEEDS = [0.25, 0.5, 0.75], [0, 1]
TRIALS = len(RATIOS) * len(SEEDS)
GONE_SECONDS = 60.0


@pytest.fixture
def sweep(launches, digits: Path, mlflow_tables: Path) -> Callable[[str], "Sweep"]:
    """A sweep of six trials, two at once."""

    def make(name: str) -> Sweep:
        run = launches(name, workers=1)
        run.command = "sweep"
        base = merge(
            TINY,
            {
                "data": {"path": str(digits), "cache_folder": str(run.folder / "cache")},
                "optim": {"steps": STEPS},
                "training": {"log_steps": LOG_STEPS},
                "probe": {"draws": 2, "figure_images": 1},
                "cluster": {"embedded_cpus": 2},
                "storage": {"path": str(run.folder / "runs")},
            },
        )
        config = {"name": "kills", "base": base, "space": {"mask.ratio": RATIOS}, "seeds": SEEDS}
        run.config.write_text(yaml.safe_dump(config))
        return Sweep(run)

    return make


class Sweep:
    """All launches of one sweep."""

    def __init__(self, run) -> None:
        self.run, self.trials = run, run.folder / "runs" / record.SWEEPS / "kills-1" / record.TRIALS

    def started(self, *options: str) -> subprocess.Popen[bytes]:
        return self.run.start("--rate", "1e9", *options)

    def checkpoints(self) -> list[Path]:
        return list(self.trials.glob("*/step_*/state.json"))

    def ended(self) -> dict[str, Result]:
        files = self.trials.glob(f"*/{record.RESULT}")
        return {file.parent.name: Result.load(file.read_bytes(), str(file)) for file in files}

    def wait_for_checkpoint(self, process: subprocess.Popen[bytes]) -> None:
        """Of a trial that has not ended."""
        self.run.wait(process, lambda: {each.parts[-3] for each in self.checkpoints()} - self.ended().keys())

    def kill(self, process: subprocess.Popen[bytes], num_ended: int) -> None:
        """SIGKILL, as soon as so many trials have ended and another has a checkpoint."""
        self.run.wait(process, lambda: len(self.ended()) >= num_ended)
        self.wait_for_checkpoint(process)
        below = of_ray(process)
        process.kill()
        process.wait()
        gone(below)

    def tracked(self) -> tuple[MlflowClient, Run, dict[str, Run]]:
        """The parent, and its children by the trials' keys."""
        client = MlflowClient(f"sqlite:///{self.run.folder}/runs/{DATABASE}")
        runs = client.search_runs([client.get_experiment_by_name("maskray").experiment_id])
        (parent,) = [run for run in runs if PARENT_TAG not in run.data.tags]
        children = {run.data.tags[TRIAL_TAG]: run for run in runs if run is not parent}
        assert len(children) == len(runs) - 1, "a trial has two runs"
        assert all(run.data.tags[PARENT_TAG] == parent.info.run_id for run in children.values())
        return client, parent, children

    def statuses(self) -> tuple[str, set[str]]:
        _, parent, children = self.tracked()
        return parent.info.status, {child.info.status for child in children.values()}


def of_ray(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """What a driver's cluster is, and its trials. Ray's agents stay for half a minute: they do nothing."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [each for each in found if not any("Agent" in part or "agent" in part for part in each.cmdline()[:3])]


def gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
    assert not alive


def table(ended: dict[str, Result]) -> dict[str, tuple]:
    return {key: (each.status, each.steps, each.value, dict(each.metrics)) for key, each in ended.items()}


def check(sweep: Sweep, wanted: dict[str, tuple]) -> None:
    assert table(sweep.ended()) == wanted
    client, parent, children = sweep.tracked()
    assert parent.info.status == "FINISHED"
    assert children.keys() == wanted.keys()
    for child in children.values():
        assert child.info.status == "FINISHED"
        for key in (LOSS, "pretrain/lr"):
            steps = [point.step for point in client.get_metric_history(child.info.run_id, key)]
            assert sorted(steps) == list(range(LOG_STEPS, STEPS + 1, LOG_STEPS)), "once each"
        assert [point.step for point in client.get_metric_history(child.info.run_id, "probe/knn")] == [STEPS]


def what_it_comes_to(sweep: Sweep, folder: Path) -> dict[str, tuple]:
    """The table of the same sweep, each trial trained in this process and never interrupted."""
    prepared = preparing.prepare(load_sweep(sweep.run.config), resume=True)
    metrics = {each.key: alone(prepared.space, each, folder / each.key) for each in prepared.trials}
    return {key: ("finished", STEPS, found["probe/knn"], found) for key, found in metrics.items()}


@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_a_driver_that_is_killed_half_way(sweep: Callable[[str], Sweep], tmp_path: Path):
    killed = sweep("killed")
    killed.kill(killed.started(), TRIALS // 2)
    before = table(killed.ended())
    assert TRIALS // 2 <= len(before) < TRIALS
    assert killed.statuses()[0] == "RUNNING", "there was nobody to say otherwise"
    assert killed.run.finish(killed.started("--resume")) == 0, killed.run.output()
    wanted = what_it_comes_to(killed, tmp_path / "alone")
    assert before.items() <= wanted.items()
    check(killed, wanted)


@pytest.fixture(scope="module")
def quiet() -> dict[str, tuple]:
    """The table of an uninterrupted sweep."""
    return {}


def uninterrupted(sweep: Callable[[str], Sweep], quiet: dict[str, tuple]) -> dict[str, tuple]:
    if not quiet:
        whole = sweep("quiet")
        assert whole.run.finish(whole.started()) == 0, whole.run.output()
        quiet |= table(whole.ended())
        check(whole, quiet)
        assert len(quiet) == TRIALS
    return quiet


@pytest.mark.slow
@pytest.mark.parametrize("num_ended", [0, TRIALS // 2, TRIALS - 1])
def test_a_driver_that_is_killed(sweep: Callable[[str], Sweep], quiet: dict[str, tuple], num_ended: int):
    wanted = uninterrupted(sweep, quiet)
    killed = sweep("killed")
    killed.kill(killed.started(), num_ended)
    assert killed.run.finish(killed.started("--resume")) == 0, killed.run.output()
    check(killed, wanted)


HUNGRY = """
import time
from pathlib import Path
import numpy as np
from maskray.sweeping import life, preparing
from maskray.config.sweep import load_sweep
from maskray.on_ray.sweep import trial, tune
from maskray.on_ray.cluster import connected

def train(parameters, sweep):
    asked = trial.Asked.load(parameters[trial.ASKED]).trial
    held = []
    while asked.point["mask.ratio"] == 0.5 and asked.seed == 0:
        assert len(held) < {most}, "nobody ends it"
        held.append(np.ones(2**28, np.uint8))
        time.sleep(0.3)
    trial.run(parameters, sweep)

prepared = preparing.prepare(load_sweep(Path({config!r})))
with connected(prepared.space.base.cluster), life.begun(prepared) as run_id:
    tune.run(prepared, run_id, lambda *_: None, train)
    results = life.finish(prepared, run_id)
raise SystemExit(int(life.has_failed(prepared.config, results)))
"""
ROOM, TOO_MUCH = 5 * 2**30, 9 * 2**30


@pytest.mark.slow
def test_a_trial_that_rays_memory_monitor_ends(sweep: Callable[[str], Sweep]):
    """The monitor's threshold lies a little above what is in use: the machine is in no danger."""
    memory = psutil.virtual_memory()
    if memory.available < TOO_MUCH + 4 * 2**30:
        pytest.skip("too little memory")
    hungry = sweep("hungry")
    threshold = (memory.total - memory.available + ROOM) / memory.total
    environment = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    script = HUNGRY.format(config=str(hungry.run.config), most=TOO_MUCH // 2**28)
    with (hungry.run.folder / "output.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=hungry.run.environment | environment, stdout=log, stderr=log
        )
        hungry.run.processes.append(process)
        assert hungry.run.finish(process) == 0, hungry.run.output()
    _, parent, children = hungry.tracked()
    assert parent.info.status == "FINISHED"
    ended = hungry.ended()
    (lost,) = [each for each in ended.values() if each.status != "finished"]
    assert (lost.status, lost.trial.point["mask.ratio"], lost.trial.seed) == ("failed", 0.5, 0)
    assert re.match(r"out of memory: \S+GB of its node's \S+GB, and Ray's memory monitor ended it", lost.reason)
    assert len(ended) == TRIALS
    assert children[lost.trial.key].info.status == "FAILED"
    assert "out of memory" in children[lost.trial.key].data.tags[NOTE_TAG]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_a_driver_that_is_told_to_stop(sweep: Callable[[str], Sweep], quiet: dict[str, tuple], number, code: int):
    """Ctrl-C goes to all that the terminal started; SIGTERM, as `ray job stop` sends it, to the driver."""
    wanted = uninterrupted(sweep, quiet)
    stopped = sweep("stopped")
    process = stopped.started()
    stopped.run.wait(process, lambda: len(stopped.ended()) >= 2)
    stopped.wait_for_checkpoint(process)
    below, start = of_ray(process), time.monotonic()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert stopped.run.finish(process) == code, stopped.run.output()
    seconds = time.monotonic() - start
    print(f"{number.name}: {seconds:.1f} s until it had ended")
    gone(below)
    assert "With --resume the same command goes on" in " ".join(stopped.run.output().split())
    parent, children = stopped.statuses()
    assert parent == "KILLED"
    assert children == {"FINISHED", "KILLED"}
    assert all(each.status == "finished" for each in stopped.ended().values()), "what was ended has not failed"
    assert stopped.run.finish(stopped.started("--resume")) == 0, stopped.run.output()
    check(stopped, wanted)
