"""Secrets are planted, everything is run with them, and all that is left behind is searched: none is found."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from maskray.config.load import merge
from maskray.config.schema import RunConfig
from maskray.data.storage import Storage
from mlflow_server import Server
from planted_secrets import Planted

ROOT = Path(__file__).parents[2]
TRIES, BUSY = 3, "The current node timed out during startup"
"""Ray gives its own processes 30 s to start, and no way to give them more: on a busy machine that may be too few."""


@dataclass
class Commands:
    """Commands as a user gives them, with secrets in their environment and in the URI of a real MLflow server."""

    folder: Path
    planted: Planted
    server: Server
    tracking_uri: str
    environment: dict[str, str]
    ray_folder: Path
    said: list[str] = field(default_factory=list)

    def run(self, command: str, config: dict[str, object], *options: str) -> subprocess.CompletedProcess[str]:
        """One of them, with all that it says kept among what is searched."""
        (self.folder / "configs").mkdir(exist_ok=True)
        path = self.folder / "configs" / f"{len(self.said)}.yaml"
        path.write_text(yaml.safe_dump(config))
        call = [sys.executable, "-m", "maskray.cli", "-v", command, "--config", str(path), *options]
        for _ in range(TRIES):
            done = subprocess.run(
                call, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=900
            )
            self.said.append(done.stdout + done.stderr)
            for name, text in (("", self.said[-1]), ("-unwrapped", "".join(self.said[-1].split()))):
                (self.folder / f"said-{len(self.said)}{name}.log").write_text(text)
            if BUSY not in done.stderr:
                break
        return done

    def finds(self, *more: Storage) -> str:
        """Hits in what the commands said and left: runs, MLflow's database, artifacts and log, Ray's logs."""
        shutil.rmtree(self.folder / "configs")  # whose URIs have the passwords: they are the user's own
        searched, hits = self.planted.found_below([self.folder, self.ray_folder, *more])
        assert searched > 20
        return "\n".join(hits)


@pytest.fixture
def commands(tmp_path: Path, mlflow_tables: Path) -> Iterator[Commands]:
    planted, folder = Planted(), tmp_path / "all"
    folder.mkdir()
    shutil.copy(mlflow_tables, folder / "server.db")
    server = Server(folder, folder / "server.db")
    try:
        server.start()
        with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
            uri = planted.within(server.uri, "tracking.uri")
            yield Commands(folder, planted, server, uri, _environment(planted, folder, ray_folder), Path(ray_folder))
    finally:
        server.kill()


def _environment(planted: Planted, folder: Path, ray_folder: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    settings = {
        "AWS_ACCESS_KEY_ID": "planted",
        "MLFLOW_TRACKING_USERNAME": "planted",
        "PYTHONPATH": str(ROOT / "platform"),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": ray_folder,
        "HOME": str(folder),  # Ray writes a token there, where it makes one
    }
    return clean | planted.variables | settings


@pytest.fixture
def run_config(commands: Commands, tiny: Callable[..., RunConfig]) -> Callable[..., dict[str, object]]:
    """The plain config of a tiny run, with sections laid over it."""

    def build(**sections: object) -> dict[str, object]:
        places = {
            "storage": {"path": str(commands.folder / "runs")},
            "tracking": {"uri": commands.tracking_uri},
            "probe": {"draws": 2, "figure_images": 1},
        }
        return tiny(**merge(places, sections)).model_dump(mode="json")

    return build


def test_a_run_leaves_no_secret_behind(commands: Commands, run_config: Callable[..., dict[str, object]]):
    done = commands.run("pretrain", run_config(), "--launcher", "torch")
    assert done.returncode == 0, done.stderr
    commands.server.kill()
    failed = commands.run("pretrain", run_config(name="away", seed=1), "--launcher", "torch")
    assert failed.returncode == 2
    assert "no MLflow answers there" in failed.stderr
    assert commands.finds() == ""


@pytest.mark.slow
@pytest.mark.ray
def test_nothing_leaves_a_secret_behind(
    commands: Commands,
    run_config: Callable[..., dict[str, object]],
    bucket: str,
    digits_in_bucket: str,
    object_store: str,
    digits: Path,
):
    commands.environment |= {"AWS_ENDPOINT_URL": object_store, "AWS_REGION": "us-east-1"}
    places = {"data": {"path": digits_in_bucket}, "storage": {"path": f"{bucket}/runs"}}
    run = run_config(name="on-ray", cluster={"embedded_cpus": 3, "dashboard": True}, **places)
    done = commands.run("pretrain", run)
    assert done.returncode == 0, done.stderr
    bare = commands.run("pretrain", run_config(name="bare", seed=1), "--launcher", "torch")
    assert bare.returncode == 0, bare.stderr
    sweep = {
        "name": "swept",
        "base": run_config(name="base", cluster={"embedded_cpus": 2}, **places),
        "space": {"mask.ratio": {"values": [0.5, 0.75]}},
        "seeds": [0],
        "register_best": {"name": "best"},
    }
    swept = commands.run("sweep", sweep)
    assert swept.returncode == 0, swept.stdout + swept.stderr
    tracking = {"storage": {"path": f"{bucket}/runs"}, "tracking": {"uri": commands.tracking_uri}}
    evaluation = {
        "name": "worth",
        "model": "models:/on-ray/1",
        "data": {"path": digits_in_bucket},
        "evaluations": [{"kind": "knn", "k": [5]}],
        "cluster": {"embedded_cpus": 2},
        **tracking,
    }
    evaluated = commands.run("evaluate", evaluation, "--out", "worth")
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    promotion = {"model": "on-ray", "data": {"path": digits_in_bucket}, **tracking}
    promoted = commands.run("promote", promotion)
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    commands.server.kill()
    for launcher in ("ray", "torch"):
        failed = commands.run("pretrain", run_config(name="away", seed=2), "--launcher", launcher)
        assert failed.returncode == 2, failed.stderr
    assert commands.finds(Storage(bucket)) == ""
