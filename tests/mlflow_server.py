"""A real MLflow server on this machine, which tests start and kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class Server:
    """`mlflow server` in a process group of its own: it has children.

    Args:
        folder: for its log, and its artifacts.
        database: SQLite's file, or the URI of another.
        artifacts: where else they are.
        workers: processes that answer.
    """

    def __init__(self, folder: Path, database: Path | str, artifacts: str | None = None, workers: int = 1) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = int(s.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._options = {
            "--backend-store-uri": database if isinstance(database, str) else f"sqlite:///{database}",
            "--artifacts-destination": artifacts or str(folder / "artifacts"),
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--workers": str(workers),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # No process for jobs beside it: nothing here asks for any, and it imports MLflow anew.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        parts = (part for pair in self._options.items() for part in pair)
        command = [sys.executable, "-m", "mlflow", "server", *parts]
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError((self._folder / "server.log").read_text()[-2000:])

    def suspend(self) -> None:
        """It takes requests, and answers none, until it goes on."""
        os.killpg(self._running.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self._running.pid, signal.SIGCONT)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
