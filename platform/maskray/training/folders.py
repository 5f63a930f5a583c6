"""Names of checkpoints' folders, and which are worth keeping.

No torch here: Ray's processes that only read names start a second earlier.
"""

from __future__ import annotations

import json
from collections.abc import Callable

FOLDER_PREFIX = "step_"
PROBE = "probe.json"
"""Beside the files of a checkpoint that a probe has judged: what it found."""
SCORE = "probe_score"
"""Under this name Ray Train keeps the score of a checkpoint."""
NO_SCORE = -1.0
"""Of a checkpoint that was not judged: less than any accuracy."""


def folder_name(step: int, attempt: str) -> str:
    """Name of a checkpoint's folder: an attempt never writes into another's folder."""
    return f"{FOLDER_PREFIX}{step:09d}-{attempt}"


def step_of(name: str) -> int:
    """The step in a folder's name."""
    return int(name.removeprefix(FOLDER_PREFIX).partition("-")[0])


def score_of(read: Callable[[str], bytes]) -> float:
    """What a checkpoint is kept by, higher is better; `read` gives the content of one of its files."""
    try:
        return float(json.loads(read(PROBE))["score"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return NO_SCORE
