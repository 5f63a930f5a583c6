"""Who goes on at a rung: asynchronous successive halving, and the median rule.

Tune has both and forgets, when a sweep is resumed, what its trials have reached. Here each entry is in the sweep's
folder before anybody acts on it, with the answer that it got.
"""

from __future__ import annotations

import json
import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np

from maskray.config.sweep import Asha, Median, NoStopping
from maskray.data.storage import TEMPORARY, Storage
from maskray.errors import CheckpointError, ConfigError
from maskray.sweeps.record import RUNGS, Trial

log = logging.getLogger(__name__)

Stopping = NoStopping | Asha | Median
_VERSION = 1


@dataclass(frozen=True)
class Rung:
    """A place on a trial's way at which it is judged, and perhaps stopped."""

    index: int
    """Counts from 0; the same for all trials that have spent the same."""
    amount: float
    """Spent there, in the unit of `stopping.unit`."""
    step: int
    """Steps done there."""


def rungs(stopping: Stopping, trial: Trial) -> list[Rung]:
    """The rungs of a trial, in order, strictly inside its way.

    They are at `first` · `reduction`**index of asha, and at `first` · (index + 1) of median. Of rungs that come to the
    same step of a trial only the last is there, so indices may leave some out.
    """
    if isinstance(stopping, NoStopping):
        return []
    per_step = trial.flops_per_step if stopping.unit == "flops" else 1.0

    def step_of(index: int) -> int:
        return round(_amount(stopping, index) / per_step)

    found: list[Rung] = []
    index = 0
    while (step := step_of(index)) < trial.steps:
        # Not one after another: many thousands may come to one step, where the unit is not the one that was meant.
        above = index + 1
        while step_of(above) == step:
            above += above
        index = bisect_right(range(above), step, key=step_of) - 1
        if step > 0:
            found.append(Rung(index, _amount(stopping, index), step))
        index += 1
    return found


def _amount(stopping: Asha | Median, index: int) -> float:
    if isinstance(stopping, Asha):
        return stopping.first * stopping.reduction**index
    return stopping.first * (index + 1)


def refuse_idle_rungs(stopping: Stopping, trials: Sequence[Trial]) -> None:
    """Look whether trials are judged where it was meant.

    Raises:
        ConfigError: the first rung is before the first step of a trial, or at or after the ends of all.
    """
    if isinstance(stopping, NoStopping) or not trials:
        return
    most = max(trial.flops_per_step for trial in trials) if stopping.unit == "flops" else 1.0
    end = max(trial.flops if stopping.unit == "flops" else trial.steps for trial in trials)
    if most <= stopping.first < end and any(rungs(stopping, trial) for trial in trials):
        return
    raise ConfigError(
        "the first rung is before a trial's first step"
        if stopping.first < most
        else "no trial is ever judged: the first rung is not before the end of any",
        key="stopping.first",
        found=f"{stopping.first:g} {stopping.unit}",
        allowed=f"from {most:.4g} {stopping.unit}, a step, to below {end:.4g}, a whole trial",
        fix=f"take one of these, or another stopping.unit than {stopping.unit}",
    )


@dataclass(frozen=True)
class _Entry:
    """A trial at a rung."""

    worth: float
    """More is better; what is not a finite number is worst, minus infinity."""
    goes_on: bool


class Ladder:
    """Who was at which rung, and who went on: kept in the sweep's folder, a file for each trial. For one thread.

    Args:
        stopping: the rule.
        direction: of the objective.
        sweep: folder of the sweep; the entries that it has are read.

    Raises:
        CheckpointError: a file of them cannot be read.
    """

    def __init__(self, stopping: Stopping, direction: Literal["max", "min"], sweep: Storage) -> None:
        self._stopping = stopping
        self._sign = 1.0 if direction == "max" else -1.0
        self._folder = sweep.child(RUNGS)
        names = [name for name in self._folder.list_names() if not name.startswith(TEMPORARY)]
        self._entries = {name.removesuffix(".json"): self._read(name) for name in names}

    def goes_on(self, key: str, rung: int, value: float) -> bool:
        """Whether a trial that has come to a rung goes on.

        The entry is on record before there is an answer. A trial that comes to the rung again, as one does that was
        resumed from a checkpoint before it, gets the answer that it got, whatever others have reached meanwhile.

        Args:
            key: of the trial.
            rung: its index.
            value: the objective there. One that is not a finite number is worse than all others.
        """
        own = self._entries.get(key, {})
        worth = self._sign * value if math.isfinite(value) else -math.inf
        if rung in own:
            if own[rung].worth != worth:
                log.warning(
                    "trial %s comes to rung %d again, with %g where it had %g: the first counts, and its answer",
                    key,
                    rung,
                    self._sign * worth,
                    self._sign * own[rung].worth,
                )
            return own[rung].goes_on
        others = [entries for other, entries in self._entries.items() if other != key]
        own = own | {rung: _Entry(worth, self._decide(own, others, rung, worth))}
        self._write(f"{key}.json", own)
        self._entries[key] = own
        return own[rung].goes_on

    def _decide(self, own: dict[int, _Entry], others: list[dict[int, _Entry]], rung: int, worth: float) -> bool:
        match self._stopping:
            case NoStopping():
                return True
            case Asha(reduction=reduction):
                return _among_the_best(worth, [each[rung].worth for each in others if rung in each], reduction)
            case Median(min_trials=min_trials):
                best = max(worth, *(entry.worth for index, entry in own.items() if index < rung), -math.inf)
                return _not_below_the_median(best, _means(others, rung), min_trials)

    def _read(self, name: str) -> dict[int, _Entry]:
        content = self._folder.read_bytes(name)
        try:
            raw = json.loads(content)
            if (version := raw["schema_version"]) != _VERSION:
                raise ValueError(f"schema version {version}, where this version of maskray reads {_VERSION}")
            return {int(each["rung"]): self._entry(each) for each in raw["entries"]}
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(
                "what a trial had at its rungs cannot be read",
                found=f"{self._folder.join(name)} ({error!r})",
                fix="restore the file, or delete it: the trial is then judged anew where it still comes to a rung",
            ) from error

    def _entry(self, raw: dict[str, Any]) -> _Entry:
        value, goes_on = raw["value"], raw["goes_on"]
        if not isinstance(goes_on, bool):
            raise TypeError(f"goes_on is {goes_on!r}")
        return _Entry(-math.inf if value is None else self._sign * float(value), goes_on)

    def _write(self, name: str, entries: dict[int, _Entry]) -> None:
        listed = [
            {
                "rung": rung,
                "value": self._sign * entry.worth if math.isfinite(entry.worth) else None,
                "goes_on": entry.goes_on,
            }
            for rung, entry in entries.items()
        ]
        content = json.dumps({"schema_version": _VERSION, "entries": listed}, indent=1)
        self._folder.write_bytes(name, content.encode())


def _among_the_best(worth: float, others: list[float], reduction: float) -> bool:
    """Whether a trial is not below the percentile of those that came to the rung before it.

    As `_Bracket` of Ray Tune's AsyncHyperBandScheduler has it (2.60; `brackets=1`, `stop_last_trials=False`): the first
    at a rung goes on, and so does a tie.
    """
    if not others:
        return True
    percent = (1 - 1 / reduction) * 100
    low, high = (float(np.percentile(others, percent, method=method)) for method in ("lower", "higher"))
    # Its two neighbours make a percentile; numpy subtracts others too, and infinite ones are not to be subtracted.
    bar = low if math.isinf(low) else float(np.percentile(np.clip(others, low, high), percent))
    return _reaches(worth, bar, others)


def _means(others: list[dict[int, _Entry]], rung: int) -> list[float]:
    """The mean up to a rung of each trial that has come to it, or beyond it."""
    reached = [entries for entries in others if any(index >= rung for index in entries)]
    until = [[entry.worth for index, entry in entries.items() if index <= rung] for entries in reached]
    return [float(np.mean(worths)) for worths in until if worths]


def _not_below_the_median(best: float, means: list[float], min_trials: int) -> bool:
    """Whether the best that a trial has found is not below the median of the means of the others.

    The rule of Golovin et al. 2017 (section 3.2.1), and of Ray Tune's MedianStoppingRule, with these differences: there
    are values at rungs only, and each counts once (Tune counts a trial's last one twice); where there are too few
    others the trial goes on (Tune pauses it while others wait); a value that is not finite is worst (Tune leaves such a
    trial out of the median). As with Tune, and unlike the paper, those still running are among the others.
    """
    return len(means) < min_trials or _reaches(best, median(means), means)


def _reaches(worth: float, bar: float, others: list[float]) -> bool:
    """Whether a trial is not below a bar. Minus infinity is below every number, though the bar may be there too."""
    return worth >= bar and (math.isfinite(worth) or math.isinf(max(others)))
