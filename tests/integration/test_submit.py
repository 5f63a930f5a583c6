"""Jobs on a real cluster with dashboard and token: a job that ends well, one that cannot, one that is stopped."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from launches import is_worker
from maskray import cli
from maskray.training import stacks
from planted_secrets import Planted
from ray_head import BIN, ROOT, Head

pytestmark = pytest.mark.ray

PATIENCE_SECONDS = 240
DEMO = "configs/pretrain/digits.yaml"


def planted() -> Planted:
    """Secrets for an environment in which the cluster's token is in a file."""
    planted = Planted()
    del planted.variables["RAY_AUTH_TOKEN"], planted.secrets["RAY_AUTH_TOKEN"]
    return planted


@pytest.fixture(scope="module")
def of_node() -> Planted:
    """Secrets that the node has in its environment, and the token; whoever submits has others."""
    return planted()


@pytest.fixture(scope="module")
def head(of_node: Planted) -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = Head(Path(folder), num_cpus=3, variables=of_node.variables)
        of_node.secrets["RAY_AUTH_TOKEN"] = head.token.read_text()
        try:
            head.start()
            yield head
        finally:
            head.stop()


class Client:
    """The commands of somebody whose shell is not on the cluster."""

    def __init__(self, head: Head, digits: Path, folder: Path) -> None:
        self.head, self._digits, self._folder = head, digits, folder
        self.log = folder / "log"
        self.environment = head.environment | {"PYTHONPATH": str(ROOT / "platform")}
        self._processes: list[subprocess.Popen[str]] = []

    def maskray(self, *arguments: str) -> subprocess.Popen[str]:
        return self.run(sys.executable, "-m", "maskray.cli", *arguments)

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        return self.maskray("submit", "--address", self.head.address, *arguments)

    def run(self, *command: str) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, text=True)
        self._processes.append(process)
        return process

    def wait(self, process: subprocess.Popen[str]) -> int:
        return process.wait(PATIENCE_SECONDS)

    def until(self, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def said(self) -> str:
        """All that the commands have said, on one line."""
        return " ".join(self.log.read_text().split())

    def demo(self, *settings: str) -> list[str]:
        """The demo's command, short, and where it keeps what comes of it."""
        given = {
            "data.path": str(self._digits),
            "data.cache_folder": str(self._folder / "cache"),
            "storage.path": str(self._folder / "runs"),
            "tracking.system_metrics_seconds": "null",
            "training.probe_steps": "null",
        }
        overrides = [*(f"{key}={value}" for key, value in given.items()), *settings]
        return ["pretrain", "--config", DEMO, *(part for item in overrides for part in ("--set", item))]

    def job(self, job: str) -> dict:
        """What the cluster knows of it."""
        token = {"Authorization": f"Bearer {self.head.token.read_text()}"}
        request = urllib.request.Request(f"{self.head.address}/api/jobs/{job}", headers=token)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def search(self, planted: Planted) -> tuple[int, list[str]]:
        """Files of the cluster, the runs and what was said that were searched, and what was found in them."""
        while True:
            try:
                return planted.found_below([self._folder, self.head.folder / "ray"])
            except FileNotFoundError:  # the cluster is running, and replaces files of its own
                continue

    def tracked(self) -> tuple[MlflowClient, Run]:
        client = MlflowClient(f"sqlite:///{self._folder}/runs/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("maskray").experiment_id])
        return client, run

    def trained(self) -> bool:
        """Whether there is a checkpoint."""
        return bool(list(self._folder.glob("runs/digits-*/step_*/state.json")))

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def client(head: Head, digits: Path, tmp_path: Path) -> Iterator[Client]:
    client = Client(head, digits, tmp_path)
    yield client
    client.end()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command that has a mistake in it says in this process, on one line."""
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == cli.USER_MISTAKE
        return " ".join(capsys.readouterr().err.split())

    return run


def test_the_demo_ends_well_with_a_registered_model_and_leaves_no_secret(client: Client, of_node: Planted):
    of_client = planted()
    client.environment |= of_client.variables
    steps = ("optim.steps=8", "optim.warmup_steps=2", "training.log_steps=4", "training.checkpoint_steps=4")
    submitted = client.submit("--submission-id", "demo", "--env", "MINE=1", "--", *client.demo(*steps))
    assert client.wait(submitted) == 0, client.log.read_text()
    assert "demo: SUCCEEDED" in client.said()
    assert "models:/digits/1" in client.said(), "the job's own words are passed on"
    mlflow, run = client.tracked()
    assert run.info.status == "FINISHED"
    assert [str(v.version) for v in mlflow.search_model_versions("name = 'digits'")] == ["1"]
    found = client.job("demo")
    assert run.data.tags["mlflow.source.git.commit"] == found["metadata"]["maskray.commit"]
    assert found["metadata"]["maskray.config"] == "digits"
    assert found["runtime_env"]["env_vars"]["MINE"] == "1"

    assert "Not sent: MLFLOW_" in client.said()
    assert (client.head.folder / "ray/session_latest/logs/job-driver-demo.log").is_file()
    for secrets in (of_client, of_node):
        assert secrets.found_in(json.dumps(found, ensure_ascii=False).encode()) == []
        searched, hits = client.search(secrets)
        assert hits == []
        assert searched > 100, "with the package as it was unpacked"


def test_a_secret_that_lay_there_would_be_found(client: Client, of_node: Planted):
    name = "MLFLOW_TRACKING_PASSWORD"
    left = client.head.folder / "ray/session_latest/logs/left.log"
    left.write_text(of_node.secrets[name])
    try:
        assert client.search(of_node)[1] == [f"{left.resolve()}: {name}, raw"]
    finally:
        left.unlink()


def test_a_broken_config_is_found_before_and_in_the_job_by_the_same_words(client: Client, here: Callable[..., str]):
    broken = client.demo("mask.ratio=1.5")
    message = here(*broken)
    assert "mask" in message
    assert here("submit", "--address", client.head.address, "--submission-id", "unsent", "--", *broken) == message
    # As Ray's own command has it, nothing is checked here.
    job = (str(BIN / "ray"), "job", "submit", "--address", client.head.address, "--submission-id", "broken")
    sent = client.run(*job, "--working-dir", str(ROOT), "--", "python", "jobs/pretrain.py", *broken[1:])
    assert client.wait(sent) == 1
    found = client.job("broken")
    assert found["status"] == "FAILED"
    assert message in " ".join(found["message"].split())
    assert (found["end_time"] - found["start_time"]) / 1000 < 15


def test_what_only_the_cluster_can_see_fails_with_the_code_and_the_words_of_the_command(
    client: Client, here: Callable[..., str]
):
    absent = client.demo("data.path=/nowhere/digits")
    message = here(*absent)
    assert "/nowhere/digits" in message
    assert client.wait(client.submit("--submission-id", "absent", "--", *absent)) == 2
    found = client.job("absent")
    assert found["status"] == "FAILED"
    assert message in " ".join(found["message"].split())


def test_a_stopped_job_is_no_success_and_leaves_nothing_open(client: Client):
    settings = ("optim.steps=100000", "training.log_steps=2", "training.checkpoint_steps=10")
    first = client.submit("--submission-id", "long", "--", *client.demo(*settings))
    client.until(lambda: client.trained() or first.poll() is not None)
    first.send_signal(signal.SIGTERM)  # whoever follows a job may go home
    assert client.wait(first) == 143, client.log.read_text()
    assert f"--address {client.head.address} --stop long" in client.said()
    assert client.job("long")["status"] == "RUNNING"

    (worker,) = [p.pid for p in client.head.processes() if is_worker(p)]
    (errors,) = (client.head.folder / "ray/session_latest/logs").glob(f"worker-*-{worker}.err")
    os.kill(worker, stacks.SIGNAL)
    client.until(lambda: "in pretrain\n" in errors.read_text())  # the runbook's answer to "it hangs"
    assert client.job("long")["status"] == "RUNNING"

    second = client.submit("--follow", "long")
    of_job = [p for p in client.head.processes() if _is_of_training(p)]
    assert of_job
    assert client.wait(client.submit("--stop", "long")) == 0, client.log.read_text()
    assert client.job("long")["status"] == "STOPPED"
    assert client.wait(second) == 143
    assert client.tracked()[1].info.status == "KILLED"
    assert not list(Path(client._folder / "runs").glob("digits-*/lease.json"))
    _, alive = psutil.wait_procs(of_job, timeout=20)
    assert alive == []
    assert [p for p in client.head.processes() if _is_of_training(p)] == []


def _is_of_training(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:  # gone in the meantime
        return False
    return "RayTrainWorker" in command or "maskray.cli" in command or "TrainController" in command


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RAY_AUTH_TOKEN": "f" * 64}, "the cluster does not take this token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}, "the cluster wants a token, and none was sent"),
    ],
)
def test_a_wrong_token_or_none_is_said_with_the_cure(client: Client, change: dict[str, str], words: str):
    client.environment |= change
    assert client.wait(client.submit("--follow", "demo")) == 2
    assert words in client.said()
    assert "RAY_AUTH_TOKEN_PATH" in client.said()
