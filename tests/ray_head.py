"""A real Ray head on this machine, with dashboard and token, that jobs are submitted to."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


class Head:
    """`ray start --head`, all in one folder. Nothing of it is left after `stop`, and nothing else is touched.

    Args:
        folder: short: sockets lie in it, whose paths may have 107 characters.
        num_cpus: that it declares.
        variables: of its own processes' environment, beside those that its clients have too.
    """

    def __init__(self, folder: Path, num_cpus: int, variables: Mapping[str, str] | None = None) -> None:
        self.folder, self._num_cpus = folder, num_cpus
        self._variables = dict(variables or {})
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.address = f"http://127.0.0.1:{(port := free_port())}"
        self._ports = {"port": free_port(), "dashboard-port": port}
        self._ports |= {name: free_port() for name in ("ray-client-server-port", "dashboard-agent-listen-port")}
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTHONPATH"))}
        self.environment = clean | {
            "PATH": f"{BIN}:{os.environ['PATH']}",  # jobs are started by `python`
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # what else runs on this machine must not end a job of ours
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        options = [f"--{name}={value}" for name, value in self._ports.items()]
        options += ["--dashboard-host=127.0.0.1", f"--num-cpus={self._num_cpus}", f"--temp-dir={self.folder / 'ray'}"]
        options += [f"--object-store-memory={150 * 2**20}", "--node-ip-address=127.0.0.1"]
        command = [str(BIN / "ray"), "start", "--head", *options]
        environment = self.environment | self._variables
        done = subprocess.run(
            command, env=environment, cwd=self.folder, check=False, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self) -> list[psutil.Process]:
        """All of Ray's own, and what they have started."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.folder / "ray") in part for part in process.info["cmdline"] or []):
                found |= {each.pid: each for each in [process, *_children(process)]}
        return list(found.values())

    def stop(self) -> None:
        until = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < until:
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(left, timeout=5)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
