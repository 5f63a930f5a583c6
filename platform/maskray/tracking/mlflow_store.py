"""Where MLflow's store is: reached within seconds and ready to be used, or an error that says what to do."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from alembic.script import ScriptDirectory
from mlflow import MlflowClient, __version__
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _get_alembic_config, _get_latest_schema_revision, _get_schema_version
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from maskray.config.schema import TrackingConfig
from maskray.credentials import are_in
from maskray.credentials import shown as shown
from maskray.errors import TrackingError

PROBE_SECONDS = 5.0
DATABASE, ARTIFACTS = "mlflow.db", "mlflow-artifacts"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
HOPELESS = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED"})
"""Answers that will be the same next time."""
_LASTING = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""So will these be, of a disk; and a full one."""


@dataclass(frozen=True)
class Store:
    """An MLflow that was reached, and the experiment in it."""

    uri: str
    experiment_id: str
    experiment: str

    def __repr__(self) -> str:
        return f"Store({shown(self.uri)!r}, {self.experiment!r})"

    def client(self) -> MlflowClient:
        """A client of its tracking and its registry; cheap."""
        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)


def open_store(config: TrackingConfig, storage_path: str) -> Store:
    """Reach MLflow within seconds; make the embedded SQLite store, and the experiment, where there is none yet.

    Called once, in the driver: first users of a fresh SQLite file race each other in its migrations.

    Args:
        config: without `uri` the store is embedded, in `storage_path`.
        storage_path: where the runs are kept: a local path, or a URI such as `s3://…`.

    Raises:
        TrackingError: there is no MLflow there, or it refuses; says what to do.
    """
    # Alembic's and MLflow's word on tables made is noise on a first `maskray demo`.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    uri = _uri_of(config, storage_path)
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        _probe(uri)
        return _open(uri, config.experiment, artifacts=None)
    if scheme == "sqlite":
        database = _database(uri)
        with _alone(database):
            artifacts = (database.parent / ARTIFACTS).as_uri()
            return _open(f"sqlite:///{database}", config.experiment, artifacts=artifacts)
    if scheme.partition("+")[0] in DATABASE_PORTS:
        _probe_port(uri)
        return _open(uri, config.experiment, artifacts=f"{storage_path.rstrip('/')}/{ARTIFACTS}")
    raise _unknown(uri)


class Look(NamedTuple):
    """What was found where MLflow is, or would be."""

    place: str
    """Its URI, without a password."""
    words: str
    store: Store | None = None
    """None: there is no store yet, or no such experiment in it."""
    server: str | None = None
    """Version of the server, where it is one."""


def look(config: TrackingConfig, storage_path: str) -> Look:
    """Reach MLflow as `open_store` does, and change nothing: no file, no table and no experiment is made.

    Raises:
        TrackingError: as `open_store`, and for tables of another version of MLflow.
    """
    uri = _uri_of(config, storage_path)
    scheme, server = urlsplit(uri).scheme, None
    if scheme in ("http", "https"):
        _probe(uri)
        server = http_request(get_default_host_creds(uri), "/version", "GET", timeout=PROBE_SECONDS, max_retries=0).text
    elif scheme == "sqlite":
        database = _database(uri)
        if not database.exists():
            return Look(shown(uri), "the first run makes it")
        uri = f"sqlite:///{database}"
        if not os.access(database, os.W_OK) or not os.access(database.parent, os.W_OK):
            raise _unwritable(database, PermissionError("read-only"))
        _refuse_other_tables(f"sqlite:///file:{database}?mode=ro&uri=true", uri)
    elif scheme.partition("+")[0] in DATABASE_PORTS:
        _probe_port(uri)
        _refuse_other_tables(uri, uri)
    else:
        raise _unknown(uri)
    words = f"MLflow {server} answers" if server else "the tables are those of this MLflow"
    try:
        found = MlflowClient(tracking_uri=uri, registry_uri=uri).get_experiment_by_name(config.experiment)
    except MlflowException as error:
        raise _unusable(uri, error) from error
    if found is None:
        return Look(shown(uri), f"{words}; the first run makes experiment {config.experiment}", None, server)
    _refuse_deleted(found)
    return Look(
        shown(uri),
        f"{words}, experiment {config.experiment}",
        Store(uri, found.experiment_id, config.experiment),
        server,
    )


def _uri_of(config: TrackingConfig, storage_path: str) -> str:
    uri = config.uri or embedded_uri(storage_path)
    if are_in(uri) or "***" not in uri:
        return uri
    raise TrackingError(
        "this is a URI as it is written down: without its user and password",
        key="tracking.uri",
        found=uri,
        fix="give the whole of it, or leave *** and @ out and set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or PGUSER and PGPASSWORD",
    )


def check_answers(uri: str) -> None:
    """Raise within seconds where a server is away: MLflow itself would go on trying for minutes.

    Raises:
        MlflowException: it is away.
    """
    if uri.startswith(("http://", "https://")):
        http_request(get_default_host_creds(uri), "/health", "GET", timeout=PROBE_SECONDS, max_retries=0)


def is_away(error: Exception) -> bool:
    """Whether MLflow, or the place of its files, did not answer, or not in its senses: the next time it may.

    Args:
        error: of a call to MLflow, as it was raised, or as the `TrackingError` that was made of it.
    """
    cause = error.__cause__ if isinstance(error, TrackingError) else error
    if isinstance(cause, OSError):
        return not isinstance(cause, _LASTING) and cause.errno != errno.ENOSPC
    return isinstance(cause, MlflowException) and cause.error_code not in HOPELESS


def has_embedded_store(storage_path: str) -> bool:
    """Whether there is an embedded store beside the runs; none is made."""
    return "://" not in storage_path and (Path(storage_path).expanduser() / DATABASE).exists()


def refuse_missing(uri: str) -> None:
    """For who only wants to read: `open_store` makes an SQLite file of a mistyped name.

    Raises:
        TrackingError: there is no such file.
    """
    if urlsplit(uri).scheme == "sqlite" and not _database(uri).exists():
        raise TrackingError("there is no such SQLite file", key="tracking.uri", found=uri, fix="check the path")


def embedded_uri(storage_path: str) -> str:
    """The URI of the store beside the runs.

    Raises:
        TrackingError: they are not kept in a local folder.
    """
    if "://" in storage_path and not storage_path.startswith("file://"):
        raise TrackingError(
            "an embedded MLflow store needs a local folder, and the runs are kept elsewhere",
            key="tracking.uri",
            found=f"null, with storage.path {shown(storage_path)}",
            fix="start a server (mlflow server) and set tracking.uri to its address, or use a local storage.path",
        )
    folder = Path(storage_path.removeprefix("file://")).expanduser().absolute()
    return f"sqlite:///{folder / DATABASE}"


def _database(uri: str) -> Path:
    """The file of an SQLite URI, absolute: workers run in other folders."""
    text = urlsplit(uri).path.removeprefix("/")
    if not text or text == ":memory:":
        raise TrackingError(
            "a database in memory is lost with its process",
            key="tracking.uri",
            found=uri,
            allowed="sqlite:////absolute/path.db",
        )
    return Path(text).expanduser().absolute()


@contextmanager
def _alone(database: Path) -> Iterator[None]:
    """One process at a time in the migrations of a file; and a file that can be written."""
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = database.with_suffix(".lock").open("w")
    except OSError as error:
        raise _unwritable(database, error) from error
    with lock:  # closing the file lets go
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            # MLflow would try to open it for minutes, so find out first.
            with closing(sqlite3.connect(database, timeout=PROBE_SECONDS)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
        except sqlite3.Error as error:
            raise _unwritable(database, error) from error
        yield


def _unwritable(database: Path, error: Exception) -> TrackingError:
    return TrackingError(
        "the SQLite file of MLflow cannot be written",
        key="tracking.uri",
        found=f"{database} ({error})",
        fix="take a path on a local disk that this user may write to, or set tracking.uri to a server",
    )


def _probe(uri: str) -> None:
    """Ask for an answer in seconds: MLflow's own requests are tried again for two minutes.

    The route is one that the server guards: `/health` answers under any host name and without a password.
    """
    try:
        response = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "POST",
            json={"max_results": 1},
            timeout=PROBE_SECONDS,
            max_retries=0,
            raise_on_status=False,
        )
    except MlflowException as error:
        raise TrackingError(
            "no MLflow answers there",
            key="tracking.uri",
            found=f"{shown(uri)} ({reason(error)})",
            fix="start it (mlflow server --host 0.0.0.0 --port 5000), or check host, port and network; "
            "tracking.uri: null keeps an SQLite store beside the runs",
        ) from error
    if response.status_code != 200 or not _is_json(response.text):
        raise TrackingError(
            "MLflow refuses requests, or something else answers there",
            key="tracking.uri",
            found=f"{shown(uri)} says {response.status_code}: {response.text.strip()[:160]}",
            fix=_advice(response.status_code, uri),
        )


def _probe_port(uri: str) -> None:
    """Whether a database listens at all."""
    parts = urlsplit(uri)
    address = (parts.hostname or "localhost", parts.port or DATABASE_PORTS[parts.scheme.partition("+")[0]])
    try:
        socket.create_connection(address, timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise TrackingError(
            "no database answers there",
            key="tracking.uri",
            found=f"{shown(uri)} ({shown(str(error))})",
            fix="start it, or check host, port and network",
        ) from error


def _advice(status: int, uri: str) -> str:
    host = urlsplit(uri).hostname
    if status == 403:
        return (
            f"start the server with --allowed-hosts '{host},{host}:*,localhost:*' "
            "(it answers only to names that it knows), or see whether this user may use it"
        )
    if status == 401:
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if status >= 500:
        return "look into the server's log: it runs, and fails"
    return "check host, port and path: this does not look like an MLflow server"


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def reason(error: Exception) -> str:
    """The innermost cause that an error of `requests` spells out."""
    text = shown(str(error))
    found = re.findall(r"(Connection refused|Name or service not known|Temporary failure in name resolution|timed out"
                       r"|Connection reset by peer|No route to host|Network is unreachable"
                       r"|certificate verify failed)", text)  # fmt: skip
    return found[-1] if found else text[:200]


def _open(uri: str, experiment: str, artifacts: str | None) -> Store:
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        found = client.get_experiment_by_name(experiment)
        client.search_registered_models(max_results=1)  # the registry makes its tables now, not under a worker's feet
        if found is None:
            return Store(uri, _create_experiment(client, experiment, artifacts), experiment)
    except MlflowException as error:
        raise _unusable(uri, error) from error
    _refuse_deleted(found)
    return Store(uri, found.experiment_id, experiment)


def _create_experiment(client: MlflowClient, experiment: str, artifacts: str | None) -> str:
    try:
        return str(client.create_experiment(experiment, artifact_location=artifacts))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return str(client.get_experiment_by_name(experiment).experiment_id)  # another driver was faster


def _refuse_other_tables(readable: str, uri: str) -> None:
    """Compare the version of a database's tables with what this MLflow wants; MLflow alone would make missing ones."""
    engine = create_engine(readable)
    try:
        found = _get_schema_version(engine)
    except SQLAlchemyError as error:
        raise _unusable(uri, error) from error
    finally:
        engine.dispose()
    wanted = _get_latest_schema_revision()
    if found == wanted:
        return
    is_older = found is None or any(each.revision == found for each in _revisions())
    raise TrackingError(
        "the tables of MLflow's database are not those of this MLflow",
        key="tracking.uri",
        found=f"{shown(uri)}, revision {found}",
        allowed=f"revision {wanted}, of MLflow {__version__}",
        fix=f"after a backup: mlflow db upgrade '{shown(uri)}'" if is_older else "pip install --upgrade mlflow",
    )


def _revisions() -> Iterator[Any]:
    yield from ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions()


def _unknown(uri: str) -> TrackingError:
    return TrackingError(
        "MLflow cannot be reached by such a URI",
        key="tracking.uri",
        found=shown(uri),
        allowed="http(s)://host:port, sqlite:////absolute/path.db, postgresql://…, or null for a store beside the runs",
    )


def _unusable(uri: str, error: Exception) -> TrackingError:
    fix = "mlflow db upgrade " + shown(uri) if "out-of-date database schema" in str(error) else None
    return TrackingError(
        "MLflow's store cannot be used", key="tracking.uri", found=f"{shown(uri)} ({shown(str(error))})", fix=fix
    )


def _refuse_deleted(experiment: Any) -> None:
    if experiment.lifecycle_stage == "active":
        return
    raise TrackingError(
        "the experiment was deleted in MLflow",
        key="tracking.experiment",
        found=experiment.name,
        fix=f"restore it (mlflow experiments restore --experiment-id {experiment.experiment_id}), or take another name",
    )
