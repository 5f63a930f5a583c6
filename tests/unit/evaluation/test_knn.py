"""Weighted neighbours against scikit-learn's."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from maskray.errors import ConfigError
from maskray.evaluation import knn
from maskray.evaluation.knn import knn_probabilities


def features(num, seed, num_classes=5, width=16):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num) * 3 + 2  # labels need not be 0, 1, 2
    return (rng.normal(size=(num, width)) + 0.5 * labels[:, None] * np.arange(width)).astype(np.float32), labels


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_are_those_of_scikit_learn(k, temperature, monkeypatch):
    monkeypatch.setattr(knn, "_CHUNK_VALUES", 5000)  # several portions of test rows
    (train, labels), (test, _) = features(300, 0), features(77, 1)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    expected = theirs.fit(train.astype(np.float64), labels).predict_proba(test.astype(np.float64))
    ours = knn_probabilities(train, labels, test, k=k, temperature=temperature)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
    assert not (ours.argmax(axis=1) == 0).all()


def test_a_temperature_near_zero_asks_the_nearest_alone():
    (train, labels), (test, _) = features(100, 0), features(20, 1)
    nearest = knn_probabilities(train, labels, test, k=1, temperature=1.0)
    np.testing.assert_allclose(knn_probabilities(train, labels, test, k=50, temperature=1e-9), nearest, atol=1e-6)


def test_more_neighbours_than_rows_are_refused():
    train, labels = features(10, 0)
    with pytest.raises(ConfigError, match=r"k: .*fewer training rows than neighbours.*Found: 11.*Allowed: 1 to 10"):
        knn_probabilities(train, labels, train, k=11, temperature=0.07)
