"""Shares of rows that were named rightly, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maskray.evaluation.logistic import Correct

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """Of one evaluation of one kind of features."""

    evaluation: str
    """Such as `knn, k 20` or `linear, 10 % of the labels`."""
    features: str
    """Whose: `model`, `untrained`, `raw pixels`."""
    accuracy: float
    """Mean over draws of labels, where there are several."""
    low: float
    high: float
    """95 % interval of the accuracy over test rows as these (Wilson 1927)."""
    std_of_draws: float | None
    """Between draws of labels (unbiased); None for one."""
    num_rows: int
    note: str = ""

    @property
    def key(self) -> str:
        """As a metric is called."""
        words = f"{self.evaluation}/{self.features}" if self.features != "model" else self.evaluation
        return "".join(c if c.isalnum() or c in "./-" else "_" for c in words.replace(", ", "/").replace(" %", "pct"))


def score(evaluation: str, features: str, draws: Sequence[Correct], note: str = "") -> Score:
    """From whether each test row was named rightly, (M,), in each draw of labels."""
    shares = [float(each.mean()) for each in draws]
    accuracy, num_rows = float(np.mean(shares)), len(draws[0])
    low, high = interval(accuracy, num_rows)
    return Score(
        evaluation=evaluation,
        features=features,
        accuracy=accuracy,
        low=low,
        high=high,
        std_of_draws=float(np.std(shares, ddof=1)) if len(shares) > 1 else None,
        num_rows=num_rows,
        note=note,
    )


def interval(accuracy: float, num_rows: int) -> tuple[float, float]:
    """95 % interval of an accuracy over test rows as these (Wilson 1927)."""
    from scipy.stats import binomtest  # half a second, which no launch needs to wait for

    found = binomtest(round(accuracy * num_rows), num_rows).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)
