"""A run goes back: from a step that was not finite, or whose loss leapt, to its newest checkpoint, and on without it.

What is left out is on record in the run's folder before the run goes on, so whoever takes it up, after whatever kill,
leaves out the same. A run is then a function of its config and of the steps that it leaves out: one that is told of
them at its start, by `training.skip_steps`, ends with the same weights.

The newest checkpoint lies before the step. A checkpoint is taken at steps at which the host looks at the step's flag,
and after it has looked; and from the flagged step on no update is applied.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from maskray.config.schema import RunConfig
from maskray.data.storage import Storage
from maskray.errors import BadStepError, CheckpointError, StorageError

log = logging.getLogger(__name__)

REWINDS = "rewinds.json"
_VERSION = 1


@dataclass(frozen=True)
class Rewind:
    """One way back."""

    step: int
    """Of the plan, from 0: it is left out from now on."""
    reason: str
    """`non_finite` or `spike`."""
    message: str
    """What the run would have stopped with."""
    seen_at: int
    """Steps done when it was seen."""
    back_to: int
    """Steps done at the newest checkpoint."""
    time: str
    """UTC, as ISO 8601 has it."""

    def text(self) -> str:
        """For people."""
        return (
            f"from step {self.seen_at} back to step {self.back_to}, and on without step {self.step} of the plan "
            f"({self.reason.replace('_', ' ')})"
        )


def read(run: Storage) -> list[Rewind]:
    """Those of a run, the first one first.

    Raises:
        CheckpointError: the record is there, and is not what was written.
        StorageError: it cannot be read, which says nothing of it.
    """
    try:
        raw = json.loads(run.read_bytes(REWINDS))
        if (version := raw["schema_version"]) != _VERSION:
            raise ValueError(f"schema version {version}, where this version of maskray reads {_VERSION}")
        found = [Rewind(**each) for each in raw["rewinds"]]
        if not all(isinstance(each.step, int) and each.step >= 0 for each in found):
            raise ValueError("a step that is no number")
        return found
    except FileNotFoundError:
        return []
    except StorageError:  # a ValueError too
        raise
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            "the record of the steps that the run leaves out cannot be read",
            key=REWINDS,
            found=f"{run.join(REWINDS)} ({error})",
            fix="restore it from a copy, or delete it and name in training.skip_steps what `skipped` in the state.json "
            "of the newest checkpoint has",
        ) from error


def in_force(config: RunConfig, known: Sequence[Rewind]) -> RunConfig:
    """The config, with the steps on record among those that it leaves out."""
    steps = sorted({*config.training.skip_steps, *(each.step for each in known)})
    return config.model_copy(update={"training": config.training.model_copy(update={"skip_steps": tuple(steps)})})


def may_go_back(config: RunConfig, known: Sequence[Rewind]) -> bool:
    """Whether the run has a way back left."""
    return len(known) < config.training.rewinds


def until_trained(
    config: RunConfig,
    run: Storage,
    train: Callable[[RunConfig], object],
    newest_step: Callable[[], int],
    tell: Callable[[Sequence[Rewind]], object],
) -> RunConfig:
    """Train, and go back as often as the config allows; the config, with all steps that were left out.

    Args:
        config: of the run.
        run: its folder. Nobody else writes to it.
        train: trains to the end, from the newest checkpoint.
        newest_step: steps done at that checkpoint; 0 where there is none.
        tell: is told of all on record, before each start: it may hear of one again and again.

    Raises:
        BadStepError: there is no way back left.
        CheckpointError: the record cannot be read.
        MaskrayError, TrainingError: as `train` does.
    """
    while True:
        known = read(run)
        tell(known)
        asked = in_force(config, known)
        try:
            train(asked)
            return asked
        except BadStepError as error:
            if not may_go_back(config, known):
                if known:
                    log.warning("The run has gone back %d times already: training.rewinds allows no more", len(known))
                raise
            now = datetime.now(UTC).isoformat(timespec="seconds")
            found = Rewind(error.step, error.reason, error.message, error.seen_at, newest_step(), now)
        # Not above: an error holds the frames that raised it, and with them a model.
        _write(run, [*known, found])
        log.warning("%s The run goes %s.", found.message, found.text())


def _write(run: Storage, rewinds: Sequence[Rewind]) -> None:
    plain = {"schema_version": _VERSION, "rewinds": [asdict(each) for each in rewinds]}
    run.write_bytes(REWINDS, json.dumps(plain, indent=1).encode() + b"\n")
