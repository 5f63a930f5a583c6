"""One training from several seeds: what it reaches, how sure that is, and which differences are but noise.

Noise is taken from all trainings together. Three seeds say little of how far their own mean may be off: a paired test
of two trainings has two degrees of freedom, and its verdict depends most on which of them happened to lie close. A
dozen trainings with three seeds each have some twenty, and then one number says of any difference whether it is noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

Values = Mapping[int, float]
"""What a training was worth, by its seed."""


class Mean(NamedTuple):
    """Over seeds."""

    mean: float
    half: float | None
    """Half of its interval; None: there is one seed."""


class Noise(NamedTuple):
    """What two trainings of one seed differ by for no reason."""

    std: float
    """Of one training of one seed."""
    degrees: int
    """Of freedom, by which `std` is known."""


def mean(values: Values, confidence: float) -> Mean:
    """The mean of one training or more, with Student's interval over seeds as these."""
    numbers = list(values.values())
    if len(numbers) == 1:
        return Mean(numbers[0], None)
    quantile = float(student.ppf((1 + confidence) / 2, len(numbers) - 1))
    return Mean(fmean(numbers), quantile * stdev(numbers) / sqrt(len(numbers)))


def noise(trainings: Sequence[Values]) -> Noise | None:
    """What is left of the values without the mean of each training, and without what a seed does to all alike.

    A seed is a start, an order of the data, masks and, where few labels are used, which: it may lift all trainings that
    have it, and that is no noise between them. Least squares of value = training + seed, so seeds may be missing.

    Returns:
        None where nothing is left: one seed, or one training.
    """
    rows = [(number, seed, value) for number, one in enumerate(trainings) for seed, value in one.items()]
    seeds = sorted({seed for _, seed, _ in rows})
    design = np.zeros((len(rows), len(trainings) + len(seeds)))
    for row, (number, seed, _) in enumerate(rows):
        design[row, number] = design[row, len(trainings) + seeds.index(seed)] = 1
    values = np.array([value for *_, value in rows])
    if not len(values):
        return None
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    degrees = len(rows) - int(rank)
    if degrees == 0:
        return None
    return Noise(sqrt(float(np.sum((values - design @ fitted) ** 2)) / degrees), degrees)


def margin(noise: Noise, num_seeds: int, num_others: int, confidence: float) -> float:
    """How far behind the best one a training may be for no reason.

    With probability `confidence` or more the training that is truly the best is among those that are no further behind
    (subset selection, Gupta 1965, by Bonferroni's bound): it would be left out only if one of the others came out
    further ahead of it than this by chance, and each does with probability (1 - confidence) / num_others at most. So it
    holds for all comparisons together, though the best was picked after looking. Noise is taken to be normal and as
    strong in all of them.

    Args:
        noise: of one seed.
        num_seeds: that both have.
        num_others: trainings that the best was the best of, itself not counted.
        confidence: above 0, below 1.
    """
    quantile = float(student.ppf(1 - (1 - confidence) / num_others, noise.degrees))
    return quantile * noise.std * sqrt(2 / num_seeds)
