"""Probes beside a run on Ray: what they find, and what happens to a run whose probes die."""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from maskray.bare import BareLauncher
from maskray.config.schema import RunConfig
from maskray.credentials import Hidden
from maskray.data.storage import Storage
from maskray.evaluation import untold
from maskray.launch import launch
from maskray.on_ray import probe
from maskray.on_ray.probe import Told
from maskray.on_ray.train import RayLauncher
from maskray.preparing import prepare
from maskray.tracking.mlflow_runs import NOTE_TAG
from maskray.tracking.mlflow_store import DATABASE
from maskray.training.folders import PROBE, step_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STEPS, EVERY = 28, 4
TRACKED = {16: Hidden("http://127.0.0.1:9")}
"""To this probe alone MLflow is away: the launch tells what it found."""
KEYS = ("probe/few_labels", "probe/all_labels", "probe/knn")


@pytest.fixture
def run(tiny: Callable[..., RunConfig], mlflow_tables: Path, tmp_path: Path) -> Callable[[str], RunConfig]:
    def build(folder: str) -> RunConfig:
        (tmp_path / folder).mkdir()
        shutil.copy(mlflow_tables, tmp_path / folder / DATABASE)
        return tiny(
            optim={"steps": STEPS},
            training={"log_steps": 2, "checkpoint_steps": EVERY, "probe_steps": EVERY},
            probe={"limit_seconds": 30.0, "waiting": 6, "figure_images": 1, "draws": 2},
            storage={"path": str(tmp_path / folder)},
        )

    return build


def kept(folder: Path) -> dict[int, Path]:
    return {step_of(f.name): f for f in folder.glob("tiny-*/step_*")}


def weights(folder: Path) -> str:
    return hashlib.sha256((kept(folder)[STEPS] / "model.safetensors").read_bytes()).hexdigest()


def tracked(folder: Path) -> tuple[MlflowClient, Run]:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("maskray").experiment_id])
    return client, found


def curve(folder: Path, key: str) -> dict[int, float]:
    client, found = tracked(folder)
    points = client.get_metric_history(found.info.run_id, key)
    assert len({p.step for p in points}) == len(points), "a step was logged twice"
    return {p.step: p.value for p in points}


@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_probes_that_die_harm_nothing_and_those_that_live_decide_what_is_kept(
    run: Callable[[str], RunConfig], tmp_path: Path
):
    killed = tmp_path / "killed"

    def some_die(config: RunConfig, weights: Storage, told: Told) -> float:
        step = step_of(weights.uri.rpartition("/")[2])
        match step:
            case 4:
                os.kill(os.getpid(), signal.SIGKILL)
            case 8:
                raise MemoryError("no room for the features")
            case 12:
                sum(range(10**15))  # holds the interpreter's lock for days
            case 20:
                return 1.0
            case 24:
                if not killed.exists():  # the hook that waits for this very probe: it is started again
                    killed.touch()
                    (hook,) = [p for p in psutil.process_iter(["cmdline"]) if "run_validation_fn" in str(p.cmdline())]
                    hook.kill()
                    time.sleep(60)
                return 0.0
        return probe.judge(config, weights, replace(told, tracking=TRACKED.get(step, told.tracking)))

    launch(prepare(run("ray")), RayLauncher(probe=some_die))
    launch(prepare(run("bare")), BareLauncher())
    on_ray, bare = tmp_path / "ray", tmp_path / "bare"

    _, found = tracked(on_ray)
    assert found.info.status == "FINISHED"
    assert killed.exists()
    assert weights(on_ray) == weights(bare)
    notes = found.data.tags[NOTE_TAG]
    for step, why in ((4, "WorkerCrashedError"), (8, "MemoryError: no room for the features"), (12, "limit_seconds")):
        assert f"The probe at step {step} came to nothing: " in notes
        assert why in notes

    for key in KEYS:
        assert set(curve(bare, key)) == set(range(0, STEPS + 1, EVERY))
        assert curve(on_ray, key) == {step: curve(bare, key)[step] for step in (0, 16, STEPS)}
    assert set(kept(on_ray)) == {16, 20, STEPS}
    assert (kept(on_ray)[16] / PROBE).read_bytes() == expected_note(bare)
    (folder,) = on_ray.glob("tiny-*")
    assert untold.names(Storage(folder)) == []


def expected_note(bare: Path) -> bytes:
    metrics = {key: curve(bare, key)[16] for key in KEYS}
    return json.dumps({"step": 16, "score": metrics[KEYS[0]], "metrics": metrics}, indent=1).encode()
