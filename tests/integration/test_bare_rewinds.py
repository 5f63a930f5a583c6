"""Launches that meet bad steps, without Ray: what is left out, what is said of it, and that all processes agree."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from maskray import launch
from maskray.bare import BareLauncher
from maskray.config.resolve import resolve
from maskray.config.schema import IngestConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.preparing import prepare
from maskray.tracking.mlflow_runs import NOTE_TAG
from maskray.tracking.mlflow_store import DATABASE
from maskray.training import checkpoint, folders, rewinds
from maskray.training.checkpoint import OPTIMIZER, WEIGHTS

TESTS = Path(__file__).parents[1]
PATIENCE_SECONDS = 180
ODD = "odd.png"

# As `bare.run`, but for several configs one after another: a launch costs seconds of imports in each process.
WORKER = """
import json, sys

import torch.distributed as dist

import maskray.training.step
from maskray import launch
from maskray.preparing import prepare
from maskray.bare import BareLauncher
from maskray.config.load import load
from maskray.errors import BadStepError
from planting import plant

factors, *configs = sys.argv[1:]
plant(maskray.training.step, {int(step): float(factor) for step, factor in json.loads(factors).items()})
dist.init_process_group("gloo")
ends = []
for config in configs:
    prepared, launcher = prepare(load(config)), BareLauncher(dist.get_rank(), dist.get_world_size())
    try:
        launch.launch(prepared, launcher) if dist.get_rank() == 0 else launcher.follow(prepared)
        ends.append("trained")
    except BadStepError as error:
        ends.append(f"stopped by {error.step}")
print("ends:", *ends, flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def dull(tmp_path_factory):
    """Gray images that are learned in a few steps, and one that nobody could learn: the loss leaps where it comes."""
    folder = tmp_path_factory.mktemp("dull")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(320):
        Image.fromarray(rng.integers(126, 130, (8, 8), np.uint8)).save(folder / "images" / f"{i:03}.png")
    Image.fromarray(255 * rng.integers(0, 2, (8, 8), np.uint8)).save(folder / "images" / ODD)
    config = IngestConfig(source=str(folder / "images"), destination=str(folder / "data"), group_rows=8)
    ingest(config, thread_mapper(1))
    return folder / "data"


def odd_step(config):
    """The first step that the odd image is trained in."""
    dataset = Dataset.open(config.data.path)
    plan = resolve(config, dataset.facts())
    spec = StreamSpec.of(config, plan, dataset)
    groups = [dataset.read_group(spec.plan.locate(position)[1]) for position in range(plan.num_row_groups)]
    return next(spec.step_of(p) for p, group in enumerate(groups) if any(ODD in key for key in group.keys))


def weights(folder):
    (run,) = (folder / "runs").glob("tiny-*")
    newest = max(run.glob("step_*"))
    optimizer = torch.load(newest / OPTIMIZER, weights_only=True)["state"]
    return load_file(newest / WEIGHTS), optimizer, checkpoint.read_facts(newest)


def same(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in other[0])
    assert all(torch.equal(one[1][n][name], value) for n, state in other[1].items() for name, value in state.items())


def the_run(folder):
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("maskray").experiment_id])
    return client, run


@pytest.fixture
def configured(tiny, tmp_path, mlflow_tables):
    """configured(name, **sections) -> config of a run in a folder of its own, with an MLflow of its own."""

    def make(name, **sections):
        (tmp_path / name / "runs").mkdir(parents=True)
        shutil.copy(mlflow_tables, tmp_path / name / "runs" / DATABASE)
        storage = {"path": str(tmp_path / name / "runs"), "keep_checkpoints": 9}
        config = tiny(storage=storage, probe={"enabled": False}, **sections)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return config

    return make


@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_an_image_that_makes_the_loss_leap_is_left_out_and_all_of_it_is_said(configured, dull, tmp_path):
    sections = {
        "data": {"path": str(dull), "flip_probability": 0.0, "crop": {"kind": "whole"}},
        "optim": {"global_batch": 8, "steps": 36, "base_lr": 0.3, "warmup_steps": 2},
    }
    watch = {"spike": {"factor": 4.0, "window": 6}}
    seed = next(s for s in range(99) if odd_step(configured(f"seed-{s}", seed=s, **sections)) in range(27, 34))
    made = configured("made", seed=seed, training=watch, **sections)
    step = odd_step(made)
    summary = launch.launch(prepare(made), BareLauncher())
    quiet = configured("quiet", seed=seed, training={"skip_steps": [step]}, **sections)
    launch.launch(prepare(quiet), BareLauncher())
    same(weights(tmp_path / "made"), weights(tmp_path / "quiet"))
    assert weights(tmp_path / "made")[2].skipped == [step]

    (run,) = (tmp_path / "made" / "runs").glob("tiny-*")
    (rewind,) = rewinds.read(Storage(run))
    assert (rewind.step, rewind.reason) == (step, "spike")
    assert rewind.back_to == max(folders.step_of(f.name) for f in run.glob("step_*") if folders.step_of(f.name) <= step)
    assert ODD in " ".join(rewind.message.split()) or "(8 images)" in rewind.message
    client, tracked = the_run(tmp_path / "made")
    assert tracked.info.status == "FINISHED"
    note = tracked.data.tags[NOTE_TAG]
    assert rewind.message in note
    assert f"**rewind** ({note.split('**rewind** (')[1][:19]} UTC): {rewind.text()}" in note
    assert tracked.data.tags["setting.training.skip_steps"] == f"[{step}]"
    steps = [m.step for m in client.get_metric_history(tracked.info.run_id, "pretrain/loss")]
    assert steps == list(range(2, 37, 2))
    (version,) = client.search_model_versions("name = 'tiny'")
    assert version.tags["maskray.views"] == str(35 * 8)
    assert f"left out: steps {step}" in client.get_registered_model("tiny").description + version.description
    assert summary.steps == 36


def test_a_launch_that_was_killed_before_it_trained_again_leaves_out_the_same(configured, tmp_path, monkeypatch):
    """Its record says so before all else."""

    class Killed(BaseException):
        pass

    from maskray.training.step import TrainStep
    from planting import planted

    monkeypatch.setattr(TrainStep, "__call__", planted(TrainStep.__call__, {6: float("nan")}))
    config = configured("made")
    with monkeypatch.context() as patch:
        write = rewinds._write
        patch.setattr(rewinds, "_write", lambda *what: (write(*what), (_ for _ in ()).throw(Killed)))
        with pytest.raises(Killed):
            launch.launch(prepare(config), BareLauncher())
    assert the_run(tmp_path / "made")[1].info.status == "KILLED"
    summary = launch.launch(prepare(config), BareLauncher())
    assert summary.steps == 12
    _, tracked = the_run(tmp_path / "made")
    assert "**rewind**" in tracked.data.tags[NOTE_TAG]
    assert tracked.data.tags["setting.training.skip_steps"] == "[6]"
    assert weights(tmp_path / "made")[2].skipped == [6]


def torchrun(place, factors, *configs):
    """Exit code and output of two processes that launch the configs."""
    (place / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'platform'}:{TESTS}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(place / "worker.py"), json.dumps(factors), *map(str, configs)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, output
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_two_processes_leave_out_the_same_and_stop_together(configured, tmp_path):
    two = {"cluster": {"workers": 2}}
    configured("made", **two)
    configured("quiet", training={"skip_steps": [5, 6, 10]}, **two)
    configured("stops", training={"rewinds": 1}, **two)
    paths = [tmp_path / name / "config.yaml" for name in ("made", "quiet", "stops")]
    code, output = torchrun(tmp_path, {5: "nan", 6: "nan", 10: "inf"}, *paths)
    assert code == 0, output[-4000:]
    assert output.count("ends: trained trained stopped by 6") == 2, output[-4000:]
    same(weights(tmp_path / "made"), weights(tmp_path / "quiet"))
    for name in ("made", "quiet"):
        assert weights(tmp_path / name)[2].skipped == [5, 6, 10]
        assert weights(tmp_path / name)[2].world_size == 2
    (run,) = (tmp_path / "made" / "runs").glob("tiny-*")
    assert [(each.step, each.back_to) for each in rewinds.read(Storage(run))] == [(5, 4), (6, 4), (10, 8)]
    (run,) = (tmp_path / "stops" / "runs").glob("tiny-*")
    assert [each.step for each in rewinds.read(Storage(run))] == [5]
    _, tracked = the_run(tmp_path / "stops")
    assert tracked.info.status == "FAILED"
    assert "not finite at step 6" in tracked.data.tags["maskray.ended"]
