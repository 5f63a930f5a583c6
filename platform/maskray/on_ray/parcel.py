"""What a submitted job takes along: files, environment, and who sent it. Nothing here speaks to a cluster."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import maskray
from maskray import credentials
from maskray.errors import ClusterError
from maskray.tracking.commit import commit_of

UPLOAD_LIMIT_BYTES = 100 * 2**20
"""Ray's dashboard takes no larger body (its DASHBOARD_CLIENT_MAX_SIZE)."""
STOP_SECONDS = 60
"""Between SIGTERM and SIGKILL of a job that is stopped, and no longer than it needs. Ray's own are 3: MLflow's run
would stay open."""
COMMIT, STOP_WAIT, JOB_CONFIG = "MASKRAY_COMMIT", "RAY_JOB_STOP_WAIT_TIME_S", "RAY_JOB_CONFIG_JSON_ENV_VAR"
_NAMED_LARGEST, _CHUNK_BYTES = 5, 2**20
_LEFT_OUT = {".git", ".venv", "venv", "__pycache__", ".ruff_cache", ".mypy_cache", ".pytest_cache"}
_ELSEWHERE = "config"


@dataclass(frozen=True)
class Resources:
    """What Ray sets aside for the entry point itself: the driver, which computes little. None of it by default."""

    cpus: float | None = None
    gpus: float | None = None
    memory_bytes: int | None = None
    custom: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Parcel:
    """All that is sent."""

    submission_id: str
    entrypoint: str
    files: Mapping[str, Path]
    """Names in the job's working directory, and where the files are here."""
    variables: Mapping[str, str]
    metadata: Mapping[str, str]
    resources: Resources


# --------------------------------------------------------------------------------------------------------------- files


def files_sent(configs: Sequence[Path], include: Sequence[Path], root: Path) -> dict[str, Path]:
    """The files of a job's working directory by their names there, which are those that they have below `root`.

    Args:
        configs: the config and what it is laid over, absolute. Where one of them is not below `root`, all of them go
            into a folder of their own, as they lie to each other.
        include: other files, and folders with all that is in them but caches and git's own.
        root: the folder that relative paths are relative to.

    Raises:
        ClusterError: there is no such file, or it is not below `root`.
    """
    found = {}
    if all(path.is_relative_to(root) for path in configs):
        found = {path.relative_to(root).as_posix(): path for path in configs}
    else:
        common = Path(os.path.commonpath([path.parent for path in configs]))
        found = {f"{_ELSEWHERE}/{path.relative_to(common).as_posix()}": path for path in configs}
    for path in include:
        whole = (root / path.expanduser()).resolve()
        if not whole.exists() or not whole.is_relative_to(root):
            raise ClusterError(
                "it cannot be taken along",
                key="--include",
                found=f"{path} ({'not below this folder' if whole.exists() else 'no such file or folder'})",
                allowed=f"a file or folder below {root}",
            )
        found |= {file.relative_to(root).as_posix(): file for file in _walked(whole)}
    for name, path in found.items():
        if path not in configs and not path.resolve().is_relative_to(root):
            raise ClusterError(
                "a link leads out of this folder, and what it leads to would be taken along",
                key="--include",
                found=f"{name} → {path.resolve()}",
                allowed=f"files below {root}",
                fix="leave the link out, or put a copy of the file in its place",
            )
    return found


def _walked(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.name not in _LEFT_OUT:
        for each in sorted(path.iterdir()):
            yield from _walked(each)


def pack(files: Mapping[str, Path], archive: Path, limit_bytes: int = UPLOAD_LIMIT_BYTES) -> None:
    """A zip of the files. The same files give the same bytes, which Ray then has already.

    Raises:
        ClusterError: it is larger than the limit.
    """
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, path in sorted(files.items()):
            info = zipfile.ZipInfo(name)  # of a time that is always the same
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, path.stat().st_mode << 16
            with path.open("rb") as source, packed.open(info, "w", force_zip64=True) as target:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
                    if archive.stat().st_size > limit_bytes:
                        raise _too_large(files, limit_bytes)
    if archive.stat().st_size > limit_bytes:
        raise _too_large(files, limit_bytes)


def _too_large(files: Mapping[str, Path], limit_bytes: int) -> ClusterError:
    sizes: dict[str, int] = {}
    for name, path in files.items():
        for part in {name, *map(str, Path(name).parents)} - {"."}:
            sizes[part] = sizes.get(part, 0) + path.stat().st_size
    total = sum(path.stat().st_size for path in files.values())
    # A folder that holds all of another, and no more, says nothing new.
    telling = {size: part for part, size in sorted(sizes.items(), key=lambda item: item[0].count("/"))}
    largest = sorted(telling.items(), reverse=True)[:_NAMED_LARGEST]
    return ClusterError(
        "the files for the job are more than Ray's dashboard takes, and nothing was sent",
        key="--include",
        found=f"{_megabytes(total)} in {len(files)} files, before they are packed; the largest: "
        + ", ".join(f"{part} {_megabytes(size)}" for size, part in largest),
        allowed=f"{_megabytes(limit_bytes)}, packed",
        fix="put images and weights where the nodes see them (s3://… or a file system that all mount), and name them "
        "there",
    )


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


# --------------------------------------------------------------------------------------------------------- environment


def variables_sent(given: Iterable[str], here: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The job's environment, and the names of what stays here because it is secret.

    Args:
        given: `NAME=VALUE` each.
        here: this process's environment, of which MLflow's variables go along.

    Raises:
        ClusterError: one that is given is no such pair, or is a secret.
    """
    sent = {STOP_WAIT: str(STOP_SECONDS), "MLFLOW_DISABLE_TELEMETRY": "true"}
    commit = here.get(COMMIT) or (found.sha if (found := commit_of(Path(maskray.__file__).parent)) else None)
    if commit:
        sent[COMMIT] = commit
    of_mlflow = settings_of_mlflow(here)
    kept = sorted(name for name in here if name.startswith("MLFLOW_") and name not in of_mlflow)
    sent |= of_mlflow
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ClusterError("it must read NAME=VALUE", key="--env", found=name)
        if _is_secret(name, value):
            raise ClusterError(
                "a job's environment is shown in Ray's dashboard and logs, so no secret goes along",
                key="--env",
                found=f"{name}=***",
                fix="give it to the cluster's nodes: as a Secret of Kubernetes, or in the environment of `ray start`",
            )
        sent[name] = value
    return sent, kept


def settings_of_mlflow(here: Mapping[str, str]) -> dict[str, str]:
    """Those of this process's variables that workers must have, and may be seen.

    A runtime environment is shown in Ray's dashboard and logs: nodes must have secrets of their own.
    """
    return {k: v for k, v in here.items() if k.startswith("MLFLOW_") and not _is_secret(k, v)}


def _is_secret(name: str, value: str) -> bool:
    return bool(credentials.NAMED.search(name)) or credentials.are_in(value)


def refuse_credentials(texts: Mapping[str, str]) -> None:
    """Neither a command nor a file of a job may have credentials in it.

    Args:
        texts: by what they are called.

    Raises:
        ClusterError: one of them has.
    """
    for name, text in texts.items():
        if credentials.are_in(text):
            raise ClusterError(
                "what is sent with a job is shown in Ray's dashboard and kept on nodes, so no password goes along",
                key=name,
                found="a URI with user and password",
                fix="leave both out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or AWS_*, on the "
                "cluster's nodes",
            )


def metadata_of(command: str, config: str, variables: Mapping[str, str]) -> dict[str, str]:
    """What Ray's list of jobs shows of one.

    Args:
        command: of maskray.
        config: name of the config, or what else says which job it is.
        variables: of the job.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    found = commit_of(Path(maskray.__file__).parent)
    facts = {"command": command, "config": config, "user": user, "commit": variables.get(COMMIT, "unknown")}
    if found is not None and found.sha == facts["commit"]:
        facts["uncommitted_changes"] = "yes" if found.is_changed else "no"
    return {f"maskray.{name}": value for name, value in facts.items()}


def of_this_job(wanted: Mapping[str, Any], here: Mapping[str, str]) -> dict[str, Any]:
    """A runtime environment without what this process's job was submitted with: Ray takes none of it twice.

    Args:
        wanted: the environment for workers.
        here: this process's variables.
    """
    submitted = json.loads(here.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    variables = {k: v for k, v in wanted.get("env_vars", {}).items() if k not in submitted.get("env_vars", {})}
    return {k: v for k, v in {**wanted, "env_vars": variables}.items() if k == "env_vars" or k not in submitted}


def clean_copy(package: Path, folder: Path) -> Path:
    """The package without what running it leaves in it: its digest is that of the sources alone."""
    return Path(shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__")))
