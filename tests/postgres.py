"""A real PostgreSQL on this machine, from Debian's package, which tests start and kill."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

USER = "postgres"
"""The server refuses to run as root; Debian's package brings this user."""


def programs() -> Path | None:
    """Where the newest PostgreSQL's own programs are; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


class Postgres:
    """A cluster of its own, on loopback, in a folder that is removed at the end.

    Args:
        folder: does not exist yet; whatever lies above it may be passed by everybody.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._password = folder, secrets.token_hex(16)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self._port = int(s.getsockname()[1])

    @property
    def uri(self) -> str:
        """SQLAlchemy's, of an empty database."""
        return f"postgresql+psycopg2://mlflow:{self._password}@127.0.0.1:{self._port}/postgres"

    def create(self) -> None:
        self._folder.mkdir()
        password = self._folder / "password"
        password.write_text(self._password)
        if os.getuid() == 0:
            owner = pwd.getpwnam(USER)
            for path in (self._folder, password):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        self._run("initdb", "-A", "scram-sha-256", "-U", "mlflow", f"--pwfile={password}", "--no-sync")
        password.unlink()
        self.start()

    def start(self) -> None:
        options = (
            f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder} -c fsync=off"
        )
        self._run("pg_ctl", "-w", "-l", str(self._folder / "log"), "-o", options, "start")

    def kill(self) -> None:
        """At once, as by a power cut: it has to recover when it starts again."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def remove(self) -> None:
        if (self._data / "postmaster.pid").exists():
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        import psycopg2

        with closing(psycopg2.connect(self.uri.replace("+psycopg2", ""))) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _run(self, name: str, *options: str) -> None:
        found = programs()
        assert found is not None, "apt-get install postgresql"
        command = [str(found / name), "-D", str(self._data), *options]
        as_user = ["runuser", "-u", USER, "--"] if os.getuid() == 0 else []
        # To a file: what the server inherits of pipes stays open.
        with (self._folder / "output").open("a") as output:
            done = subprocess.run([*as_user, *command], cwd="/", check=False, stdout=output, stderr=output, timeout=120)
        assert done.returncode == 0, (self._folder / "output").read_text()[-2000:]
