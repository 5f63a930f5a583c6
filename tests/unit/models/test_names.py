"""Encoders by the names that timm knows, and those that are refused, before anything starts."""

import pytest

from maskray.config.models import BlockDecoder, SparseConvConfig, TimmVitConfig, VitDecoder
from maskray.errors import ConfigError
from maskray.models.build import build_model

DECODER = VitDecoder(width=32, depth=1, heads=2)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "deit3_small_patch16_224",
        "vit_little_patch16_reg4_gap_256",
        "vit_base_patch16_clip_224",
        "vit_base_patch16_siglip_224",
    ],
)
def test_plain_transformers_of_timm_are_built(name):
    model = build_model(TimmVitConfig(name=name, patch=8, decoder=DECODER), (16, 24), 5)
    assert model.grid_HW == (2, 3)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("vit_tiny_patch16_2244", "timm knows no such model"),
        ("resnet50", "no plain vision transformer"),
        ("swin_tiny_patch4_window7_224", "no plain vision transformer"),
        ("deit_tiny_distilled_patch16_224", "no plain vision transformer"),
        ("vit_base_patch16_rope_reg1_gap_256", "no plain vision transformer"),
    ],
)
def test_what_is_no_plain_transformer_is_refused_with_what_is(name, problem):
    with pytest.raises(ConfigError, match=rf"model\.name.*{problem}.*{name}.*vit_small_patch16_224"):
        build_model(TimmVitConfig(name=name, patch=8, decoder=DECODER), (16, 16), 3)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "wide_resnet50_2", "convnext_atto", "convnextv2_atto"])
def test_plain_convolutional_networks_of_timm_are_built(name):
    model = build_model(SparseConvConfig(name=name, decoder=BlockDecoder(width=16)), (64, 32), 2, group_images=4)
    assert model.grid_HW == (2, 1)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("resnet5", "timm knows no such model"),
        ("vit_tiny_patch16_224", "neither a ResNet nor a ConvNeXt"),
        ("seresnet50", "layers that are not known to keep hidden cells out"),
        ("resnetaa50", "layers that are not known to keep hidden cells out"),
    ],
)
def test_other_convolutional_networks_are_refused_with_those_that_work(name, problem):
    with pytest.raises(ConfigError, match=rf"model\.name.*{problem}.*{name}.*convnextv2_"):
        build_model(SparseConvConfig(name=name), (64, 64), 3)
