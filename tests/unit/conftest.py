"""An MLflow store for each test: its tables are made once, which takes seconds, and copied."""

import shutil
from pathlib import Path

import pytest

from maskray.config.schema import TrackingConfig
from maskray.tracking.mlflow_store import DATABASE, Store, open_store


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow")
    # No experiment of ours in it: its artifacts would lie in this folder for all tests.
    open_store(TrackingConfig(experiment="unused"), str(folder))
    return folder / DATABASE


@pytest.fixture
def store(mlflow_tables: Path, tmp_path: Path) -> Store:
    """An embedded store with an experiment."""
    shutil.copy(mlflow_tables, tmp_path / DATABASE)
    return open_store(TrackingConfig(), str(tmp_path))
