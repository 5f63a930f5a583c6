"""How the objective of a sweep, its points and their cost are called and written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskray import wording
from maskray.config.schema import RunConfig
from maskray.config.space import LogUniform, Uniform
from maskray.config.sweep import LOSS, SweepConfig
from maskray.sweeps.ranking import PointSummary
from maskray.sweeps.record import shown

SURVIVORS = "Some trials were stopped early: ± and noise are those of the others, and so too small."
_VAGUE = ("", "kind", "name")
"""What is left of a key without its section, and does not say enough."""
_CLOSE = 0.5
"""Points of a per cent within which all means lie, from which one digit more is written."""


@dataclass(frozen=True)
class Measure:
    """The objective in words."""

    name: str
    unit: str
    """`%`, or nothing."""
    factor: float
    digits: int
    less_is_better: bool

    @property
    def title(self) -> str:
        """At the beginning of a line."""
        return self.name[0].upper() + self.name[1:]

    @property
    def scale(self) -> str:
        """As the axis of a chart is called."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def behind(self) -> str:
        """As a column of differences is called."""
        return "behind, points" if self.unit else "behind"

    def number(self, value: float) -> str:
        """Without its unit."""
        return f"{self.factor * value:.{self.digits}f}"

    def say(self, value: float, half: float | None = None) -> str:
        """With its unit, and half of its interval."""
        interval = "" if half is None else f" ± {self.number(half)}"
        return f"{self.number(value)}{interval} {self.unit}".strip()

    def difference(self, value: float) -> str:
        """Between two values: of shares, in points of a per cent."""
        least = 10.0**-self.digits
        digits = self.number(value) if self.factor * abs(value) >= least / 2 else f"less than {least:g}"
        return f"{digits} {'points' if self.unit else ''}".strip()


def measure_of(config: SweepConfig, base: RunConfig, points: Sequence[PointSummary]) -> Measure:
    """The objective of a sweep."""
    metric, probe = config.objective.metric, base.probe
    means = [one.mean for one in points if one.mean is not None]
    if metric == LOSS:
        return Measure("pretraining loss", "", 1, 4, less_is_better=True)
    names = {
        "probe/knn": f"{probe.k}-NN accuracy",
        "probe/few_labels": f"accuracy, {probe.labels_per_class} labels a class",
        "probe/all_labels": "accuracy, all labels",
    }
    is_close = len(means) > 1 and 100 * (max(means) - min(means)) < _CLOSE
    return Measure(names.get(metric, metric), "%", 100, 2 if is_close else 1, less_is_better=False)


class Names:
    """Keys as short as they stay clear, and their values, for figures and sentences.

    Args:
        config: of the sweep.
    """

    def __init__(self, config: SweepConfig) -> None:
        short = {key: rest if (rest := key.partition(".")[2]) not in _VAGUE else key for key in config.space}
        count = Counter(short.values())
        self._names = {key: name if count[name] == 1 else key for key, name in short.items()}
        self._drawn = {key for key, axis in config.space.items() if isinstance(axis, Uniform | LogUniform)}

    def of(self, key: str) -> str:
        """`decoder.depth` for `model.decoder.depth`."""
        return self._names.get(key, key)

    def value(self, key: str, value: Any) -> str:
        """As the YAML has it; three digits of one that was drawn."""
        return f"{value:.3g}" if key in self._drawn else shown(value)

    def point(self, point: Mapping[str, Any], between: str = " · ") -> str:
        """`ratio 0.75 · decoder.depth 2`."""
        return between.join(f"{self.of(key)} {self.value(key, value)}" for key, value in point.items())


def flops(number: float) -> str:
    """With prefix and unit."""
    return wording.short(number, "FLOP")
