"""Features through every evaluation that names rows, and what cannot be judged."""

import numpy as np
import pytest

from maskray.config.evaluation import EvaluateConfig, KnnEvaluation, LinearEvaluation, LogisticEvaluation
from maskray.config.load import parse
from maskray.errors import ConfigError, DataError
from maskray.evaluation.classification import Labelled, check_classes, classify
from maskray.evaluation.scores import score

CENTRES = np.random.default_rng(9).normal(size=(3, 8))


def rows(num, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, num)
    return (CENTRES[labels] + rng.normal(size=(num, 8))).astype(np.float32), labels


LABELLED = Labelled(*rows(300, 0), *rows(200, 1))


@pytest.mark.parametrize(
    ("evaluation", "names"),
    [
        (KnnEvaluation(k=(1, 20)), ["knn, k 1", "knn, k 20"]),
        (LogisticEvaluation(), ["logistic, all labels"]),
        (LogisticEvaluation(labels_per_class=5, draws=4), ["logistic, 5 labels a class"]),
        (
            LinearEvaluation(label_shares=(0.1, 1.0), epochs=20),
            ["linear, 10 % of the labels", "linear, 100 % of the labels"],
        ),
    ],
)
def test_an_evaluation_names_most_rows_rightly_with_an_interval(evaluation, names):
    found = list(classify(evaluation, LABELLED, features="model", seed=0))
    assert [each.evaluation for each in found] == names
    for each in found:
        assert 0.7 < each.low < each.accuracy < each.high <= 1
        assert each.num_rows == 200
    several = isinstance(evaluation, LogisticEvaluation) and evaluation.labels_per_class
    assert (found[0].std_of_draws is not None) == bool(several or isinstance(evaluation, LinearEvaluation))


def test_features_that_hold_nothing_are_at_chance():
    noise = np.random.default_rng(5).normal(size=(500, 8)).astype(np.float32)
    rows = LABELLED._replace(train_features=noise[:300], test_features=noise[300:])
    for evaluation in (KnnEvaluation(), LogisticEvaluation(), LinearEvaluation(label_shares=(1.0,), epochs=20)):
        assert all(0.2 < each.accuracy < 0.5 for each in classify(evaluation, rows, features="x", seed=0))


def test_a_metric_has_a_name_that_mlflow_takes():
    keys = [
        each.key
        for evaluation in (KnnEvaluation(), LogisticEvaluation(labels_per_class=5), LinearEvaluation(epochs=1))
        for each in classify(evaluation, LABELLED, features="raw pixels", seed=0)
    ]
    assert keys[:2] == ["knn/k_20/raw_pixels", "logistic/5_labels_a_class/raw_pixels"]
    assert "linear/10pct_of_the_labels/raw_pixels" in keys


@pytest.mark.parametrize(
    ("train", "test", "match"),
    [
        ([0, 1, 1], [], "labelled rows are needed in both splits"),
        ([1, 1, 1], [1], "two classes are needed"),
        ([0, 1, 1], [0, 2], r"1 classes of the held-out split have no training row.*Found: boat"),
    ],
)
def test_what_cannot_be_judged_is_refused(train, test, match):
    with pytest.raises(DataError, match=match):
        check_classes(np.array(train, int), np.array(test, int), ["ant", "bee", "boat"])


def test_a_class_with_fewer_rows_than_labels_to_draw_is_named():
    with pytest.raises(DataError, match=r"labels_per_class"):
        list(classify(LogisticEvaluation(labels_per_class=200), LABELLED, features="model", seed=0))


def test_an_evaluation_that_stands_there_twice_is_refused():
    twice = {
        "name": "x",
        "model": "m",
        "data": {"path": "d"},
        "evaluations": [{"kind": "knn"}, {"kind": "knn", "k": [5]}],
    }
    with pytest.raises(ConfigError, match="knn stands there twice"):
        parse(EvaluateConfig, twice)


@pytest.mark.parametrize(
    "evaluation",
    [LogisticEvaluation(), LogisticEvaluation(labels_per_class=5), LinearEvaluation(label_shares=(1.0,), epochs=20)],
)
def test_test_rows_set_no_scale(evaluation):
    """Shifted test features must be named worse: by a scale of their own they would be named as before."""
    shifted = LABELLED._replace(test_features=LABELLED.test_features + 5 * CENTRES[0].astype(np.float32))
    (before,) = classify(evaluation, LABELLED, features="model", seed=0)
    (after,) = classify(evaluation, shifted, features="model", seed=0)
    assert after.accuracy < before.accuracy - 0.2


def test_an_interval_is_wilsons():
    correct = np.arange(100) < 80
    found = score("x", "model", [correct])
    z, p, n = 1.959964, 0.8, 100
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found.low == pytest.approx((middle - half) / (1 + z**2 / n), abs=1e-6)
    assert found.high == pytest.approx((middle + half) / (1 + z**2 / n), abs=1e-6)
