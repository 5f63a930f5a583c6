"""What lies near what among features: the nearest by cosine, and a map of two dimensions.

Shape letters: Q queries, N rows, K neighbours, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from sklearn.decomposition import PCA

from maskray.evaluation.features import Features

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


class Nearest(NamedTuple):
    """Of each query, nearest first; of equals the lower number. K is less where there are fewer rows."""

    numbers_QK: Ints
    similarities_QK: Floats
    """Cosines."""


class Plane(NamedTuple):
    """Features along their two principal components."""

    points_N2: Floats
    shares: tuple[float, float]
    """Of the variance, that each axis explains."""


def nearest(queries_QD: Features, itself_Q: Ints, parts: Iterable[Features], k: int) -> Nearest:
    """The nearest rows by cosine, each query itself left out; no more than a part of the rows is held at a time.

    Args:
        queries_QD: features.
        itself_Q: number of each query among the rows; below 0 where it is none of them.
        parts: all rows (N, D), part by part; they are numbered through.
        k: K.
    """
    queries_QD, first = _of_length_one(queries_QD), 0
    numbers_QK = np.empty((len(queries_QD), 0), np.int64)
    similarities_QK = np.empty((len(queries_QD), 0), np.float32)
    for part_ND in parts:
        cosines_QN = queries_QD @ _of_length_one(part_ND).T
        numbers_N = np.arange(first, first + len(part_ND))
        cosines_QN[itself_Q[:, None] == numbers_N] = -np.inf
        numbers = np.concatenate([numbers_QK, np.broadcast_to(numbers_N, cosines_QN.shape)], axis=1)
        similarities = np.concatenate([similarities_QK, cosines_QN], axis=1)
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        numbers_QK = np.take_along_axis(numbers, order, axis=1)
        similarities_QK = np.take_along_axis(similarities, order, axis=1)
        first += len(part_ND)
    k = min(k, first - int((itself_Q >= 0).any()))
    return Nearest(numbers_QK[:, :k], similarities_QK[:, :k])


def plane(features_ND: Features) -> Plane:
    """The features' two principal components, without a random number. At least three rows of two values."""
    pca = PCA(n_components=2, svd_solver="full")
    points_N2 = pca.fit_transform(features_ND)
    one, two = (float(share) for share in pca.explained_variance_ratio_)
    return Plane(points_N2.astype(np.float32), (one, two))


def _of_length_one(features_ND: Features) -> Features:
    """A feature that is zero stays so, and is like nothing."""
    lengths_N1 = np.linalg.norm(features_ND, axis=1, keepdims=True)
    return (features_ND / np.where(lengths_N1 == 0, 1, lengths_N1)).astype(np.float32)
