import logging

import numpy as np
import pytest
import torch

from maskray.errors import DataError
from maskray.evaluation import logistic
from maskray.evaluation.logistic import Accuracy, few_label_correct, full_accuracy


def blobs(rows, spread, seed=0, classes=4, dimensions=8):
    rng = np.random.default_rng(seed)
    scale = np.tile([1, 100], dimensions // 2)  # they differ, so that features which are not standardised fail
    centers = np.random.default_rng(7).normal(size=(classes, dimensions)) * scale
    labels = rng.integers(0, classes, rows)
    return (centers[labels] + rng.normal(size=(rows, dimensions)) * scale * spread).astype(np.float32), labels


def blobs_of(spread):
    return (*blobs(400, spread, seed=1), *blobs(200, spread, seed=2))


@pytest.fixture
def data():
    return blobs_of(1.2)


def few(data, **changes):
    return Accuracy.of(few_label_correct(*data, **{"labels_per_class": 5, "num_draws": 6, "seed": 0} | changes))


def test_separable_features_are_read_without_a_mistake():
    data = blobs_of(0.05)
    assert few(data) == Accuracy(1.0, 0.0)
    assert full_accuracy(*data) == 1.0


def test_noise_is_read_at_chance():
    data = blobs_of(0.05)
    data = (
        np.random.default_rng(3).normal(size=data[0].shape),
        data[1],
        np.random.default_rng(4).normal(size=data[2].shape),
        data[3],
    )
    assert 0.1 < few(data).mean < 0.4


def test_more_labels_help(data):
    few_labels, many_labels = few(data, labels_per_class=2), few(data, labels_per_class=40)
    assert 0.25 < few_labels.mean < many_labels.mean < full_accuracy(*data) + 0.05
    assert few_labels.std > 0


def test_draws_follow_from_the_seed_alone(data):
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 (what must not move)
    first = few(data)
    assert few(data) == first
    assert few(data, seed=1) != first
    assert torch.equal(state, torch.get_rng_state())
    assert (legacy == np.random.get_state()[1]).all()  # noqa: NPY002


def test_one_draw_has_no_spread(data):
    assert few(data, num_draws=1).std == 0


def test_a_class_with_too_few_rows_is_named(data):
    labels = data[1].copy()
    labels[labels == 2] = 3
    labels[:3] = 2
    with pytest.raises(DataError, match=r"labels_per_class.*class 2 has 3.*at most 3"):
        few((data[0], labels, *data[2:]))


def test_no_rows_and_one_class_are_refused(data):
    empty = (data[0], data[1], data[2][:0], data[3][:0])
    one = (data[0], np.zeros_like(data[1]), data[2], data[3])
    for probe in (few, lambda given: full_accuracy(*given)):
        with pytest.raises(DataError, match="both splits"):
            probe(empty)
        with pytest.raises(DataError, match="two classes"):
            probe(one)


def test_a_probe_that_does_not_converge_is_a_log_line_and_no_warning(data, monkeypatch, caplog):
    monkeypatch.setattr(logistic, "MAX_ITERATIONS", 1)
    with caplog.at_level(logging.INFO):
        full_accuracy(*data)
    assert "before it converged" in caplog.text
