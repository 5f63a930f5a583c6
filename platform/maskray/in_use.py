"""Which versions of datasets somebody needs: the runs that are kept at a place, and what MLflow knows of."""

from __future__ import annotations

from dataclasses import dataclass, field

from maskray.config.schema import TrackingConfig
from maskray.data.storage import Storage
from maskray.errors import ConfigError
from maskray.preparing import datasets_of_runs
from maskray.tracking import mlflow_runs, mlflow_store

NONE = "none"
"""Said instead of a place: there is none."""
RUNS = "runs"
"""Where runs are kept by default."""


@dataclass
class InUse:
    """What was found, and who was asked, in words: a version that nobody names is not in use only as far as that."""

    fingerprints: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)


def datasets_in_use(runs: str | None, tracking_uri: str | None, *, for_deletion: bool) -> InUse:
    """Ask for the fingerprints of datasets that are in use.

    Args:
        runs: where they are kept. None: where they are by default, if there are any.
        tracking_uri: of MLflow, whose runs and registered models are asked. None: the store beside the runs, if any.
        for_deletion: places must be said, be it that there is none.

    Raises:
        ConfigError: a place that is not there, or that must be said.
        TrackingError: no such MLflow, or it is away.
        StorageError: the runs cannot be read.
    """
    runs, tracking_uri = runs or None, tracking_uri or None  # an empty variable of a shell says nothing
    found, place = InUse(), Storage(runs if runs and runs != NONE else RUNS)
    _ask_runs(found, runs, place, for_deletion=for_deletion)
    if tracking_uri is None and runs != NONE and mlflow_store.has_embedded_store(place.uri):
        _ask_mlflow(found, None, place)
    elif tracking_uri and tracking_uri != NONE:
        mlflow_store.refuse_missing(tracking_uri)
        _ask_mlflow(found, tracking_uri, place)
    elif tracking_uri is None and for_deletion:
        raise _unsaid("--tracking-uri", "which MLflow has runs and models of this dataset", "MLflow's URI")
    else:
        found.not_asked.append("MLflow: no store was named, and none is beside the runs")
    return found


def _ask_runs(found: InUse, runs: str | None, place: Storage, *, for_deletion: bool) -> None:
    if runs is None and for_deletion:
        raise _unsaid("--storage", "where the runs are that read this dataset", "a folder or URI")
    if runs != NONE and place.exists():
        named = datasets_of_runs(place)
        found.fingerprints.update(named.values())
        found.asked.append(f"the {len(named)} runs in {place.uri}")
    elif runs in (None, NONE):
        found.not_asked.append("runs: no place was named" + ("" if runs else f", and there is no {place.uri}"))
    else:
        raise ConfigError(
            "there are no runs: nothing is at that place",
            key="--storage",
            found=place.uri,
            allowed=f"the folder or URI that the runs' storage.path names, or {NONE}",
        )


def _ask_mlflow(found: InUse, tracking_uri: str | None, place: Storage) -> None:
    store = mlflow_store.open_store(TrackingConfig(uri=tracking_uri), place.uri)
    found.fingerprints |= mlflow_runs.datasets_in_use(store)
    found.asked.append(f"MLflow at {mlflow_store.shown(store.uri)}")


def _unsaid(key: str, what: str, allowed: str) -> ConfigError:
    return ConfigError(
        f"before something is deleted it must be said {what}", key=key, found="nothing", allowed=f"{allowed}, or {NONE}"
    )
