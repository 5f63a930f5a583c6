"""The registry read: which versions and aliases a model has, and the encoder of one. And what was decided, written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from maskray.errors import TrackingError
from maskray.models.encoder import Encoder
from maskray.publish.decisions import Decision
from maskray.publish.named import registered_encoder
from maskray.tracking.mlflow_runs import DATASET_PARAM, JUDGED_TAG, add_note
from maskray.tracking.mlflow_store import shown

RECORDS_TAG = "maskray.records"
_MAX_LISTED = 12
_MAX_ATTEMPTS, _FIRST_PAUSE = 6, 0.1
_PASSING = frozenset({"BAD_REQUEST", "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"})
"""What MLflow calls it where its database did not take a row."""
_MAX_TAG_LENGTH = 5000


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    number: str
    run_id: str | None
    """None: MLflow does not know the run any more."""
    tags: Mapping[str, str]

    @property
    def dataset(self) -> str | None:
        """Fingerprint of the dataset that it was trained on."""
        return self.tags.get(DATASET_PARAM)


class RegisteredModel:
    """A registered model, as MLflow has it now.

    Args:
        uri: of MLflow, tracking and registry.
        name: of the model.

    Raises:
        TrackingError: there is none, or MLflow is away.
    """

    def __init__(self, uri: str, name: str) -> None:
        self.name, self._uri = name, uri
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        with self._explained("read the registry"):
            self._refuse_unknown()

    def find(self, wanted: str | None, key: str = "challenger") -> Version:
        """The version of a number or alias (with or without `@`); None: the newest.

        Args:
            wanted: number or alias.
            key: that asks for it, in the words of errors.

        Raises:
            TrackingError: there is none; says which there are.
        """
        versions, aliases = self.versions(), self.aliases()
        number = max(versions, key=int, default=None) if wanted is None else wanted
        if number is not None and number not in versions:
            number = aliases.get(number.removeprefix("@"))
        if number in versions:
            return versions[number]
        listed = sorted(versions, key=int)[-_MAX_LISTED:]
        raise TrackingError(
            f"the registered model {self.name} has no such version or alias",
            key=key,
            found="null, and no version at all" if wanted is None else wanted,
            allowed=f"versions {', '.join(listed) or '(none)'}; aliases {', '.join(sorted(aliases)) or '(none)'}",
        )

    def versions(self) -> dict[str, Version]:
        """All versions that are ready, by number."""
        quoted = self.name.replace("'", "''")
        out, token = {}, None
        with self._explained("list the versions"):
            while True:
                page = self._client.search_model_versions(f"name = '{quoted}'", page_token=token)
                for v in (v for v in page if v.status == "READY"):
                    out[str(v.version)] = Version(str(v.version), v.run_id or None, dict(v.tags))
                token = page.token
                if not token:
                    return out

    def aliases(self) -> dict[str, str]:
        """The version that each alias leads to."""
        with self._explained("list the aliases"):
            found = self._client.get_registered_model(self.name).aliases
        return {str(alias): str(number) for alias, number in found.items()}

    def encoder(self, version: Version, key: str = "challenger") -> Encoder:
        """The encoder of a version, on the CPU.

        Args:
            version: of this model.
            key: that asks for it, in the words of errors.

        Raises:
            CheckpointError: its files are gone or damaged.
        """
        return registered_encoder(self._uri, self.name, version.number, key).encoder

    # -------------------------------------------------------------------------------------------------------- writing

    def point(self, alias: str, number: str) -> None:
        """Let an alias lead to a version."""
        with self._explained(f"move @{alias} to version {number}"):
            _again(lambda: self._client.set_registered_model_alias(self.name, alias, number))

    def records_of(self, alias: str) -> tuple[str, str] | None:
        """Identity and place of the decisions on an alias, as MLflow was told; None where it was not."""
        with self._explained("look where the records are"):
            noted = self._client.get_registered_model(self.name).tags.get(f"{RECORDS_TAG}.{alias}")
        if noted is None:
            return None
        identity, _, place = str(noted).partition(" ")
        return identity, place

    def note_records(self, alias: str, identity: str, place: str) -> None:
        """Tell MLflow where the decisions on an alias are kept."""
        with self._explained("note where the records are"):
            tag = f"{RECORDS_TAG}.{alias}"
            _again(lambda: self._client.set_registered_model_tag(self.name, tag, f"{identity} {place}"))

    def announce(self, decision: Decision, version: Version) -> None:
        """Put a decision on its version and on the run that the version comes from. May be done again."""
        with self._explained(f"note decision {decision.number}"):
            _again(lambda: self._announce(decision, version))

    def _announce(self, decision: Decision, version: Version) -> None:
        text = str(decision)
        if version.run_id is not None and self._has_run(version.run_id):
            add_note(self._client, version.run_id, f"{self.name}@{decision.alias}", text)
            # With the record's own time: what is logged again is dropped.
            self._client.log_batch(version.run_id, metrics=_points(decision))
        if decision.comparison is not None:
            judged_on = decision.comparison.evaluation.dataset
            self._client.set_model_version_tag(self.name, version.number, JUDGED_TAG, judged_on)
        # Last: it says that all of this is done.
        self._client.set_model_version_tag(self.name, version.number, tag_of(decision), text[:_MAX_TAG_LENGTH])

    def _has_run(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _refuse_unknown(self) -> None:
        try:
            self._client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            names = sorted(model.name for model in self._client.search_registered_models(max_results=_MAX_LISTED))
            raise TrackingError(
                "there is no such registered model",
                key="model",
                found=f"{self.name}, in {shown(self._uri)}",
                allowed=", ".join(names) or "none: nothing is registered there",
            ) from error

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except MlflowException as error:
            raise TrackingError(
                f"MLflow did not {what} of {self.name}",
                key="tracking.uri",
                found=f"{shown(self._uri)}: {shown(str(error))}",
            ) from error


def _again(write: Callable[[], object]) -> None:
    """Write what may be written twice, until it is: two who set one tag at once collide in MLflow's tables."""
    for attempt in range(_MAX_ATTEMPTS):
        try:
            write()
            return
        except MlflowException as error:
            if error.error_code not in _PASSING or attempt == _MAX_ATTEMPTS - 1:
                raise
        time.sleep(_FIRST_PAUSE * 2**attempt)


def tag_of(decision: Decision) -> str:
    """The tag of a version that holds the decision in words."""
    return f"maskray.{decision.alias}.{decision.number}"


def _points(decision: Decision) -> list[Any]:
    compared = decision.comparison
    if compared is None:
        return []
    room = f"promotion/{decision.alias}"
    values = {f"{room}/score": compared.score}
    if compared.gain is not None:
        low, high = compared.gain.low, compared.gain.high
        values |= {f"{room}/gain": compared.gain.mean, f"{room}/gain_low": low, f"{room}/gain_high": high}
    return [Metric(key, value, decision.decided_ms, decision.number) for key, value in values.items()]
