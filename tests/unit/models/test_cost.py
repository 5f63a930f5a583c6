"""The model of operations against what torch counts.

The conventions of both: attention by its two products (torch's `math` kernel), no gradient of the images. Torch counts
the weights' gradient of a convolution in groups as if each channel met all others: that one is mended here.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_backward_flop, conv_flop_count

from maskray.config.models import VitConfig
from maskray.models.build import build_model
from maskray.models.cost import cost

WITHIN = 0.02


def convolution_backward_flops(*arguments, out_val, **options):
    grad, x, weight, *_, transposed, _padding, groups, wanted = arguments
    if groups == 1:
        return conv_backward_flop(*arguments, out_val=out_val, **options)
    return sum(wanted[:2]) * conv_flop_count(x.shape, weight.shape, grad.shape, transposed)


convolution_backward_flops._get_raw = True  # tensors, not shapes


def counted(run, num_images):
    mended = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=mended) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() / num_images


def test_operations_are_those_that_torch_counts(build):
    model, images, visible, target = build(2)
    seen = visible, int(visible[0].sum())
    aim = target, int(target[0].sum())
    expected = cost(model, seen[1], aim[1])

    encoder = counted(lambda: model.encode_visible(images, *seen), 2)
    forward = counted(lambda: model(images, *seen, *aim), 2)
    training = counted(lambda: model(images, *seen, *aim).sum().backward(), 2)
    assert expected.encoder_flops == pytest.approx(encoder, rel=WITHIN)
    assert expected.forward_flops == pytest.approx(forward, rel=WITHIN)
    assert expected.encode_flops == pytest.approx(counted(lambda: model.encode(images), 2), rel=WITHIN)
    assert expected.training_flops == pytest.approx(training, rel=WITHIN)


def test_parameters_are_those_of_the_model(build):
    model = build(1)[0]
    expected = cost(model, 1)
    learned = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    decoder = sum(n for name, n in learned.items() if name.startswith(("decoder", "mask_token")))
    assert expected.decoder_parameters == decoder > 0
    assert expected.encoder_parameters == sum(learned.values()) - decoder > 0


def test_the_published_sizes_cost_what_the_facts_say():
    """ViT-B/16 with a decoder of 8 × 512 at ratio .75: 4.41 and 5.37 billion multiply-adds, 55 % of them decoder's.

    The authors embed hidden cells too and drop them afterwards, and paint visible ones; ours does neither.
    """
    with torch.device("meta"):
        base = cost(build_model(VitConfig(), (224, 224), 3), 49, num_target=196)
    hidden_cells, visible_cells = (196 - 49) * 768 * 768, 49 * 768 * 768
    assert (base.encoder_flops / 2 + hidden_cells) / 1e9 == pytest.approx(4.41, rel=0.002)
    assert base.decoder_flops / 2e9 == pytest.approx(5.37, rel=0.01)
    assert base.decoder_share == pytest.approx(0.55, abs=0.01)
    assert base.training_flops == 3 * base.forward_flops - 2 * visible_cells
    assert base.encoder_parameters == pytest.approx(85.6e6, rel=0.01)
