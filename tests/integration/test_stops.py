"""What is left when a run is stopped, and what a second launch of a finished run does. Without Ray: the same launch."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from maskray import cli, launch, preparing
from maskray.bare import BareLauncher
from maskray.config.load import dump, load
from maskray.config.schema import RunConfig
from maskray.data import lease
from maskray.data.storage import Storage
from maskray.preparing import prepare
from maskray.tracking import mlflow_runs
from maskray.training import stacks

pytestmark = pytest.mark.usefixtures("runs")

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "maskray.cli", "pretrain", "--launcher", "torch", "--config"]


def written(config: RunConfig, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def the_run(folder: Path) -> tuple[MlflowClient, object]:
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("maskray").experiment_id])
    return client, run


def test_sigterm_closes_the_mlflow_run_and_the_same_command_goes_on(tiny: Callable[..., RunConfig], tmp_path: Path):
    path = written(tiny(optim={"steps": 4000}), tmp_path)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*COMMAND, str(path)], cwd=ROOT / "platform", stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not list((tmp_path / "runs").glob("tiny-*/step_*")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(stacks.SIGNAL)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == cli.TERMINATED, (tmp_path / "log").read_text()
    assert "in pretrain\n" in (tmp_path / "log").read_text(), "where it stood, when it was asked"
    client, run = the_run(tmp_path)
    assert run.info.status == "KILLED"
    assert not list((tmp_path / "runs").glob("tiny-*/lease.json"))
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "pretrain/loss")]
    assert steps == list(range(2, 2 * len(steps) + 1, 2))


@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_a_finished_run_says_so_and_its_model_loads(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    path = written(tiny(), tmp_path)
    arguments = ["pretrain", "--launcher", "torch", "--config", str(path)]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert "before pretraining" in first
    assert cli.main(arguments) == 0
    second = capsys.readouterr().out
    assert "nothing to do" in second
    assert first.splitlines()[-8:] == second.splitlines()[-8:]

    client, run = the_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["mask.ratio"] == "0.75"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "probe/few_labels")] == [0, 12]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs/mlflow.db")
    encoder = mlflow.pyfunc.load_model("models:/tiny/1")
    features = encoder.predict(np.zeros((3, 8, 8, 1), np.uint8))
    assert features.shape == (3, 16)
    assert features.dtype == np.float32


def test_a_launch_that_dies_before_its_last_word_is_finished_by_the_next(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed after the model is registered, before the run is closed: nothing is done twice, and all is closed."""
    path = written(tiny(), tmp_path)
    arguments = ["pretrain", "--launcher", "torch", "--config", str(path)]
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_runs, "close_run", lambda *_: (_ for _ in ()).throw(SystemExit(9)))
        with pytest.raises(SystemExit):
            cli.main(arguments)
    assert the_run(tmp_path)[1].info.status == "RUNNING"
    assert cli.main(arguments) == 0
    client, run = the_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert len(client.search_model_versions("name = 'tiny'")) == 1


def test_the_other_launcher_does_not_take_a_run_over(
    tiny: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Path(prepare(tiny()).run.uri)
    run.mkdir(parents=True)
    (run / launch.LAUNCHER).write_text("ray")
    assert cli.main(["pretrain", "--launcher", "torch", "--config", str(written(tiny(), tmp_path))]) == cli.USER_MISTAKE
    assert "--launcher ray" in " ".join(capsys.readouterr().err.split())


def test_only_runs_that_nobody_can_be_running_are_closed(tiny: Callable[..., RunConfig], tmp_path: Path):
    here, gone = {launch.HOST_TAG: socket.gethostname()}, {"maskray.storage": str(tmp_path / "gone")}
    (tmp_path / "idle").mkdir()
    idle = {"maskray.storage": str(tmp_path / "idle")}
    assert launch.is_abandoned(here | idle, "mine")
    assert not launch.is_abandoned(here | gone, "mine")
    assert not launch.is_abandoned({launch.HOST_TAG: "elsewhere"} | idle, "mine")
    assert not launch.is_abandoned(here | idle | {"maskray.fingerprint": "mine"}, "mine")
    with lease.hold(Storage(tmp_path / "idle"), "idle"):
        assert not launch.is_abandoned(here | idle, "mine")


def test_a_password_in_the_tracking_uri_is_written_nowhere(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preparing, "open_store", lambda config, _: preparing.Store(config.uri, "1", "maskray"))
    prepared = prepare(tiny(tracking={"uri": "http://me:pa55word@host:5000"}))
    assert prepared.store.uri == "http://me:pa55word@host:5000"
    assert "pa55word" not in dump(prepared.config)
    assert "pa55word" not in repr(launch.card(prepared))


def test_pretraining_helps(digits: Path, tmp_path: Path):
    """The demo's config, shorter: the probe on 5 labels a class gains, on rows that were never trained on."""
    config = load(
        ROOT / "configs" / "pretrain" / "digits.yaml",
        [
            f"data.path={digits}",
            f"storage.path={tmp_path / 'runs'}",
            "optim.steps=400",
            "data.stream=local",
            f"data.cache_folder={tmp_path / 'cache'}",
        ],
    )
    summary = launch.launch(prepare(config), BareLauncher())
    assert summary.last_loss < 0.6 * summary.first_loss
    assert summary.judgement is not None
    assert summary.judgement.after.few_labels.mean > summary.judgement.before.few_labels.mean + 0.08


def test_a_run_starts_from_the_weights_of_another(tiny: Callable[..., RunConfig], tmp_path: Path):
    assert cli.main(["pretrain", "--launcher", "torch", "--config", str(written(tiny(), tmp_path))]) == 0
    (checkpoint,) = (tmp_path / "runs").glob("tiny-*/step_000000012-*")
    config = tiny(name="second", init_from=str(checkpoint), optim={"base_lr": 1e-9, "warmup_steps": 0})
    assert cli.main(["pretrain", "--launcher", "torch", "--config", str(written(config, tmp_path))]) == 0
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("maskray").experiment_id])
    losses = {
        r.info.run_name.split("-")[0]: [m.value for m in client.get_metric_history(r.info.run_id, "pretrain/loss")]
        for r in runs
    }
    assert losses["second"][0] < 1.2 * losses["tiny"][-1] < losses["tiny"][0]
