"""What tests share: a clean environment, a small real dataset, a tiny config."""

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from maskray.config.load import merge, parse
from maskray.config.schema import IngestConfig, RunConfig
from object_store import FaultyProxy, moto_server, new_bucket

if TYPE_CHECKING:
    from launches import Launches
    from maskray.tracking.mlflow_store import Store

# Before Ray or MLflow is imported, and for every process that tests start.
os.environ["RAY_AUTH_MODE"] = "disabled"  # no token in the home folder of whoever runs the tests
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # as the command line has it
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "WORLD_SIZE", "RANK"):
    os.environ.pop(name, None)

torch.set_num_threads(1)

pytest_plugins = ["doctor_checks"]

KEYS = {"AWS_ACCESS_KEY_ID": "maskray", "AWS_SECRET_ACCESS_KEY": "maskray"}
"""The object stores of tests take any."""
TINY = {
    "name": "tiny",
    "data": {
        "path": "unset",
        "image_size": 8,
        "channels": 1,
        "crop": {"kind": "random_resized", "scale": [0.6, 1.0]},
        "flip_probability": 0.5,
        "normalize": "symmetric",
        "stream": "local",
        "groups_per_task": 2,
    },
    "model": {
        "patch": 2,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "decoder": {"width": 16, "depth": 1, "heads": 2},
    },
    "objective": {"norm_pix": False},
    "optim": {"global_batch": 64, "steps": 12, "warmup_steps": 2, "base_lr": 0.01},
    "training": {"log_steps": 2, "checkpoint_steps": 4, "deterministic": True},
    "tracking": {"system_metrics_seconds": None},
}


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray has the machine to itself."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker("alone")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as a dataset: row groups of 16, a fifth held out."""
    from maskray.data.ingest import ingest
    from maskray.data.mapper import thread_mapper

    folder = tmp_path_factory.mktemp("data") / "digits"
    config = IngestConfig(source="digits", destination=str(folder), group_rows=16, held_out_fraction=0.2)
    ingest(config, thread_mapper(2))
    return folder


@pytest.fixture
def tiny(digits: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A config that trains in a second, with sections laid over it: `tiny(optim={"steps": 4})`."""

    def build(**sections: object) -> RunConfig:
        data = {"path": str(digits), "cache_folder": str(tmp_path / "cache")}
        places = {"data": data, "storage": {"path": str(tmp_path / "runs")}}
        return parse(RunConfig, merge(merge(TINY, places), sections))

    return build


@pytest.fixture(scope="session")
def digits_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported encoder for the digits, untrained."""
    from maskray.models.build import build_model
    from maskray.models.encoder import save_encoder
    from maskray.models.normalize import Normalize

    folder = tmp_path_factory.mktemp("encoder")
    config = parse(RunConfig, TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_encoder(folder, build_model(config.model, (8, 8), 1), Normalize([0.3], [0.37]), config)
    return folder


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database: its tables are made once, which takes seconds, and copied for each test."""
    from maskray.config.schema import TrackingConfig
    from maskray.tracking.mlflow_store import DATABASE, open_store

    folder = tmp_path_factory.mktemp("mlflow")
    # No experiment of ours in it: its artifacts would lie in this folder for all tests.
    open_store(TrackingConfig(experiment="unused"), str(folder))
    return folder / DATABASE


@pytest.fixture
def store(mlflow_tables: Path, tmp_path: Path) -> "Store":
    """An embedded MLflow store with an experiment."""
    from maskray.config.schema import TrackingConfig
    from maskray.tracking.mlflow_store import DATABASE, open_store

    shutil.copy(mlflow_tables, tmp_path / DATABASE)
    return open_store(TrackingConfig(), str(tmp_path))


@pytest.fixture
def runs(mlflow_tables: Path, tmp_path: Path) -> Path:
    """Where `tiny` keeps runs, for tests that launch them: with MLflow's tables, else each of them makes its own."""
    from maskray.tracking.mlflow_store import DATABASE

    (tmp_path / "runs").mkdir()
    shutil.copy(mlflow_tables, tmp_path / "runs" / DATABASE)
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The URL of a real S3 API over HTTP."""
    with moto_server() as url:
        yield url


@pytest.fixture
def bucket(object_store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://…` of an empty bucket, which the environment leads to."""
    return new_bucket(object_store, monkeypatch.setenv)


@pytest.fixture
def digits_in_bucket(digits: Path, bucket: str) -> str:
    """URI of the digits' dataset in a bucket."""
    from maskray.data.storage import Storage

    target = Storage(f"{bucket}/digits")
    for path in sorted(p for p in digits.rglob("*") if p.is_file()):
        target.write_bytes(path.relative_to(digits).as_posix(), path.read_bytes())
    return target.uri


@pytest.fixture
def proxy(object_store: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before the object store, which the environment leads to; it lets everything through until told."""
    with FaultyProxy(object_store, {}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest) -> str:
    """An empty place of each kind that `Storage` knows."""
    return str(request.getfixturevalue("tmp_path") if request.param == "local" else request.getfixturevalue("bucket"))


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An embedded cluster for the tests of a file; those that kill, or launch as a user does, start their own."""
    import ray

    # Short, and not pytest's own: Ray puts sockets there, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp") as folder:
        tests = Path(__file__).parent
        ray.init(
            address="local",
            num_cpus=6,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
            # What is in test files is imported by name, and these import what lies beside them.
            runtime_env={"env_vars": {"PYTHONPATH": f"{tests.parent / 'platform'}:{tests}", **KEYS}},
        )
        yield
        ray.shutdown()


@pytest.fixture
def launches(digits: Path, mlflow_tables: Path, tmp_path: Path) -> "Iterator[Callable[..., Launches]]":
    """Makes runs that are launched as a user does, and killed: `launches("quiet", workers=2)`."""
    from launches import launching

    with launching(digits, mlflow_tables, tmp_path) as make:
        yield make


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """What a command line sets for its whole process does not reach the next test."""
    root, ours = logging.getLogger(), logging.getLogger("maskray")
    handlers, level, on_sigterm = list(root.handlers), ours.level, signal.getsignal(signal.SIGTERM)
    on_crash = sys.excepthook
    yield
    root.handlers[:] = handlers
    sys.excepthook = on_crash
    ours.setLevel(level)
    signal.signal(signal.SIGTERM, on_sigterm)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
