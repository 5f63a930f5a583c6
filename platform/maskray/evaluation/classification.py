"""Frozen features through the evaluations that name rows: neighbours, logistic regression, linear heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from maskray.config.evaluation import FeatureEvaluation, KnnEvaluation, LinearEvaluation, LogisticEvaluation
from maskray.errors import DataError
from maskray.evaluation.features import Features
from maskray.evaluation.knn import knn_probabilities
from maskray.evaluation.linear_heads import HeadsRecipe, HeadsResult, train_heads
from maskray.evaluation.logistic import (
    Correct,
    Labels,
    check_labels,
    drawn_rows,
    few_label_correct,
    full_correct,
    standardised,
)
from maskray.evaluation.scores import Score, score

_SHOWN = 6


class Labelled(NamedTuple):
    """Features of both splits, with their labels. N training rows, M test rows."""

    train_features: Features
    """(N, D)."""
    train_labels: Labels
    """(N,)."""
    test_features: Features
    test_labels: Labels


def check_classes(train_labels: Labels, test_labels: Labels, names: list[str]) -> None:
    """Whether each class that is judged could be learned.

    Raises:
        DataError: no rows, one class only, or test rows of a class without training rows.
    """
    check_labels(train_labels, test_labels)
    unknown = np.setdiff1d(test_labels, train_labels).tolist()
    if unknown:
        shown = ", ".join(names[c] for c in unknown[:_SHOWN])
        raise DataError(
            f"{len(unknown)} classes of the held-out split have no training row",
            key="data.path",
            found=shown + (f" and {len(unknown) - _SHOWN} more" if unknown[_SHOWN:] else ""),
            fix="raise data.max_rows, or ingest again with rows of each class in both splits",
        )


class Named(NamedTuple):
    """What one evaluation made of the test rows."""

    evaluation: str
    """Such as `knn, k 20`."""
    draws: list[Correct]
    """(M,) whether each was named rightly, for each draw of labels."""
    note: str = ""


def classify(
    evaluation: FeatureEvaluation,
    rows: Labelled,
    *,
    features: str,
    seed: int,
    device: torch.device | None = None,
) -> Iterator[Score]:
    """The scores of one evaluation.

    Args:
        evaluation: what is done.
        rows: features and labels.
        features: what they are called in the scores.
        seed: of draws of labels, and of heads.
        device: where neighbours are sought and heads trained; None: the CPU.

    Raises:
        DataError: too few rows of a class.
        ConfigError: fewer rows than neighbours.
    """
    for named in name_rows(evaluation, rows, seed=seed, device=device):
        yield score(named.evaluation, features, named.draws, named.note)


def name_rows(
    evaluation: FeatureEvaluation, rows: Labelled, *, seed: int, device: torch.device | None = None
) -> Iterator[Named]:
    """Name the test rows, once for each value that the evaluation lists. Arguments and errors as of `classify`."""
    match evaluation:
        case KnnEvaluation():
            classes = np.unique(rows.train_labels)
            for k in evaluation.k:
                votes_MK = knn_probabilities(
                    rows.train_features,
                    rows.train_labels,
                    rows.test_features,
                    k=k,
                    temperature=evaluation.temperature,
                    device=device,
                )
                yield Named(f"knn, k {k}", [classes[votes_MK.argmax(axis=1)] == rows.test_labels])
        case LogisticEvaluation(labels_per_class=None):
            yield Named("logistic, all labels", [full_correct(*rows)])
        case LogisticEvaluation(labels_per_class=int(each)):
            correct = few_label_correct(*rows, labels_per_class=each, num_draws=evaluation.draws, seed=seed)
            yield Named(f"logistic, {each} labels a class", correct)
        case LinearEvaluation():
            yield from (_linear(evaluation, rows, share, seed, device) for share in evaluation.label_shares)


def _linear(
    evaluation: LinearEvaluation, rows: Labelled, share: float, seed: int, device: torch.device | None
) -> Named:
    recipe = HeadsRecipe(evaluation.learning_rates, evaluation.epochs, evaluation.batch)
    train, test = standardised(rows.train_features, rows.test_features)
    correct, rates = list[Correct](), set[float]()
    for draw in range(evaluation.draws if share < 1 else 1):
        drawn = drawn_rows(rows.train_labels, lambda size: max(1, round(share * size)), seed, draw)
        result: HeadsResult = train_heads(
            train[drawn], rows.train_labels[drawn], test, recipe, seed=seed, device=device
        )
        correct.append(result.predicted_M == rows.test_labels)
        rates.add(result.learning_rate)
    note = "learning rate " + ", ".join(f"{rate:g}" for rate in sorted(rates))
    return Named(f"linear, {100 * share:g} % of the labels", correct, note)
