"""Two models judged on the same rows: how much more often one is right, and how sure that is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskray import draws
from maskray.evaluation.logistic import Correct


class Gain(NamedTuple):
    """Share of the rows that the one names rightly, less that of the other; all three between -1 and 1."""

    mean: float
    low: float
    """Lower end of the interval."""
    high: float


def gain(one: Correct, other: Correct, *, confidence: float, num_draws: int, seed: int) -> Gain:
    """The gain of one model over another, with a paired bootstrap interval (percentiles; Efron & Tibshirani 1993).

    Rows are drawn again with replacement, each with what both models made of it, so that rows which are easy or hard
    for both do not widen the interval. A row's difference is -1, 0 or 1: how often each comes in a resample is one draw
    of a multinomial distribution, which costs the same for ten rows and for a million.

    Args:
        one: (N,) whether each row was named rightly.
        other: (N,) the same, in the same order of rows.
        confidence: probability of the interval, equal tails.
        num_draws: resamples.
        seed: the interval follows from it and the rows alone.
    """
    assert one.shape == other.shape
    assert len(one)
    num_rows = len(one)
    lost, won = int(np.sum(other & ~one)), int(np.sum(one & ~other))
    shares = np.array([lost, num_rows - lost - won, won]) / num_rows
    rng = np.random.default_rng(draws.word(seed, draws.Stream.BOOTSTRAP))
    counts_D3 = rng.multinomial(num_rows, shares, size=num_draws)
    tail = (1 - confidence) / 2
    low, high = np.quantile(counts_D3[:, 2] - counts_D3[:, 0], [tail, 1 - tail]) / num_rows
    return Gain((won - lost) / num_rows, float(low), float(high))
