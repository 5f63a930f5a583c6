"""What a check looks at, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskray.config.schema import ClusterConfig, RunConfig
from maskray.errors import MaskrayError

if TYPE_CHECKING:  # a broken torch is a finding, too
    from maskray.config.resolve import RunPlan
    from maskray.data.shards import Dataset
    from maskray.tracking.mlflow_store import Store


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """Works, but not as well as it could, or not for long."""
    FAIL = "FAIL"
    """A job would fail, or come to something else than it says."""


@dataclass(frozen=True)
class Finding:
    """The word of a check."""

    level: Level
    found: str
    fix: str = ""
    """A command, or a key and its value; nothing where all is well."""


def ok(found: str) -> Finding:
    """All is well."""
    return Finding(Level.OK, found)


def warning(found: str, fix: str) -> Finding:
    """Something will be slow, or wrong one day."""
    return Finding(Level.WARNING, found, fix)


def fail(found: str, fix: str) -> Finding:
    """A job would fail."""
    return Finding(Level.FAIL, found, fix)


def counted(number: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def refused(error: MaskrayError) -> Finding:
    """A job would be refused, with this error."""
    problem = f"{error.key}: {error.problem}" if error.key else error.problem
    found = problem if error.found is None else f"{problem}. Found: {error.found}"
    allowed = f"allowed: {error.allowed}" if error.allowed else ""
    return fail(found, error.fix or allowed or "see the message")


@dataclass
class Subject:
    """What is looked at; and what checks found that later ones build on, None until then."""

    config: RunConfig | None = None
    config_error: MaskrayError | None = None
    address: str | None = None
    """Of a running cluster, or of its dashboard; None: a run starts a cluster of its own."""
    folder: Path = field(default_factory=Path.cwd)
    """Where the job is started."""
    dataset: Dataset | None = None
    plan: RunPlan | None = None
    store: Store | None = None
    nodes: list[dict[str, Any]] | None = None
    """Of the cluster that was joined."""
    object_store_is_away: bool = False
    closing: ExitStack = field(default_factory=ExitStack)
    """What is to be given back after the last check."""

    @property
    def cluster(self) -> ClusterConfig:
        """The config's, with the address that is looked at."""
        config = ClusterConfig() if self.config is None else self.config.cluster
        return config.model_copy(update={"address": self.address})

    def is_away(self, uri: str) -> bool:
        """Whether it lies where nothing answers: said once, and not waited for again."""
        return self.object_store_is_away and uri.startswith("s3://")


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    look: Callable[[Subject], Finding | None]
    """None: there is nothing to look at, as without a config."""
    limit_seconds: float = 8.0
