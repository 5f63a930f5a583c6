"""Any encoder is the backbone of a pyramid whose levels are where they say."""

from itertools import pairwise

import pytest
import torch

from maskray.config.models import VitConfig
from maskray.errors import ConfigError
from maskray.evaluation.detection.pyramid import NUM_LEVELS, SimplePyramid, build_backbone
from maskray.models.encoder import Encoder, at_size, encoder_only
from maskray.models.normalize import Normalize

from .conftest import MODELS, encoder_of

SIDES = {"vit of patch 14": (56, 112)}
"""Of the encoder, and of the detector; else 64 and 128."""


@pytest.mark.parametrize("kind", MODELS)
def test_each_level_is_half_as_fine_as_the_one_before(kind):
    side, larger = SIDES.get(kind, (64, 128))
    backbone = build_backbone(encoder_of(kind, side), larger, 16).eval()
    levels = list(backbone(torch.zeros(2, 3, larger, larger)).values())
    assert len(levels) == len(backbone.strides) == NUM_LEVELS
    for level, stride in zip(levels, backbone.strides, strict=True):
        places = -(-larger // stride)
        assert level.shape == (2, 16, places, places)
    assert [b / a for a, b in pairwise(backbone.strides)] == [2] * (NUM_LEVELS - 1)


@pytest.mark.parametrize("kind", MODELS)
def test_all_of_it_learns(kind):
    side, larger = SIDES.get(kind, (64, 128))
    backbone = build_backbone(encoder_of(kind, side), larger, 8).train()
    generator = torch.Generator().manual_seed(0)
    levels = backbone(torch.randn(2, 3, larger, larger, generator=generator)).values()
    sum((level * torch.randn(level.shape, generator=generator)).sum() for level in levels).backward()
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert all(p.grad.any() for name, p in trained.items() if name.startswith("pyramid."))


@pytest.mark.parametrize(
    ("patch", "strides"),
    [(16, (4, 8, 16, 32)), (8, (4, 8, 16, 32)), (32, (4, 8, 16, 32)), (14, (7, 14, 28, 56)), (4, (4, 8, 16, 32))],
)
def test_strides_of_a_transformers_pyramid_are_whole_numbers_of_pixels(patch, strides):
    assert SimplePyramid(32, patch, 8).strides == strides


def test_a_level_sees_what_is_below_its_place():
    """A bright quarter moves that quarter of each level, and of the finest not the opposite corner."""
    backbone = build_backbone(encoder_of("conv"), 128, 8).eval()
    dark, bright = torch.zeros(2, 1, 3, 128, 128).unbind()
    bright[..., :64, 64:] = 3.0
    with torch.no_grad():
        moved = [(a - b).abs().sum(1)[0] for a, b in zip(*(backbone(x).values() for x in (dark, bright)), strict=True)]
    assert all(level[0, -1] > 0 for level in moved)
    assert moved[0][-1, 0] == 0


@pytest.mark.parametrize("kind", ["vit", "vit, learnable positions"])
def test_positions_of_another_size_are_resampled(kind):
    encoder = encoder_of(kind, 64)
    with torch.no_grad():  # positions that say where they are
        rows = torch.linspace(-1, 1, encoder.model.grid_HW[0])
        encoder.model.pos_embed[0, 1:, 0] = rows[:, None].expand(encoder.model.grid_HW).flatten()
        encoder.model.pos_embed[0, 0] = 7
    larger = at_size(encoder, (128, 128)).model
    table = larger.pos_embed[0, 1:, 0].unflatten(0, larger.grid_HW)
    assert larger.grid_HW == tuple(2 * each for each in encoder.model.grid_HW)
    assert torch.equal(larger.pos_embed[0, 0], encoder.model.pos_embed[0, 0])
    assert (table.diff(dim=0) >= -1e-6).all()
    assert table.diff(dim=1).abs().max() < 1e-5


def test_a_copy_of_the_same_size_computes_the_same_and_is_a_copy():
    encoder = encoder_of("vit")
    copy = at_size(encoder, (64, 64))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(copy.eval()(images), encoder(images))
        next(copy.model.blocks[0].parameters()).add_(1)
    assert not torch.equal(copy(images), encoder(images))
    assert all(p.requires_grad for name, p in copy.model.named_parameters() if name != "pos_embed")


def test_a_model_with_its_decoder_gives_the_same_copy():
    from maskray.models.build import build_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = build_model(MODELS["vit"], (64, 64), 3)
    encoder = Encoder(whole, Normalize([0.5] * 3, [0.5] * 3), (64, 64), MODELS["vit"])
    assert not [name for name, _ in at_size(encoder, (128, 128)).model.named_parameters() if "decoder" in name]


@pytest.mark.parametrize(
    ("kind", "side", "allowed"), [("vit", 60, "multiples of 32"), ("vit", 72, "multiples of 32"), ("ResNet", 48, "32")]
)
def test_a_size_that_does_not_fit_is_refused(kind, side, allowed):
    with pytest.raises(ConfigError, match=f"image_size: .*{side}.*{allowed}"):
        build_backbone(encoder_of(kind), side, 8)


def test_cells_that_are_not_square_are_refused():
    config = VitConfig(patch=(8, 16), width=32, depth=1, heads=2)
    encoder = Encoder(encoder_only(config, (64, 64), 3), Normalize([0.5] * 3, [0.5] * 3), (64, 64), config)
    with pytest.raises(ConfigError, match=r"square cells.*8 × 16"):
        build_backbone(encoder, 64, 8)
