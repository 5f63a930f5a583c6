"""Heads by SGD reach what a logistic regression without penalty reaches, and nothing leaks between them."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from maskray.errors import DataError
from maskray.evaluation.linear_heads import HeadsRecipe, train_heads
from maskray.evaluation.logistic import standardised


def rows(num, seed, num_classes=4, width=12, noise=2.0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    labels = rng.integers(0, num_classes, num)
    return (centres[labels] + noise * rng.normal(size=(num, width))).astype(np.float32), labels * 2 + 1


RECIPE = HeadsRecipe((0.01, 0.1, 1.0), epochs=60, batch=64)


def test_they_name_rows_as_a_converged_logistic_regression_does():
    (train, labels), (test, wanted) = rows(400, 0), rows(1000, 1)
    found = train_heads(train, labels, test, HeadsRecipe((0.1,), epochs=200, batch=400), seed=0)
    theirs = LogisticRegression(C=np.inf, max_iter=5000).fit(train, labels)
    agreed = (found.predicted_M == theirs.predict(test)).mean()
    assert agreed > 0.98
    assert 0.5 < (found.predicted_M == wanted).mean() < 0.95


def test_a_head_of_a_grid_is_the_one_that_is_trained_alone():
    train, labels = rows(300, 0)
    together = train_heads(train, labels, train, RECIPE, seed=3).held_back_losses
    for rate in RECIPE.learning_rates:
        alone = train_heads(train, labels, train, HeadsRecipe((rate,), RECIPE.epochs, RECIPE.batch), seed=3)
        assert alone.held_back_losses[rate] == pytest.approx(together[rate], abs=1e-6)


def test_the_rate_that_is_best_on_rows_held_back_is_taken():
    train, labels = rows(300, 0)
    found = train_heads(train, labels, train, HeadsRecipe((1e-7, 0.1), 30, 64), seed=0)
    assert found.learning_rate == 0.1
    assert found.held_back_losses[0.1] < found.held_back_losses[1e-7]


def test_rows_that_are_held_back_are_not_trained_on():
    """Labels that say nothing: a head that had seen the rows it is chosen by would be sure of them."""
    rng = np.random.default_rng(0)
    noise, labels = rng.normal(size=(60, 200)).astype(np.float32), rng.integers(0, 2, 60)
    found = train_heads(noise, labels, noise, HeadsRecipe((0.01, 1.0), 60, 64), seed=0)
    assert min(found.held_back_losses.values()) > 0.5
    assert found.learning_rate == 0.01


def test_it_follows_from_the_seed_and_leaves_torchs_own_generator_alone():
    (train, labels), (test, _) = rows(200, 0), rows(100, 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (train_heads(train, labels, test, RECIPE, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.predicted_M, same.predicted_M)
    assert not np.array_equal(one.predicted_M, other.predicted_M)
    assert torch.equal(before, torch.get_rng_state())


def test_one_row_a_class_is_enough():
    train, labels = rows(40, 0)
    first = [int(np.flatnonzero(labels == each)[0]) for each in np.unique(labels)]
    found = train_heads(train[first], labels[first], train[first], RECIPE, seed=0)
    assert np.array_equal(found.predicted_M, labels[first])
    assert (found.held_back_losses, found.learning_rate) == ({}, 0.1)


def test_the_scale_is_that_of_the_training_rows_and_a_constant_feature_keeps_its_own():
    train, _ = rows(50, 0)
    train[:, 3] = 7
    test = train + 5
    scaled, shifted = standardised(train, test)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.delete(scaled.std(axis=0), 3), 1, atol=1e-5)
    assert (shifted.mean(axis=0) > 1).all()
    np.testing.assert_allclose(shifted[:, 3], 5)


def test_one_class_is_refused():
    train, labels = rows(40, 0)
    with pytest.raises(DataError, match="two classes"):
        train_heads(train, np.zeros_like(labels), train, RECIPE, seed=0)
