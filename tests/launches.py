"""Real launches in processes of their own, that can be killed, and what is left of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from maskray.config.load import merge
from maskray.data.storage import TEMPORARY, Storage
from maskray.tracking.mlflow_store import DATABASE
from maskray.training.checkpoint import WEIGHTS

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 600
HUNG, SLOW, CLOCK = "hung", "slow", "clock"
"""Files in a run's folder by which its machine goes wrong; the last two hold seconds."""
# Python runs it at the start of every process. Uploads copy files so; the last of them, state.json, never comes while
# the disk is hung. A clock is set in those processes that are started while the file of that name is there.
MACHINE = """
import pathlib, shutil, time

folder = pathlib.Path({folder!r})
copy, sleep, now, now_ns = shutil.copyfileobj, time.sleep, time.time, time.time_ns

def said(name):
    try:
        return float((folder / name).read_text())
    except (OSError, ValueError):
        return 0.0

def copy_when_the_disk_is_there(source, target, *arguments, **options):
    while str(getattr(source, "name", "")).endswith({weights!r}) and (folder / {hung!r}).exists():
        sleep(0.01)
    sleep(said({slow!r}))
    copy(source, target, *arguments, **options)

shutil.copyfileobj = copy_when_the_disk_is_there
def set_time():
    return now() + said({clock!r})

def set_time_ns():
    return now_ns() + int(1e9 * said({clock!r}))

if (folder / {clock!r}).exists():
    # Named functions: Ray sends its own actors' classes, which hold one, to other processes.
    time.time, time.time_ns = set_time, set_time_ns
"""


def is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline()[:1])
    except psutil.Error:  # gone in the meantime
        return False


@dataclass
class Launches:
    """All launches of one run: the command, again and again, in one storage folder."""

    folder: Path
    config: Path
    environment: dict[str, str]
    command: str = "pretrain"
    tracking_uri: str | None = None
    storage: str | None = None
    """Where runs are kept, if not in the folder."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    killed: set[int] = field(default_factory=set)

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """The command that a user would type."""
        command = [sys.executable, "-m", "maskray.cli", self.command, "--config", str(self.config), *options]
        with (self.folder / "output.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # Whoever runs the tests in the background has Ctrl-C ignored, and so have all that they start.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        self.processes.append(process)
        return process

    def finish(self, process: subprocess.Popen[bytes]) -> int:
        return process.wait(PATIENCE_SECONDS)

    def output(self) -> str:
        return (self.folder / "output.log").read_text()[-6000:]

    @property
    def run(self) -> Path:
        (run,) = [p for p in (self.folder / "runs").iterdir() if p.name.startswith("kills-")]
        return run

    def lines(self) -> list[dict]:
        """The ledger of all launches and workers."""
        out = []
        for path in sorted((self.folder / "ledger").glob("*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    out.append(json.loads(line) | {"rank": int(path.stem)})
                except json.JSONDecodeError:  # cut short by a kill: the step is trained again
                    continue
        return out

    def last_step(self) -> int:
        return max((line["step"] for line in self.lines()), default=-1)

    def wait_for_step(self, process: subprocess.Popen[bytes], step: int) -> None:
        self.wait(process, lambda: self.last_step() >= step)

    @contextmanager
    def hung_upload(self, process: subprocess.Popen[bytes]) -> Iterator[Path]:
        """The folder of a checkpoint whose upload does not get on while the block runs; none was killed before."""

        def hung() -> list[Path]:
            return [partial.parent for partial in self.run.glob(f"step_*/{TEMPORARY}*{WEIGHTS}")]

        disk = self.folder / HUNG
        disk.touch()
        self.wait(process, hung)
        (folder,) = hung()
        yield folder
        disk.unlink()

    def wait_for_workers(self, process: subprocess.Popen[bytes]) -> None:
        """Until there are workers that were not killed before, and they have trained a step."""
        self.wait(process, lambda: {p.pid for p in self.workers(process)} - self.killed != set())
        trained = len(self.lines())
        self.wait(process, lambda: len(self.lines()) > trained)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL of the driver, until its cluster is gone too: a worker may live on for seconds."""
        cluster = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(cluster, timeout=PATIENCE_SECONDS)

    def cut_the_record(self) -> None:
        """What a kill in the middle of writing leaves of Train's record."""
        record = self.run / "checkpoint_manager_snapshot.json"
        record.write_bytes(record.read_bytes()[:100])

    def workers(self, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Train workers of this launch."""
        return [
            p for p in psutil.Process(process.pid).children(recursive=True) if p.pid not in self.killed and is_worker(p)
        ]

    def kept(self) -> Storage:
        """The run's folder, wherever it is kept."""
        root = Storage(self.storage or self.folder / "runs")
        (name,) = [name for name in root.list_names() if name.startswith("kills-")]
        return root.child(name)

    def final_weights(self) -> str:
        """Digest of the weights in the checkpoint that Train has on record."""
        run = self.kept()
        latest = json.loads(run.read_bytes("checkpoint_manager_snapshot.json"))["latest_checkpoint_result"]
        return hashlib.sha256(run.read_bytes(f"{latest['checkpoint_dir_name']}/{WEIGHTS}")).hexdigest()

    def ledger(self) -> dict[tuple[int, int], tuple]:
        """(step, rank) → (positions, keys); a step that was trained twice must have been the same."""
        out: dict[tuple[int, int], tuple] = {}
        for line in self.lines():
            entry = (tuple(line["positions"]), tuple(line["keys"]))
            assert out.setdefault((line["step"], line["rank"]), entry) == entry, "a step was trained on other images"
        return out

    def steps_trained(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Step → (workers, positions of the plan), as it was trained last."""
        latest: dict[int, dict[int, list[int]]] = {}
        for line in self.lines():
            latest.setdefault(line["step"], {})[line["rank"]] = line["positions"]
        out = {}
        for step, by_rank in sorted(latest.items()):
            first = by_rank[0]
            workers = first[1] - first[0] if len(first) > 1 else len(by_rank)  # others trained it before, and were lost
            out[step] = workers, tuple(sorted(p for rank in range(workers) for p in by_rank[rank]))
        return out

    def status(self) -> str:
        """Of the one run that MLflow holds."""
        return str(self._tracked()[1].info.status)

    def metric_steps(self, key: str) -> list[int]:
        """Ascending, each as often as it is stored."""
        client, run = self._tracked()
        return sorted(m.step for m in client.get_metric_history(run.info.run_id, key))  # MLflow sorts by time

    def metrics(self, key: str) -> dict[int, float]:
        """By step."""
        client, run = self._tracked()
        return {m.step: m.value for m in client.get_metric_history(run.info.run_id, key)}

    def timestamps(self, key: str) -> dict[int, float]:
        """Seconds since 1970, by step."""
        client, run = self._tracked()
        return {m.step: m.timestamp / 1000 for m in client.get_metric_history(run.info.run_id, key)}

    def _tracked(self) -> tuple[MlflowClient, Run]:
        client = MlflowClient(self.tracking_uri or f"sqlite:///{self.folder}/runs/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("maskray").experiment_id])
        return client, run

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        # After a killed driver Ray's own processes go by themselves, but not all at once.
        for p in psutil.process_iter(["cmdline"]):
            if any(self.environment["RAY_TMPDIR"] in part for part in p.info["cmdline"] or []):
                p.kill()

    def wait(self, process: subprocess.Popen[bytes], ready: Callable[[], object]) -> None:
        """Until something is so; the process lives."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            assert process.poll() is None, f"ended too early\n{self.output()}"
            assert time.monotonic() < deadline, f"nothing happened\n{self.output()}"
            time.sleep(0.002)


@contextmanager
def launching(digits: Path, tables: Path, folder: Path) -> Iterator[Callable[..., Launches]]:
    """Makes runs of W workers, with sections laid over their config: `make("quiet", workers=2, optim={"steps": 8})`.

    Args:
        digits: dataset.
        tables: an empty MLflow store, of which each run has a copy.
        folder: for the runs.
    """
    made: list[Launches] = []

    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:

        def make(name: str, workers: int, **sections: object) -> Launches:
            place = folder / name
            (place / "runs").mkdir(parents=True)
            shutil.copy(tables, place / "runs" / DATABASE)
            config = place / "config.yaml"
            config.write_text(yaml.safe_dump(merge(_config(digits, place, workers), sections)))
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))} | {
                "PYTHONPATH": str(_source_root(place)),
                "RAY_AUTH_MODE": "disabled",
                "RAY_TMPDIR": ray_folder,
                "OMP_NUM_THREADS": "1",
            }
            made.append(Launches(place, config, environment))
            return made[-1]

        yield make
        for launch in made:
            launch.stop()


def _source_root(folder: Path) -> Path:
    """The package, on a machine that goes wrong when told: the driver and all of Ray's processes see it."""
    root = folder / "platform"
    root.mkdir()
    (root / "maskray").symlink_to(ROOT / "platform" / "maskray")
    (root / "sitecustomize.py").write_text(
        MACHINE.format(folder=str(folder), hung=HUNG, slow=SLOW, clock=CLOCK, weights=WEIGHTS)
    )
    return root


def _config(digits: Path, folder: Path, workers: int) -> dict:
    return {
        "name": "kills",
        "data": {
            "path": str(digits),
            "cache_folder": str(folder / "cache"),
            "image_size": 8,
            "channels": 1,
            "crop": {"kind": "random_resized", "scale": [0.6, 1.0]},
            "normalize": "symmetric",
            "stream": "ray",
            "groups_per_task": 3,
        },
        "model": {
            "patch": 2,
            "width": 64,
            "depth": 4,
            "heads": 4,
            "decoder": {"width": 64, "depth": 2, "heads": 4},
        },
        "objective": {"norm_pix": False},
        # 8 row groups a step, 11 steps a pass: the kills come in mid-epoch, and there are borders to cross.
        "optim": {"global_batch": 128, "steps": 40, "warmup_steps": 5, "base_lr": 2e-3},
        "training": {"log_steps": 2, "checkpoint_steps": 4, "deterministic": True, "ledger": str(folder / "ledger")},
        "probe": {"enabled": False},
        "cluster": {"workers": workers, "embedded_cpus": workers + 2, "max_failures": 6},
        "storage": {"path": str(folder / "runs")},
        "tracking": {"system_metrics_seconds": None},
    }
