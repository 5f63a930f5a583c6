"""Sparse layers against what they mean: visible places gathered one by one, hidden ones never looked at."""

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from torch.nn import functional as F

from maskray.models.sparse_conv import _convnext_block, _residual
from maskray.models.sparse_layers import GroupBatchNorm2d, Seen, settle_statistics, with_group_norms

GROUP = 2
IMAGES, SIDE = 4, 6


@pytest.fixture
def visible():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(IMAGES, SIDE, SIDE, generator=generator) < 0.4


def a_map(channels, visible_BHW, seed=1):
    """Zero where hidden, as maps are."""
    x = 2 + 3 * torch.randn(IMAGES, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return x * visible_BHW[:, None]


def randomised(module):
    """Nothing is at its start, where scales of zero or one would hide what they scale."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) + 0.3)
    return module


def gathered(x_BDhw, visible_BHW):
    """(M, D) values of the M visible places."""
    return x_BDhw.permute(0, 2, 3, 1)[visible_BHW]


def put_back(values_MD, visible_BHW):
    out = values_MD.new_zeros(*visible_BHW.shape, values_MD.shape[1])
    out[visible_BHW] = values_MD
    return out.permute(0, 3, 1, 2)


def sparse_convolution(conv, x_BDhw, visible_BHW):
    """Each visible place from its visible neighbours alone, in loops."""
    out = x_BDhw.new_zeros(IMAGES, conv.out_channels, SIDE, SIDE)
    reach, per_group = conv.kernel_size[0] // 2, conv.in_channels // conv.groups
    for b, row, column in visible_BHW.nonzero().tolist():
        total = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.clone()
        for b2, row2, column2 in visible_BHW.nonzero().tolist():
            down, across = row2 - row + reach, column2 - column + reach
            if b2 == b and 0 <= down <= 2 * reach and 0 <= across <= 2 * reach:
                weight = conv.weight[:, :, down, across].unflatten(0, (conv.groups, -1))
                value = x_BDhw[b, :, row2, column2].reshape(conv.groups, per_group)
                total = total + torch.einsum("goi,gi->go", weight, value).flatten()
        out[b, :, row, column] = total
    return out


def group_norm_by_hand(norm, x_BDhw, visible_BHW):
    out = torch.zeros_like(x_BDhw)
    for first in range(0, IMAGES, GROUP):
        rows = slice(first, first + GROUP)
        values = gathered(x_BDhw[rows], visible_BHW[rows])
        values = (values - values.mean(0)) / (values.var(0, unbiased=False) + norm.eps).sqrt()
        out[rows] = put_back(values * norm.weight + norm.bias, visible_BHW[rows])
    return out


def test_batch_statistics_are_those_of_the_visible_places_of_each_row_group(visible):
    norm, x = randomised(GroupBatchNorm2d(5, GROUP)), a_map(5, visible)
    torch.testing.assert_close(norm(x, Seen(visible)), group_norm_by_hand(norm, x, visible))


def test_running_statistics_are_means_over_the_groups_with_unbiased_variances(visible):
    norm, x = GroupBatchNorm2d(5, GROUP), a_map(5, visible)
    norm(x, Seen(visible))
    settle_statistics([norm])
    groups = [gathered(x[at : at + GROUP], visible[at : at + GROUP]) for at in range(0, IMAGES, GROUP)]
    mean = torch.stack([values.mean(0) for values in groups]).mean(0)
    variance = torch.stack([values.var(0) for values in groups]).mean(0)
    torch.testing.assert_close(norm.running_mean, norm.momentum * mean)
    torch.testing.assert_close(norm.running_var, (1 - norm.momentum) + norm.momentum * variance)


def test_an_image_that_does_not_count_moves_no_statistics(visible):
    norm, x = randomised(GroupBatchNorm2d(5, GROUP)), a_map(5, visible)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    out = norm(x, Seen(visible, weights))
    counted = visible & (weights > 0)[:, None, None]
    torch.testing.assert_close(out[weights > 0], group_norm_by_hand(norm, x, counted)[weights > 0])
    settle_statistics([norm])
    assert norm.num_batches_tracked == 1

    other = randomised(GroupBatchNorm2d(5, GROUP))
    black = x.clone()
    black[1] = 0
    other(black, Seen(visible, weights))
    settle_statistics([other])
    assert torch.equal(other.running_mean, norm.running_mean)
    assert torch.equal(other.running_var, norm.running_var)


def test_a_group_that_does_not_count_at_all_stays_finite(visible):
    norm = GroupBatchNorm2d(5, GROUP)
    out = norm(a_map(5, visible), Seen(visible, torch.tensor([0.0, 0.0, 1.0, 1.0])))
    assert out.isfinite().all()


@pytest.mark.parametrize("use_conv_mlp", [False, True])
def test_a_convnext_v2_block_is_the_sparse_one(visible, use_conv_mlp):
    """Depth-wise convolution, norm over channels, MLP, and GRN whose norms are over the visible places of an image."""
    block = randomised(ConvNeXtBlock(4, use_grn=True, ls_init_value=0.1, conv_mlp=use_conv_mlp)).eval()
    x = a_map(4, visible)

    inner = gathered(sparse_convolution(block.conv_dw, x, visible), visible)
    norm, mlp = block.norm, block.mlp
    inner = F.layer_norm(inner, (4,), norm.weight, norm.bias, norm.eps)
    fc1, fc2 = (layer.weight.flatten(1) for layer in (mlp.fc1, mlp.fc2))
    inner = F.gelu(inner @ fc1.T + mlp.fc1.bias)
    image_M = visible.nonzero()[:, 0]
    for image in image_M.unique():
        own = image_M == image
        sizes = inner[own].norm(dim=0)
        scaled = inner[own] * sizes / (sizes.mean() + 1e-6)
        inner[own] = inner[own] + mlp.grn.bias + mlp.grn.weight * scaled
    inner = (inner @ fc2.T + mlp.fc2.bias) * block.gamma
    expected = put_back(inner + gathered(x, visible), visible)

    with torch.no_grad():
        torch.testing.assert_close(_convnext_block(block, x, Seen(visible)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_residual_block_is_the_sparse_one(visible, name):
    """Basic and with a bottleneck: hidden places are zero again before the next convolution reads them."""
    net = timm.create_model(name, num_classes=0)
    block = randomised(with_group_norms(net.layer1, GROUP)[1])
    channels = block.conv1.in_channels
    x = a_map(channels, visible).relu()

    expected = x
    with torch.no_grad():
        convolutions = [getattr(block, f"conv{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
        for number, conv in enumerate(convolutions, start=1):
            expected = sparse_convolution(conv, expected, visible)
            expected = group_norm_by_hand(getattr(block, f"bn{number}"), expected, visible)
            expected = (expected + x if number == len(convolutions) else expected).relu()
        torch.testing.assert_close(_residual(block, x, Seen(visible)), expected, rtol=1e-3, atol=1e-3)
