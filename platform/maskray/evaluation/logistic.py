"""Logistic regression on frozen features: what a few labels, or all of them, can read from an encoder.

Features are standardised with the mean and std of all training features (labels play no part in that), then fitted by
scikit-learn's logistic regression: multinomial, L2 with C = 1, L-BFGS. With 5 labels a class the penalty matters less
than the draw, so it is not tuned: a number that was tuned on the test rows would be worth nothing.

scikit-learn is imported by the functions that need it: each launch imports this module, and takes a second less.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from maskray import draws
from maskray.errors import DataError
from maskray.evaluation.features import Features

Labels = np.ndarray[Any, np.dtype[np.integer[Any]]]
Correct = np.ndarray[Any, np.dtype[np.bool_]]

PENALTY_C = 1.0
MAX_ITERATIONS = 2000

log = logging.getLogger(__name__)


class Accuracy(NamedTuple):
    """Shares of the test rows that were named rightly, over draws of training labels."""

    mean: float
    std: float
    """Between draws (unbiased); 0 for one draw."""

    @staticmethod
    def of(correct: Sequence[Correct]) -> Accuracy:
        """From whether each test row was named rightly, draw by draw."""
        shares = [float(each.mean()) for each in correct]
        return Accuracy(float(np.mean(shares)), float(np.std(shares, ddof=1)) if len(shares) > 1 else 0.0)


def few_label_correct(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    test_labels: Labels,
    *,
    labels_per_class: int,
    num_draws: int,
    seed: int,
) -> list[Correct]:
    """Whether each test row (M,) was named rightly, with `labels_per_class` labels of each class, draw by draw.

    Args:
        train_features: (N, D); all of them set the scale, those drawn are fitted.
        train_labels: (N,) integers.
        test_features: (M, D).
        test_labels: (M,) integers.
        labels_per_class: labels drawn from each class.
        num_draws: how many times.
        seed: a draw follows from (seed, its number) and the order of the rows alone.

    Raises:
        DataError: no rows, one class only, or a class with fewer rows than labels to draw.
    """
    check_labels(train_labels, test_labels)
    sizes = dict(zip(*(each.tolist() for each in np.unique(train_labels, return_counts=True)), strict=True))
    few = {c: n for c, n in sizes.items() if n < labels_per_class}
    if few:
        shown = ", ".join(f"class {c} has {n}" for c, n in list(few.items())[:6])
        raise DataError(
            f"{len(few)} of {len(sizes)} classes have too few training rows to draw {labels_per_class} labels from",
            key="labels_per_class",
            found=shown,
            allowed=f"at most {min(few.values())}",
            fix="lower it, or take more rows",
        )
    train, test = standardised(train_features, test_features)
    out = []
    for draw in range(num_draws):
        drawn = drawn_rows(train_labels, lambda _: labels_per_class, seed, draw)
        out.append(_fit_and_judge(train[drawn], train_labels[drawn], test, test_labels))
    return out


def drawn_rows(labels: Labels, num_of: Callable[[int], int], seed: int, draw: int) -> Labels:
    """Rows of a stratified draw, class by class: `num_of(rows of the class)` of each."""
    rng = np.random.default_rng(draws.word(seed, draws.Stream.PROBE, draw))
    of_class = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    return np.concatenate([rows[: num_of(len(rows))] for rows in of_class])


def full_accuracy(
    train_features: Features, train_labels: Labels, test_features: Features, test_labels: Labels
) -> float:
    """Accuracy with every training label.

    Raises:
        DataError: no rows, or one class only.
    """
    return float(full_correct(train_features, train_labels, test_features, test_labels).mean())


def full_correct(
    train_features: Features, train_labels: Labels, test_features: Features, test_labels: Labels
) -> Correct:
    """Whether each test row (M,) was named rightly, with every training label. Raises as `full_accuracy` does."""
    check_labels(train_labels, test_labels)
    train, test = standardised(train_features, test_features)
    return _fit_and_judge(train, train_labels, test, test_labels)


def standardised(train_features: Features, test_features: Features) -> tuple[Features, Features]:
    """Both by mean and std of all training features (N, D), labels play no part; a constant one keeps its scale."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_features)
    return scaler.transform(train_features), scaler.transform(test_features)


def _fit_and_judge(train: Any, train_labels: Labels, test: Any, test_labels: Labels) -> Correct:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    regression = LogisticRegression(C=PENALTY_C, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(train, train_labels)
    if caught:  # still a lower bound of what the features hold
        log.info("a probe stopped at %d iterations, before it converged", MAX_ITERATIONS)
    return np.asarray(regression.predict(test) == test_labels)


def check_labels(train_labels: Labels, test_labels: Labels) -> None:
    """Whether there is anything to learn and to judge.

    Raises:
        DataError: no rows, or one class only.
    """
    if len(train_labels) == 0 or len(test_labels) == 0:
        raise DataError(
            "labelled rows are needed in both splits",
            key="data.path",
            found=f"{len(train_labels)} training rows, {len(test_labels)} held-out rows",
            fix="ingest pictures in class folders, with held_out_fraction above 0",
        )
    if len(np.unique(train_labels)) < 2:
        raise DataError(
            "two classes are needed at least",
            key="data.path",
            found=f"{len(train_labels)} training rows, all of class {int(train_labels[0])}",
            fix="take more rows, or ingest pictures of several classes",
        )
