"""An encoder by what a user calls it: a folder, or a version or alias of a registered model, resolved once."""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from maskray.config.schema import TrackingConfig
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, StorageError, TrackingError
from maskray.models.encoder import CARD, WEIGHTS, Encoder, load_encoder
from maskray.publish.registry import ENCODER, MAX_DESCRIPTION, STEP_TAG
from maskray.tracking.mlflow_store import has_embedded_store, open_store, refuse_missing, shown
from maskray.training import checkpoint

log = logging.getLogger(__name__)

MODELS = "models:/"
KEY = "encoder"
_NAMED = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@:]+))")
_SECTION = re.compile(r"^(?=## )", re.MULTILINE)
_AS_MLFLOW_KEEPS_IT = f"artifacts/{ENCODER}"


class NoEncoderError(CheckpointError):
    """A folder that holds none."""


class NamedEncoder(NamedTuple):
    """An encoder, and which one it is."""

    encoder: Encoder
    name: str
    """A place, or `models:/name/version`: never an alias, which may move."""
    digest: str
    """Of its weights and of what must be known to use them."""
    run_id: str | None = None
    """MLflow's, of the run that a registered one comes from."""
    step: int = 0
    """Of that run, after which it was taken."""


def open_encoder(text: str, tracking: TrackingConfig, runs: str, key: str = KEY) -> NamedEncoder:
    """The encoder of that name, on the CPU.

    Args:
        text: `models:/name@alias`, `models:/name/version`, or a folder or URI that holds an encoder.
        tracking: MLflow, for the first two.
        runs: beside which MLflow's store lies, where `tracking` does not say.
        key: that asks for it, in the words of errors.

    Raises:
        TrackingError: MLflow is away, or has no such model, version or alias.
        CheckpointError: there is no encoder, or its files are gone or damaged.
        StorageError: they cannot be read.
    """
    if not text.startswith(MODELS):
        return _in_folder(Storage(text), text, key)
    match = _NAMED.fullmatch(text)
    if match is None:
        raise TrackingError(
            "this names no version of a registered model",
            key=key,
            found=text,
            allowed="models:/name@alias or models:/name/version",
        )
    uri = _uri(tracking, runs)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    version = _version(client, match, key)
    return registered_encoder(uri, match["name"], version, key)


def registered_encoder(uri: str, name: str, version: str, key: str = KEY) -> NamedEncoder:
    """The encoder of a version of a registered model, on the CPU.

    Args:
        uri: of MLflow.
        name: of the model.
        version: its number.
        key: that asks for it, in the words of errors.

    Raises:
        TrackingError: MLflow has no such version, or is away.
        CheckpointError: its files are gone or damaged.
    """
    client, called = MlflowClient(tracking_uri=uri, registry_uri=uri), f"{MODELS}{name}/{version}"
    try:
        # A server's versions name their model as source: where its files are has to be asked.
        source = str(client.get_model_version_download_uri(name, version))
    except MlflowException as error:
        raise TrackingError("MLflow's registry cannot be read", key=key, found=shown(str(error))) from error
    try:
        with tempfile.TemporaryDirectory(prefix="maskray-") as temporary:
            place = f"{source.rstrip('/')}/{_AS_MLFLOW_KEEPS_IT}"
            folder = Path(mlflow.artifacts.download_artifacts(place, dst_path=temporary, tracking_uri=uri))
            return NamedEncoder(load_encoder(folder), called, _digest(folder), *_origin(client, name, version))
    except (MlflowException, OSError, CheckpointError, StorageError) as error:
        raise CheckpointError(
            f"the files of {called} are gone or cannot be read",
            key=key,
            found=f"{shown(source)} ({shown(' '.join(str(error).split()))[:200]})",
            fix="put them back where they were, or take another version",
        ) from error


def tag_version(called: str, tag: str, text: str, tracking: TrackingConfig, runs: str) -> bool:
    """Set a tag of a registered version that `open_encoder` has named; False for an encoder that is none.

    Raises:
        TrackingError: MLflow is away or refuses.
    """
    match = _NAMED.fullmatch(called)
    if match is None:
        return False
    uri = _uri(tracking, runs)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.set_model_version_tag(match["name"], match["version"], tag, text)
    except MlflowException as error:
        raise TrackingError("MLflow does not take a tag", found=f"{tag}: {shown(str(error))}") from error
    return True


def note_section(uri: str, called: str, heading: str, text: str) -> None:
    """Put a section into the card of a registered version, in place of the one of its heading; of others there is none.

    Args:
        uri: of MLflow.
        called: as `open_encoder` has named it.
        heading: of the section.
        text: Markdown.

    Raises:
        TrackingError: MLflow is away or refuses.
    """
    match = _NAMED.fullmatch(called)
    if match is None:
        return
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        card = str(client.get_model_version(match["name"], match["version"]).description or "")
        sections = [s for s in _SECTION.split(card) if s and not s.startswith(f"## {heading}\n")]
        longer = "\n\n".join(s.strip() for s in [*sections, f"## {heading}\n\n{text}"])
        if len(longer) > MAX_DESCRIPTION:
            log.warning("The card of %s is full: %s is with its run alone", called, heading)
            return
        client.update_model_version(match["name"], match["version"], longer)
    except MlflowException as error:
        raise TrackingError("MLflow does not take a section", found=f"{heading}: {shown(str(error))}") from error


def _in_folder(storage: Storage, shown_as: str, key: str) -> NamedEncoder:
    if not storage.exists(CARD) and storage.exists(f"{_AS_MLFLOW_KEEPS_IT}/{CARD}"):
        storage = storage.child(*_AS_MLFLOW_KEEPS_IT.split("/"))
    if not storage.exists(CARD):
        raise NoEncoderError(
            f"there is no encoder: no {CARD} in that folder",
            key=key,
            found=shown_as,
            allowed=f"a folder with {CARD} and {WEIGHTS}, as the registry keeps it; or models:/name@alias",
            fix="check the path",
        )
    with checkpoint.on_disk(storage) as folder:
        return NamedEncoder(load_encoder(folder), storage.uri, _digest(folder))


def _digest(folder: Path) -> str:
    digest = hashlib.sha256((folder / CARD).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _uri(tracking: TrackingConfig, runs: str) -> str:
    """Of an MLflow that is there: none is made for who only reads."""
    if tracking.uri is not None:
        refuse_missing(tracking.uri)
    elif not has_embedded_store(runs):
        raise TrackingError(
            "there is no MLflow store beside the runs",
            key="storage.path",
            found=runs,
            fix="name the folder that the runs are in, or set tracking.uri to MLflow's",
        )
    return open_store(tracking, Storage(runs).uri).uri


def _version(client: MlflowClient, asked: re.Match[str], key: str) -> str:
    """A version's number, once: the alias may move while the images are embedded."""
    name, version, alias = asked["name"], asked["version"], asked["alias"]
    try:
        if alias is not None:
            return str(client.get_model_version_by_alias(name, alias).version)
        return str(client.get_model_version(name, str(version)).version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise TrackingError("MLflow's registry cannot be read", key=key, found=shown(str(error))) from error
        wanted = f"@{alias}" if alias is not None else f"version {version}"
        raise TrackingError(
            f"the registry has no {wanted} of a model {name}",
            key=key,
            found=asked[0],
            allowed=_listed(client, name),
        ) from error


def _listed(client: MlflowClient, name: str) -> str:
    """What there is instead."""
    models = {model.name: model for model in client.search_registered_models()}
    if name not in models:
        return f"models {', '.join(sorted(models))}" if models else "nothing: no model is registered there"
    quoted = name.replace("'", "''")
    versions = sorted((int(v.version) for v in client.search_model_versions(f"name = '{quoted}'")), reverse=True)
    aliases = sorted(client.get_registered_model(name).aliases)
    return f"versions {', '.join(map(str, versions[:10]))}; aliases {', '.join(f'@{a}' for a in aliases) or 'none'}"


def _origin(client: MlflowClient, name: str, version: str) -> tuple[str | None, int]:
    found = client.get_model_version(name, version)
    return found.run_id or None, int(found.tags.get(STEP_TAG, 0))
