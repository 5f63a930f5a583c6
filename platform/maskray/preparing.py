"""A run before it starts: all that can be checked without a cluster, and what is known once it has been."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from maskray.config.resolve import RunPlan, padding_waste, resolve
from maskray.config.schema import RunConfig
from maskray.data.manifest import kept_versions
from maskray.data.places import with_absolute_paths
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.errors import StorageError
from maskray.models.build import build_normalize, initial_model, weightless_model
from maskray.models.foreign import weights_digest
from maskray.tracking import mlflow_runs
from maskray.tracking.mlflow_store import Store, open_store, shown

log = logging.getLogger(__name__)

FINISHED, DATASET = "finished.json", "dataset"
"""In a run's folder: what was said at its end, and the fingerprint of its images."""
_CHECKED_BYTES = 2**30


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no cluster."""

    config: RunConfig
    """With absolute paths: workers run in other folders."""
    plan: RunPlan
    dataset: Dataset
    root: Storage
    run: Storage
    """The run's folder, below `root`."""
    store: Store
    """MLflow."""
    code: Mapping[str, str]
    """Commit, sources and versions, taken before anything runs: files may change under a run of days."""


def prepare(config: RunConfig, commit: str | None = None) -> Prepared:
    """Check all that can be checked without a cluster.

    Args:
        config: of the run.
        commit: git commit of the package, where it has left its repository.

    Raises:
        MaskrayError: of the kind that is wrong: config, dataset, weights to start from, storage or MLflow.
    """
    config = with_absolute_paths(config)
    dataset = Dataset.open(config.data.path, config.data.version, unreadable=config.data.unreadable)
    if config.data.unreadable == "stop":
        log.info("%d bytes of the dataset's shards are as they were written", dataset.check(_CHECKED_BYTES))
    # Named from here on: images may be added while the run goes on.
    data = config.data.model_copy(update={"version": dataset.manifest.fingerprint})
    config = config.model_copy(update={"data": data})
    plan = resolve(config, dataset.facts(), weights_digest(config.init_from))
    spec = StreamSpec.of(config, plan, dataset)
    counts = " or ".join(map(str, spec.visible_counts))
    log.info("%s of %d cells visible", counts, spec.grid_HW[0] * spec.grid_HW[1])
    build_normalize(config, dataset.manifest)
    weightless_model(config)
    if config.init_from is not None:
        initial_model(config)
    _say_what_is_left_out(config, plan, dataset)
    root = Storage(config.storage.path)
    check_writable(root)
    _say_what_was_begun_on_other_data(root, plan, config)
    store = open_store(config.tracking, root.uri)
    code = mlflow_runs.provenance(Path(__file__).parent, commit)
    if config.tracking.uri is not None:  # the store keeps the password; what workers get, and Ray shows, does not
        tracking = config.tracking.model_copy(update={"uri": shown(config.tracking.uri)})
        config = config.model_copy(update={"tracking": tracking})
    return Prepared(config, plan, dataset, root, root.child(plan.run_name), store, code)


def check_writable(root: Storage) -> None:
    """Write a small file where runs are kept, and delete it.

    Raises:
        StorageError: it cannot be done, and why.
    """
    try:
        root.check_writable()
    except StorageError as error:  # what it tried to write is of no interest
        cause = error.__cause__
        reason = (isinstance(cause, OSError) and cause.strerror) or error.found
        raise StorageError(
            "runs cannot be kept there",
            key="storage.path",
            found=f"{root.uri} ({reason})",
            allowed="a folder that this user may write to, or s3://bucket/prefix",
            fix=error.fix,
        ) from error


def datasets_of_runs(root: Storage, prefix: str = "") -> dict[str, str]:
    """The dataset's fingerprint of each run that is kept below a place, by the run's name."""
    found = {}
    for name in root.list_names():
        if name.startswith(prefix) and root.exists(f"{name}/{DATASET}"):
            found[name] = root.read_bytes(f"{name}/{DATASET}").decode()
    return found


def _say_what_was_begun_on_other_data(root: Storage, plan: RunPlan, config: RunConfig) -> None:
    """Images that were added make another run of the same config: it is easily taken for the one that was begun."""
    others = set(kept_versions(Storage(config.data.path))) - {config.data.version}
    for name, version in datasets_of_runs(root, f"{config.name}-").items():
        if version in others and name != plan.run_name and not root.exists(f"{name}/{FINISHED}"):
            log.warning(
                "%s was begun on another version of the dataset; to go on with it: --set data.version=%s", name, version
            )


def _say_what_is_left_out(config: RunConfig, plan: RunPlan, dataset: Dataset) -> None:
    left = dataset.num_rows() - plan.num_row_groups * plan.group_rows
    if left:
        log.warning("%d of %d images stay out: fewer than a row group of %d", left, dataset.num_rows(), plan.group_rows)
    waste = padding_waste(config.cluster.workers, plan.groups_per_step)
    if waste:
        log.warning(
            "%d workers do not divide the %d row groups of a step: %.0f %% of their time goes into padding",
            config.cluster.workers,
            plan.groups_per_step,
            100 * waste,
        )
