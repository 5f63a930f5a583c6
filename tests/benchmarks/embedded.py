"""A small Ray cluster of its own for a benchmark, gone with it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read by Ray's processes when they start. Ray makes its workers nice: beside anything else on the machine a loader
# without Ray would win by priority, not by speed.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",
    RAY_TRAIN_ENABLE_STATE_TRACKING="0",
)
os.environ.pop("RAY_ADDRESS", None)

import ray
import ray.data
from on_train import CONSUMER

import maskray


@contextmanager
def cluster(*, cpus: int, object_store_bytes: int) -> Iterator[Path]:
    """A cluster on this machine; a folder that is deleted at the end."""
    # Short: Ray puts sockets there, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        path = f"{Path(maskray.__file__).parents[1]}:{Path(__file__).parent}"
        ray.init(
            address="local",
            num_cpus=cpus,
            resources={CONSUMER: 1},
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        try:
            yield Path(folder)
        finally:
            ray.shutdown()
