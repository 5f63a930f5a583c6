import numpy as np
import pytest
import torch

from maskray.config.models import VitConfig, VitDecoder
from maskray.evaluation.features import pixel_features, pooled_features
from maskray.models.build import build_model
from maskray.models.normalize import Normalize

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 12), dtype=np.uint8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = VitConfig(patch=4, width=32, depth=1, heads=2, decoder=VitDecoder(width=16, depth=1, heads=2))
    return build_model(config, (8, 12), 3)


@pytest.fixture
def normalize():
    return Normalize.from_kind("symmetric", 3)


def test_features_are_the_mean_of_the_encoders_cells(model, normalize):
    features = pooled_features(model, normalize, IMAGES)
    with torch.no_grad():
        expected = model.encode(normalize(torch.from_numpy(IMAGES))).mean(1).numpy()
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, expected)


def test_batches_of_any_size_give_each_image_once_and_in_order(model, normalize):
    whole = pooled_features(model, normalize, IMAGES)
    np.testing.assert_allclose(pooled_features(model, normalize, IMAGES, batch=3), whole, atol=1e-5)
    batches = (IMAGES[at : at + 4] for at in range(0, 10, 4))
    np.testing.assert_allclose(pooled_features(model, normalize, batches), whole, atol=1e-5)


def test_modes_gradients_and_generators_are_left_as_they_were(model, normalize):
    model.train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 (what must not move)
    pooled_features(model, normalize, IMAGES)
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


def test_pixels_are_features_too():
    features = pixel_features(IMAGES)
    assert features.shape == (10, 3 * 8 * 12)
    assert features.dtype == np.float32
    assert features[3, 0] == np.float32(IMAGES[3, 0, 0, 0]) / np.float32(255)
