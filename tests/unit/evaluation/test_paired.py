import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from maskray.evaluation.paired import gain

YES, NO = True, False


def test_a_gain_by_hand_over_all_resamples():
    """Of 4 rows one wins 2 and loses 1: all 4⁴ resamples are known, and so are the shares of each gain."""
    one, other = np.array([YES, YES, NO, YES]), np.array([NO, NO, YES, YES])
    means = Counter(sum(rows) for rows in itertools.product([1, 1, -1, 0], repeat=4))
    assert sum(means.values()) == 4**4
    assert (means[-4], means[-3], means[4]) == (1, 4, 16)  # 4⁴ (¼)⁴, 4⁴ · 4 (¼)³ ¼, 4⁴ (½)⁴
    found = gain(one, other, confidence=0.9, num_draws=200_000, seed=1)
    assert found.mean == 1 / 4
    shares = np.cumsum([means[k] for k in range(-4, 5)]) / 256
    low, high = (int(np.searchsorted(shares, tail)) - 4 for tail in (0.05, 0.95))
    assert (found.low, found.high) == (low / 4, high / 4)


def test_the_interval_is_that_of_scipy():
    rng = np.random.default_rng(0)
    one, other = rng.random(400) < 0.8, rng.random(400) < 0.75
    found = gain(one, other, confidence=0.95, num_draws=50_000, seed=0)
    theirs = stats.bootstrap(
        (one.astype(float), other.astype(float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=0.95,
        n_resamples=20_000,
        batch=1000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.mean == pytest.approx(one.mean() - other.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1.5 / 400)  # a row and a half


def test_pairs_narrow_the_interval():
    """Two models that differ in 10 of 1,000 rows: drawn apart, their difference would drown in the rows' own."""
    other = np.arange(1000) < 500
    one = np.arange(1000) < 510
    found = gain(one, other, confidence=0.95, num_draws=10_000, seed=0)
    assert found.mean == pytest.approx(0.010)
    # Binomial: 10 of 1,000; 2.5 and 97.5 % are 4 and 17.
    assert (found.low, found.high) == pytest.approx((0.004, 0.017), abs=0.0011)
    apart = 1.96 * np.sqrt(2 * 0.25 / 1000)
    assert found.high - found.low < apart / 2


def test_the_same_rows_and_seed_give_the_same_interval_and_touch_no_global_state():
    rng = np.random.default_rng(3)
    one, other = rng.random(50) < 0.7, rng.random(50) < 0.5
    before = np.random.get_state()[1].copy()  # noqa: NPY002  (what must not move)
    options = {"confidence": 0.95, "num_draws": 1000}
    assert gain(one, other, seed=5, **options) == gain(one, other, seed=5, **options)
    assert gain(one, other, seed=5, **options) != gain(one, other, seed=6, **options)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_equal_models_gain_nothing():
    rows = np.array([YES, NO, YES])
    assert gain(rows, rows, confidence=0.95, num_draws=100, seed=0) == (0, 0, 0)
