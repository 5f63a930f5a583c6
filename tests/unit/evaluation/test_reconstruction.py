import numpy as np
import pytest
import torch

from maskray import masking
from maskray.cells import unpatchify
from maskray.config.models import ObjectiveConfig, RandomMask, VitConfig, VitDecoder
from maskray.evaluation.reconstruction import reconstruct
from maskray.models.build import build_model
from maskray.models.normalize import Normalize
from maskray.objective import Objective

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 12), dtype=np.uint8)
MASK = RandomMask(ratio=0.5)


def build(seed=0):
    torch.manual_seed(seed)
    config = VitConfig(patch=4, width=32, depth=1, heads=2, decoder=VitDecoder(width=16, depth=1, heads=2))
    return build_model(config, (8, 12), 3)


def painted(model, norm_pix=False, seed=3, images=IMAGES):
    objective = Objective(ObjectiveConfig(norm_pix=norm_pix), model.cell_HW)
    return reconstruct(model, Normalize.from_kind("imagenet", 3), objective, images, MASK, seed)


def test_masks_are_fixed_by_the_seed_and_are_none_of_trainings():
    first, later = painted(build(0)), painted(build(1))
    np.testing.assert_array_equal(first.visible_NHW, later.visible_NHW)
    assert (first.visible_NHW != painted(build(0), seed=4).visible_NHW).any()
    training = masking.draw(MASK, (2, 3), 3, seed=3, pass_=0, rows=np.arange(5), view=0)
    assert (first.visible_NHW != training).any()


def test_an_images_mask_does_not_depend_on_how_many_are_shown():
    whole, two = painted(build()), painted(build(), images=IMAGES[:2])
    np.testing.assert_array_equal(whole.visible_NHW[:2], two.visible_NHW)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_painting_and_loss_are_the_models(norm_pix):
    model = build()
    result = painted(model, norm_pix)
    normalize = Normalize.from_kind("imagenet", 3)
    images, visible = normalize(torch.from_numpy(IMAGES)), torch.from_numpy(result.visible_NHW)
    with torch.no_grad():
        pred = model(images, visible, 3)
        loss = Objective(ObjectiveConfig(norm_pix=norm_pix), model.cell_HW)(images, pred, ~visible)
    np.testing.assert_array_equal(result.loss_N, loss.numpy())
    assert result.uses_target_statistics == norm_pix
    assert result.painted_NCHW.shape == IMAGES.shape
    assert result.painted_NCHW.dtype == np.uint8
    if not norm_pix:
        expected = normalize.to_bytes(unpatchify(pred, (4, 4), (2, 3))).numpy()
        np.testing.assert_array_equal(result.painted_NCHW, expected)


def test_mode_and_generator_are_left_as_they_were():
    model = build().train()
    state = torch.get_rng_state()
    painted(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def test_it_draws_a_figure():
    assert painted(build(), norm_pix=True).figure("run · step 0").startswith(b"\x89PNG")
