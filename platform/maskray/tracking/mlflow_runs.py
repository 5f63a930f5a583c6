"""MLflow's runs, from the driver: one for each identity, described, and closed with the truth. The tracker fills it.

Only clients: no active run and no environment variables, so it does not matter what else the process does with MLflow.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException

from maskray.errors import TrackingError
from maskray.tracking.commit import commit_of, sources_digest
from maskray.tracking.mlflow_store import Store as Store
from maskray.tracking.mlflow_store import check_answers, reason, shown
from maskray.tracking.mlflow_store import open_store as open_store

log = logging.getLogger(__name__)

FINGERPRINT_TAG = "maskray.fingerprint"
DATASET_PARAM = "dataset"
"""Param of runs, and tag of models' versions: the fingerprint of the dataset that they came from."""
JUDGED_TAG = "maskray.judged_on"
"""Tag of models' versions: the fingerprint of the dataset that a promotion judged them on, last."""
STATUS_TAG = "maskray.ended"
PARENT_TAG = "mlflow.parentRunId"
TRIAL_TAG = "maskray.trial"
"""Tag of a sweep's trials: the key of each."""
SOURCES_TAG = "maskray.sources"
NOTE_TAG = "mlflow.note.content"
FIGURES = "figures"
"""Folder of the run's figures among its artifacts."""
MAX_PARAM_LENGTH, MAX_DIGEST_LENGTH, MAX_TAG_LENGTH, MAX_PER_BATCH = 6000, 36, 8000, 100
VERSIONS = ("maskray", "ray", "torch", "torchvision", "torchcodec", "timm", "numpy", "scikit-learn", "mlflow")
Ended = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class DatasetCard:
    """The dataset as MLflow shows it: the digest says which one it is, whatever its place."""

    name: str
    source: str
    digest: str
    num_rows: int


@dataclass(frozen=True)
class RunCard:
    """What MLflow is told of a run when it starts."""

    name: str
    fingerprint: str
    params: Mapping[str, Any]
    """The identity, as nested plain data. MLflow never lets a param change."""
    tags: Mapping[str, str]
    """All that may change: settings of the launch, versions, places."""
    config_yaml: str
    dataset: DatasetCard
    source: str = "maskray pretrain"
    """The command that it comes from."""
    description: str = ""
    """Markdown, shown on the run's page. Written once: people may edit it, and what happened is added to it."""
    page: tuple[str, str] = ("Figures", FIGURES)
    """What the description ends with a link to: its text, and the place among the artifacts."""


def child_card(card: RunCard, parent: str, trial: str, name: str, place: str) -> RunCard:
    """The card of a sweep's trial.

    Args:
        card: of the trial's run, as if it were launched alone.
        parent: id of the sweep's run.
        trial: its key.
        name: for people.
        place: folder of the sweep, whose lease says whether anybody is at it.
    """
    tags = {PARENT_TAG: parent, TRIAL_TAG: trial, "maskray.storage": place}
    mine = child_fingerprint(trial, parent)
    return replace(card, name=name, fingerprint=mine, source="maskray sweep", tags={**card.tags, **tags})


def child_fingerprint(trial: str, parent: str) -> str:
    """Of a trial's run: another sweep may have the same point."""
    return f"{trial}@{parent}"


def ensure_run(store: Store, card: RunCard) -> str:
    """The id of the identity's one run: found, or created; running, and with all of the card in it.

    The caller holds the run's lease, so nobody else does this at the same time.

    Raises:
        TrackingError: MLflow refuses.
    """
    client = store.client()
    try:
        run_id = _only_run(store, client, card)
        client.update_run(run_id, status="RUNNING", name=card.name)
        tags = client.get_run(run_id).data.tags
        if STATUS_TAG in tags:
            client.delete_tag(run_id, STATUS_TAG)
        if NOTE_TAG not in tags:
            client.set_tag(run_id, NOTE_TAG, _description(store, run_id, card))
        _set_params(client, run_id, card.params)
        _set_tags(client, run_id, {**card.tags, **_standard_tags(card)})
        client.log_inputs(run_id, [_dataset_input(card.dataset)])
        client.log_text(run_id, card.config_yaml, "config.yaml")
    except MlflowException as error:
        raise TrackingError("MLflow does not take the run", found=f"{card.name}: {shown(str(error))}") from error
    return run_id


def close_run(store: Store, run_id: str, status: Ended, message: str = "") -> None:
    """Say how a run ended, and why.

    Raises:
        TrackingError: MLflow refuses or is away.
    """
    client = store.client()
    try:
        message = shown(message)  # of whatever error
        ended = f"{status.lower()}: {message}" if message else status.lower()
        client.set_tag(run_id, STATUS_TAG, ended[:MAX_TAG_LENGTH])
        if message:
            add_note(client, run_id, status.lower(), message)
        client.set_terminated(run_id, status)
    except MlflowException as error:
        raise TrackingError(
            "the end of the run could not be told to MLflow", found=f"{run_id}: {shown(str(error))}"
        ) from error


def add_note(client: MlflowClient, run_id: str, name: str, text: str) -> None:
    """Add what happened to the run's description, where it is seen first; said already, it is not said again."""
    note = client.get_run(run_id).data.tags.get(NOTE_TAG, "")
    longer = f"{note}\n\n**{name.replace('_', ' ')}** ({datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC): {text}"
    if text not in note and len(longer) <= MAX_TAG_LENGTH:
        client.set_tag(run_id, NOTE_TAG, longer.strip())


def find_run(store: Store, fingerprint: str) -> str | None:
    """The id of an identity's run, where there is one.

    Raises:
        TrackingError: MLflow cannot be searched.
    """
    runs = _runs_of(store, fingerprint)
    return str(runs[0].info.run_id) if runs else None


def has_metric(uri: str, run_id: str, key: str) -> bool:
    """Whether a run has a point of a metric; no, where MLflow does not answer within seconds."""
    try:
        check_answers(uri)
        return key in MlflowClient(tracking_uri=uri, registry_uri=uri).get_run(run_id).data.metrics
    except MlflowException as error:
        log.warning("MLflow does not say what it has: %s", shown(str(error)))
        return False


def add_evaluation(
    store: Store, run_id: str, folder: str, metrics: Mapping[str, float], step: int, files: Mapping[str, bytes]
) -> None:
    """Add what an evaluation found: metrics of a step, and files in a folder of the run's artifacts.

    Unlike those of training, which are the same whenever they are made again, the newest value of a metric counts, and
    a file replaces the one of its name.

    Raises:
        TrackingError: MLflow refuses or is away.
    """
    client, now = store.client(), time.time_ns() // 1_000_000
    try:
        with tempfile.TemporaryDirectory(prefix="maskray-") as temporary:
            for name, content in files.items():
                (Path(temporary) / name).write_bytes(content)
            client.log_artifacts(run_id, temporary, folder)
        for some in _batches([Metric(key, value, now, step) for key, value in metrics.items()]):
            client.log_batch(run_id, metrics=some)
    except MlflowException as error:
        raise TrackingError("MLflow does not take the evaluation", found=f"{folder}: {shown(str(error))}") from error


def keep_text(store: Store, run_id: str, name: str, text: str) -> None:
    """Keep a text among a run's artifacts; it replaces the one of its name.

    Raises:
        TrackingError: MLflow refuses or is away.
    """
    try:
        store.client().log_text(run_id, text, name)
    except MlflowException as error:
        raise TrackingError("MLflow does not take a file", found=f"{name}: {shown(str(error))}") from error


def running(store: Store) -> list[Any]:
    """MLflow's runs that say RUNNING.

    Raises:
        TrackingError: MLflow cannot be searched.
    """
    return _search(store, f"tags.`{FINGERPRINT_TAG}` != '' AND attributes.status = 'RUNNING'")


def reconcile(store: Store, is_stale: Callable[[Mapping[str, str]], bool]) -> list[str]:
    """Close, as killed, the runs that say RUNNING while nobody runs them; their names.

    Args:
        store: whose experiment is looked through.
        is_stale: whether nobody holds the run with these tags any more.
    """
    closed = []
    for run in running(store):
        if is_stale(run.data.tags):
            close_run(store, run.info.run_id, "KILLED", "its launch ended without a word")
            closed.append(run.info.run_name)
    return closed


class Child(NamedTuple):
    """A run below another."""

    run_id: str
    trial: str
    """Key of the trial that it is of."""
    status: str
    """As it says: RUNNING, FINISHED, FAILED or KILLED."""


def children(store: Store, run_id: str) -> list[Child]:
    """The runs below a run.

    Raises:
        TrackingError: MLflow is away.
    """
    found = _search(store, f"tags.`{PARENT_TAG}` = '{run_id}'")
    return [Child(run.info.run_id, run.data.tags.get(TRIAL_TAG, ""), run.info.status) for run in found]


def curve(store: Store, run_id: str, key: str) -> list[tuple[int, float]]:
    """Steps and values of a metric, by step; one at least.

    Raises:
        TrackingError: there is none, or MLflow is away.
    """
    found = points(store, run_id, key)
    if not found:
        raise TrackingError("MLflow has no values of a metric", found=f"{key} of {run_id}")
    return found


def points(store: Store, run_id: str, key: str) -> list[tuple[int, float]]:
    """Steps and values of a metric, by step, where there are any.

    Raises:
        TrackingError: MLflow is away.
    """
    try:
        history = store.client().get_metric_history(run_id, key)
    except MlflowException as error:
        raise TrackingError("MLflow does not give a metric", found=f"{key} of {run_id}: {shown(str(error))}") from error
    return sorted((int(point.step), float(point.value)) for point in history)


def datasets_in_use(store: Store) -> set[str]:
    """Fingerprints of the datasets that any run or registered version came from, or that a promotion judged it on.

    Raises:
        TrackingError: MLflow is away.
    """
    client = store.client()
    try:
        experiments = [e.experiment_id for e in _pages(client.search_experiments)]
        runs = _pages(partial(client.search_runs, experiments, f"params.`{DATASET_PARAM}` != ''"))
        models = _pages(client.search_model_versions)
        found = [run.data.params[DATASET_PARAM] for run in runs]
        of_models = (model.tags.get(tag) for model in models for tag in (DATASET_PARAM, JUDGED_TAG))
        return {*found, *(fingerprint for fingerprint in of_models if fingerprint is not None)}
    except MlflowException as error:
        raise TrackingError("MLflow cannot be searched", found=f"{shown(store.uri)} ({reason(error)})") from error


def provenance(package: Path, commit: str | None = None) -> dict[str, str]:
    """Tags that say which code ran: a digest of a package's sources, its git commit, versions of Python and packages.

    Args:
        package: the package's folder.
        commit: told from outside, for a package that has left its repository, as in a submitted job.
    """
    tags = {"python": sys.version.split()[0], SOURCES_TAG: sources_digest(package)}
    for name in VERSIONS:
        try:
            tags[f"version.{name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:  # submitted as plain source
            continue
    if commit:
        tags["mlflow.source.git.commit"] = commit
    found = commit_of(package)
    if found is None:
        return tags
    changed = "yes" if found.is_changed else "no"
    return {**tags, "mlflow.source.git.commit": found.sha, "git.uncommitted_changes": changed}


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested plain data as dotted keys and texts: `{"optim": {"base_lr": 1e-3}}` is `{"optim.base_lr": "0.001"}`.

    There are no passwords in the texts.
    """
    out: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = shown(value if isinstance(value, str) else json.dumps(value))
    return out


def _only_run(store: Store, client: MlflowClient, card: RunCard) -> str:
    if not _runs_of(store, card.fingerprint):
        tags = {FINGERPRINT_TAG: card.fingerprint, "mlflow.user": _user()}
        client.create_run(store.experiment_id, tags=tags, run_name=card.name)
    # A request that is tried again may have made two: looked for again, the oldest stays.
    first, *others = _runs_of(store, card.fingerprint)
    for run in others:
        log.warning("MLflow had a second run %s of %s; deleted", run.info.run_id, card.name)
        client.delete_run(run.info.run_id)
    return str(first.info.run_id)


def _runs_of(store: Store, fingerprint: str) -> list[Any]:
    runs = _search(store, f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'")
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _search(store: Store, query: str) -> list[Any]:
    search = partial(store.client().search_runs, [store.experiment_id], query, ViewType.ACTIVE_ONLY)
    try:
        return list(_pages(search))
    except MlflowException as error:
        raise TrackingError("MLflow cannot be searched", found=f"{shown(store.uri)} ({reason(error)})") from error


def _set_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    stored = client.get_run(run_id).data.params
    wanted = {key: _short(text) for key, text in flatten(params).items()}
    for key in (k for k, text in wanted.items() if stored.get(k, text) != text):
        log.warning("MLflow keeps the run's first value of %s: %s, not %s", key, stored[key], wanted[key])
    new = [Param(key, text) for key, text in wanted.items() if key not in stored]
    for some in _batches(new):
        client.log_batch(run_id, params=some)


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    for some in _batches([RunTag(key, shown(str(text))[:MAX_TAG_LENGTH]) for key, text in tags.items()]):
        client.log_batch(run_id, tags=some)


def _standard_tags(card: RunCard) -> dict[str, str]:
    return {
        FINGERPRINT_TAG: card.fingerprint,
        "maskray.name": card.name,
        "mlflow.source.name": card.source,
    }


def _description(store: Store, run_id: str, card: RunCard) -> str:
    # The card of an image series is filled with the run's params at first, so the plain files must be easy to find.
    text, place = card.page
    link = f"[{text}](#/experiments/{store.experiment_id}/runs/{run_id}/artifacts/{place})"
    return f"{card.description} {link}".strip()


def _short(text: str) -> str:
    if len(text) <= MAX_PARAM_LENGTH:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[: MAX_PARAM_LENGTH - 40]}… (sha256 {digest})"


def _dataset_input(card: DatasetCard) -> DatasetInput:
    dataset = Dataset(
        name=card.name,
        digest=card.digest[:MAX_DIGEST_LENGTH],
        source_type="s3" if card.source.startswith("s3://") else "local",
        source=json.dumps({"uri": card.source}),
        profile=json.dumps({"num_rows": card.num_rows}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), MAX_PER_BATCH):
        yield items[start : start + MAX_PER_BATCH]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
