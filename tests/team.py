"""The team's MLflow, as `infra/mlflow` has it, on this machine: PostgreSQL, an S3 API, and the server between."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

from mlflow_server import Server
from object_store import new_bucket
from postgres import Postgres


@dataclass
class Team:
    """Its services."""

    database: Postgres
    server: Server


@contextmanager
def services(object_store: str, set_variable: Callable[[str, str], None]) -> Iterator[Team]:
    """They run while the block does.

    Args:
        object_store: URL of an S3 API.
        set_variable: of the environment, which is made to lead there: clients need none of it.
    """
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)  # another user has to pass
        database = Postgres(folder / "postgres")
        server = None
        try:
            database.create()
            server = Server(folder, database.uri, f"{new_bucket(object_store, set_variable)}/mlflow", workers=2)
            server.start()
            MlflowClient(server.uri).search_experiments(max_results=1)  # its first answer takes the longest
            yield Team(database, server)
        finally:
            if server is not None:
                server.kill()
            database.remove()
