import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskray.config.models import VitConfig, VitDecoder
from maskray.models.build import build_model
from maskray.models.cost import cost

CASES = [
    (VitConfig(patch=4, width=64, depth=2, heads=4, decoder=VitDecoder(width=32, depth=1, heads=4)), (16, 24), 3, 6),
    (VitConfig(patch=2, width=192, depth=3, heads=3, decoder=VitDecoder(width=96, depth=2, heads=3)), (16, 16), 1, 16),
    (
        VitConfig(
            patch=(8, 4),
            width=128,
            depth=1,
            heads=2,
            mlp_ratio=2.5,
            positions="learnable",
            decoder=VitDecoder(width=64, depth=3, heads=2, mlp_ratio=3),
        ),
        (32, 16),
        3,
        10,
    ),
]


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("config", "size", "channels", "num_visible"), CASES)
def test_operations_are_those_that_torch_counts(config, size, channels, num_visible):
    model = build_model(config, size, channels)
    expected = cost(model, num_visible)
    images = torch.zeros(2, channels, *size)
    visible = torch.zeros(2, *model.grid_HW, dtype=torch.bool)
    visible.view(2, -1)[:, :num_visible] = True

    encoder = counted(lambda: model.encode_visible(images, visible, num_visible)) / 2
    forward = counted(lambda: model(images, visible, num_visible)) / 2
    training = counted(lambda: model(images, visible, num_visible).sum().backward()) / 2
    assert expected.encoder_flops == pytest.approx(encoder, rel=0.02)
    assert expected.forward_flops == pytest.approx(forward, rel=0.02)
    assert expected.encode_flops == pytest.approx(counted(lambda: model.encode(images)) / 2, rel=0.02)
    # The counter also sees attention's recomputation in the backward pass, and no gradient of the images.
    assert expected.training_flops == pytest.approx(training, rel=0.1)


@pytest.mark.parametrize(("config", "size", "channels", "num_visible"), CASES)
def test_parameters_are_those_of_the_model(config, size, channels, num_visible):
    model = build_model(config, size, channels)
    expected = cost(model, num_visible)
    learned = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    decoder = sum(n for name, n in learned.items() if name.startswith(("decoder_", "mask_token")))
    assert expected.decoder_parameters == decoder
    assert expected.encoder_parameters == sum(learned.values()) - decoder


def test_the_published_sizes_cost_what_the_facts_say():
    """ViT-B/16 with a decoder of 8 × 512 at ratio .75: 4.41 and 5.37 billion multiply-adds, 55 % of them decoder's.

    The authors embed hidden cells too and drop them afterwards; ours does not.
    """
    with torch.device("meta"):
        base = cost(build_model(VitConfig(), (224, 224), 3), 49)
    hidden_cells = (196 - 49) * 768 * 768
    assert (base.encoder_flops / 2 + hidden_cells) / 1e9 == pytest.approx(4.41, rel=0.002)
    assert base.decoder_flops / 2e9 == pytest.approx(5.37, rel=0.01)
    assert base.decoder_share == pytest.approx(0.55, abs=0.01)
    assert base.training_flops == 3 * base.forward_flops
    assert base.encoder_parameters == pytest.approx(85.6e6, rel=0.01)
