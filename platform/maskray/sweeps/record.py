"""What a sweep has on record: files of its own folder, by key, so that nothing of Tune's must be read again.

    <storage.path>/sweeps/<name>-<n>/     n counts from 1: `--new` begins the next
    ├── sweep.yaml                        as it was begun, or went on
    ├── dataset                           fingerprint of the version of the dataset that it is on
    ├── asked.json                        points that Optuna asked for, in order (`search.py`)
    ├── rungs/<key>.json                  at which rungs a trial was, with what, and whether it went on
    ├── trials/<key>/                     checkpoint folders; `painted.npz`; `error.txt` of one that failed;
    │                                     `untold.json`, for MLflow; `result.json` once it has ended
    ├── finished.json                     written last
    └── report/                           figures and `report.html`

The key of a trial is the fingerprint of its run, so the same point is never trained twice.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from maskray.data.storage import Storage
from maskray.errors import CheckpointError
from maskray.evaluation.reconstruction import Reconstruction

SWEEPS, TRIALS, RESULT, PAINTED, ERROR, SWEEP_YAML, DATASET, FINISHED, ASKED, RUNGS, REPORT = (
    "sweeps",
    "trials",
    "result.json",
    "painted.npz",
    "error.txt",
    "sweep.yaml",
    "dataset",
    "finished.json",
    "asked.json",
    "rungs",
    "report",
)
_VERSION = 2
"""In the first one what an image costs was not on record."""
Status = Literal["finished", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """A point with a seed, before it is trained."""

    key: str
    """The fingerprint of its run."""
    point: Mapping[str, Any]
    """Dotted keys of the space, and their values; a key whose condition does not hold is not there."""
    seed: int
    steps: int
    """Length of its schedule."""
    flops_per_image: float
    """Forward and backward pass."""
    flops_per_step: float
    """The same for a whole batch, all workers."""
    encoder_parameters: int
    decoder_parameters: int

    @property
    def flops(self) -> float:
        """Of the whole trial."""
        return self.steps * self.flops_per_step

    @property
    def name(self) -> str:
        """For people: `mask.ratio=0.75 model.decoder.depth=2 seed=0`."""
        return " ".join([*(f"{key}={shown(value)}" for key, value in self.point.items()), f"seed={self.seed}"])


@dataclass(frozen=True)
class Result:
    """A trial that has ended."""

    trial: Trial
    status: Status
    steps: int
    """Done."""
    seconds: float
    """Of training and judging, all starts together; 0 where that is not known."""
    value: float | None
    """The objective: at the end, or at the last rung of one that was pruned."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All that the last judgement found, and the last loss."""
    run_id: str | None = None
    """MLflow's."""
    reason: str = ""
    """Why it failed, or at which rung it was pruned."""
    checkpoint: str | None = None
    """Folder of the newest one, below the trial's."""

    @property
    def flops(self) -> float:
        """Spent."""
        return self.steps * self.trial.flops_per_step

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps({"schema_version": _VERSION, **asdict(self)}, indent=1).encode()

    @staticmethod
    def load(content: bytes, where: str) -> Result:
        """From JSON.

        Raises:
            CheckpointError: it is none.
        """
        try:
            raw = json.loads(content)
            if (version := raw.pop("schema_version")) != _VERSION:
                raise ValueError(f"schema version {version}, where this version of maskray reads {_VERSION}")
            return Result(**(raw | {"trial": Trial(**raw["trial"])}))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "a trial's result cannot be read",
                found=f"{where} ({error!r})",
                fix="delete the file, and the trial is run again by --resume; or begin another sweep with --new",
            ) from error


def results(sweep: Storage) -> dict[str, Result]:
    """All that are on record, by key.

    Raises:
        CheckpointError: one cannot be read.
    """
    trials = sweep.child(TRIALS)
    found = {}
    for key in trials.list_names() if trials.exists() else []:
        try:
            content = trials.read_bytes(f"{key}/{RESULT}")
        except FileNotFoundError:
            continue
        found[key] = Result.load(content, trials.join(key, RESULT))
    return found


def keep_painted(folder: Storage, painted: Reconstruction) -> None:
    """What the model of a trial paints of the first fixed image, for the report."""
    first, out = painted.first(1), io.BytesIO()
    np.savez_compressed(
        out,
        image=first.images_NCHW[0],
        visible=first.visible_NHW[0],
        painted=first.painted_NCHW[0],
        uses_target_statistics=np.array(first.uses_target_statistics),
    )
    folder.write_bytes(PAINTED, out.getvalue())


def painted(folder: Storage) -> Mapping[str, Any] | None:
    """As it was kept; None where nothing was.

    The arrays are `image` and `painted`, (C, H, W) uint8, `visible`, (cells down, cells across) bool, and
    `uses_target_statistics`, one bool.
    """
    try:
        content = folder.read_bytes(PAINTED)
    except FileNotFoundError:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def shown(value: Any) -> str:
    """A value of a point, for people."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if not isinstance(value, str) else value
