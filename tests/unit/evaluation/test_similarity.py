"""The nearest are scikit-learn's, whatever the parts; the plane is told without a random number."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from maskray.evaluation.similarity import nearest, plane

FEATURES = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)
QUERIES = np.array([0, 3, 77, 199])


@pytest.mark.parametrize("sizes", [[200], [3, 4, 100, 93], [1] * 200])
def test_nearest_by_cosine_are_those_of_scikit_learn(sizes):
    parts = np.split(FEATURES, np.cumsum(sizes)[:-1])
    found = nearest(FEATURES[QUERIES], QUERIES, parts, 5)
    theirs = NearestNeighbors(n_neighbors=6, metric="cosine").fit(FEATURES)
    distances, numbers = theirs.kneighbors(FEATURES[QUERIES])
    assert np.array_equal(found.numbers_QK, numbers[:, 1:])
    np.testing.assert_allclose(found.similarities_QK, 1 - distances[:, 1:], atol=1e-6)


def test_hand_worked():
    rows = np.array([[2, 0], [0, 1], [1, 1], [-1, 0], [0, 0], [5, 0]], np.float32)
    found = nearest(rows[:1], np.array([0]), [rows[:2], rows[2:]], 9)
    assert found.numbers_QK.tolist() == [[5, 2, 1, 4, 3]], "itself is left out, zero is like nothing"
    np.testing.assert_allclose(found.similarities_QK, [[1, 2**-0.5, 0, 0, -1]], atol=1e-6)
    stranger = nearest(rows[:1], np.array([-1]), [rows], 2)
    assert stranger.numbers_QK.tolist() == [[0, 5]], "of equals the lower number"


def test_the_plane_explains_what_lies_in_it():
    flat = np.random.default_rng(1).normal(size=(500, 2)) * [3, 1]
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0][:2]
    found = plane((flat @ rotation + 10).astype(np.float32))
    assert sum(found.shares) == pytest.approx(1, abs=1e-6)
    assert found.shares[0] == pytest.approx(flat[:, 0].var() / flat.var(axis=0).sum(), abs=0.01)
    apart = np.linalg.norm(found.points_N2[:100] - found.points_N2[100:200], axis=1)
    np.testing.assert_allclose(apart, np.linalg.norm(flat[:100] - flat[100:200], axis=1), rtol=1e-4)


def test_the_global_generator_is_left_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - it is what is looked at
    plane(FEATURES)
    nearest(FEATURES[:2], np.array([0, 1]), [FEATURES], 3)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
