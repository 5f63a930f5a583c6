"""The tree of errors a user can meet.

MaskrayError (ValueError)     a mistake of the user's, or of what the run was given; the command line exits with 2
├── ConfigError               the YAML or `--set`: unknown key, wrong type, values that do not go together
├── DataError                 a dataset that is missing, half-written, damaged, or does not fit the config
├── CheckpointError           a checkpoint of another run or schema version, incomplete or damaged
├── ClusterError              more than the cluster has, or a cluster that cannot be used this way
├── TrackingError             MLflow that cannot be reached or written
│   └── AwayError             MLflow that does not answer, however long it is waited for
├── StorageError              a folder or bucket that cannot be read or written
│   └── UnreachableError      an object store that does not answer, however often it is asked
└── RunConflictError          the same run or ingest is already running somewhere else
TrainingError (RuntimeError)  the run itself went wrong: not a mistake in what was asked
├── BadStepError              a step of a run's plan that was not finite, or whose loss leapt
├── NonFiniteError            a loss or gradient norm that is not finite, in the training of an evaluation
└── StreamError               the stream delivered another row group than the plan's: a fault of ours
"""

from __future__ import annotations

from maskray.credentials import shown


class MaskrayError(ValueError):
    """A mistake that the user can mend: what is wrong, the key, the value found, the values allowed, what to do.

    None of it has a password in it: errors are shown, logged and told to MLflow.
    """

    def __init__(
        self,
        problem: str,
        *,
        key: str | None = None,
        found: object = None,
        allowed: str | None = None,
        fix: str | None = None,
    ) -> None:
        problem, fix, found = shown(problem), fix and shown(fix), _shown(found)
        parts = [f"{key}: {problem}" if key else problem]
        if found is not None:
            parts.append(f"Found: {found}.")
        if allowed:
            parts.append(f"Allowed: {allowed}.")
        if fix:
            parts.append(f"What to do: {fix}.")
        super().__init__(" ".join(p if p.endswith((".", "!", "?")) else f"{p}." for p in parts))
        self.problem, self.key, self.found, self.allowed, self.fix = problem, key, found, allowed, fix

    def __reduce__(self) -> tuple[object, ...]:
        """Errors cross process borders on Ray: keyword arguments must survive pickling."""
        return _rebuild, (type(self), self.problem, self.key, self.found, self.allowed, self.fix)


def _shown(found: object) -> object:
    """What was found, without credentials. A text of a number has none."""
    return found if found is None or isinstance(found, int | float) else shown(str(found))


def _rebuild(
    cls: type[MaskrayError],
    problem: str,
    key: str | None,
    found: object,
    allowed: str | None,
    fix: str | None,
) -> MaskrayError:
    return cls(problem, key=key, found=found, allowed=allowed, fix=fix)


class ConfigError(MaskrayError):
    """The YAML or a `--set` is wrong."""


class DataError(MaskrayError):
    """A dataset is missing, half-written, damaged, or does not fit the config."""


class CheckpointError(MaskrayError):
    """A checkpoint belongs to another run or schema version, or is incomplete or damaged."""


class ClusterError(MaskrayError):
    """The run asks for more than the cluster has, or for something that cannot work on it."""


class TrackingError(MaskrayError):
    """MLflow cannot be reached or written."""


class AwayError(TrackingError):
    """MLflow does not answer, however long it is waited for: nothing is wrong with what it was to be told."""


class StorageError(MaskrayError):
    """A folder or bucket cannot be read or written."""


class UnreachableError(StorageError):
    """An object store does not answer, however often it is asked."""


class RunConflictError(MaskrayError):
    """The same run, or an ingest into the same place, is already running somewhere else."""


class TrainingError(RuntimeError):
    """The run itself went wrong, with a config that was right. Has no password in it either."""

    def __init__(self, message: str, *arguments: object) -> None:
        super().__init__(shown(message), *arguments)


class BadStepError(TrainingError):
    """A step was not finite, or its loss leapt; no update was applied from it on, so the run may go on without it.

    Args:
        message: for people.
        step: of the plan, from 0.
        seen_at: steps done when the host saw it.
        reason: the name of the event.
    """

    def __init__(self, message: str, step: int, seen_at: int, reason: str) -> None:
        super().__init__(message)
        self.message, self.step, self.seen_at, self.reason = message, step, seen_at, reason

    def __reduce__(self) -> tuple[object, ...]:
        """Errors cross process borders on Ray."""
        return type(self), self.plain()

    def plain(self) -> tuple[str, int, int, str]:
        """What it is made of."""
        return self.message, self.step, self.seen_at, self.reason


class NonFiniteError(TrainingError):
    """A loss or gradient norm was not finite; no update was applied."""


class StreamError(TrainingError):
    """The stream delivered another row group than the plan's."""
