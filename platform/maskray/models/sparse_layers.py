"""Layers of convolutional networks that never see a hidden cell, in plain PyTorch.

A convolution reads zeros where cells are hidden, and what it writes there is set to zero again: at visible places this
is the sparse (submanifold) convolution, to the bit (Woo et al. 2023, §3.1; Tian et al. 2023). Statistics are taken over
visible places alone. Where nothing is hidden each layer is the plain one.

What is visible is an argument, `Seen`: no module holds it.

Shape letters: B images in n groups of G, D channels, h and w places down and across at some scale, H and W cells.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from maskray.models.base import MaskedAutoencoder


class Seen(NamedTuple):
    """What is visible of a batch."""

    visible_BHW: Tensor | None
    """bool, in cells, True = visible; None: all is."""
    weights_B: Tensor | None = None
    """0 for images that do not count in statistics; None: all count."""

    def at(self, size_hw: tuple[int, int]) -> Tensor | None:
        """(B, 1, h, w) bool: the places of a map with a visible cell in them, or in a visible cell."""
        if self.visible_BHW is None:
            return None
        visible_B1HW = self.visible_BHW[:, None]
        (H, W), (h, w) = visible_B1HW.shape[2:], size_hw
        if (h, w) == (H, W):
            return visible_B1HW
        if h >= H:
            return visible_B1HW.repeat_interleave(h // H, 2).repeat_interleave(w // W, 3)
        return F.max_pool2d(visible_B1HW.float(), (H // h, W // w)).bool()

    def shown(self, x_BDhw: Tensor) -> Tensor:
        """The map with zeros where nothing is visible."""
        visible = self.at((x_BDhw.shape[2], x_BDhw.shape[3]))
        return x_BDhw if visible is None else x_BDhw * visible


class ConvolutionalAutoencoder(MaskedAutoencoder):
    """A model whose encoder gives a map at each of several scales."""

    @abstractmethod
    def _maps(self, images_BCHW: Tensor, seen: Seen) -> list[Tensor]:
        """The encoder's maps (B, D, h, w), finest first; zero where nothing is visible."""

    def visible_maps(self, images_BCHW: Tensor, visible_BHW: Tensor) -> list[Tensor]:
        """The encoder's maps (B, D, h, w), finest first; zero where nothing is visible."""
        return self._maps(images_BCHW, Seen(visible_BHW))

    def feature_maps(self, images_BCHW: Tensor, weights_B: Tensor | None = None) -> list[Tensor]:
        """As `MaskedAutoencoder.feature_maps`: one for each scale."""
        return self._maps(images_BCHW, Seen(None, weights_B))


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the visible places of each row group of G images by itself.

    So what is learned does not depend on the number of workers or on gradient accumulation. The running statistics are
    means over the groups of a step; `settle_statistics` moves them once a step. In evaluation it is the plain layer.

    Args:
        num_features: D.
        group_images: G; a batch is whole groups.
    """

    pending: Tensor
    """Sums over the groups since the last step: means, variances, and how many groups. (2 · D + 1,) float64."""

    def __init__(self, num_features: int, group_images: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps=eps)
        self.group_images = group_images
        self.register_buffer("pending", torch.zeros(2 * num_features + 1, dtype=torch.float64), persistent=False)

    def forward(self, x_BDhw: Tensor, seen: Seen) -> Tensor:  # type: ignore[override]
        """The normalised map, zero where nothing is visible; in training, also where an image does not count."""
        if not self.training:
            return seen.shown(super().forward(x_BDhw))
        B, h, w = len(x_BDhw), *x_BDhw.shape[2:]
        assert B % self.group_images == 0, f"{B} images are no whole groups of {self.group_images}"
        visible = seen.at((h, w))
        mask_B1hw = torch.ones_like(x_BDhw[:, :1]) if visible is None else visible
        if seen.weights_B is not None:
            mask_B1hw = mask_B1hw * self._counted(seen.weights_B)[:, None, None, None]
        x_nGDhw = x_BDhw.float().unflatten(0, (-1, self.group_images))
        mask_nG1hw = mask_B1hw.float().unflatten(0, (-1, self.group_images))
        over = (1, 3, 4)
        count_n111 = mask_nG1hw.sum(over, keepdim=True)
        mean = (x_nGDhw * mask_nG1hw).sum(over, keepdim=True) / count_n111
        centred = (x_nGDhw - mean) * mask_nG1hw
        variance = centred.square().sum(over, keepdim=True) / count_n111
        self._note(mean, variance * (count_n111 / (count_n111 - 1).clamp(min=1)), seen.weights_B)
        weight_D11, bias_D11 = self.weight[:, None, None], self.bias[:, None, None]
        out: Tensor = centred * (torch.rsqrt(variance + self.eps) * weight_D11) + bias_D11 * mask_nG1hw
        return out.flatten(0, 1).to(x_BDhw.dtype)

    def _counted(self, weights_B: Tensor) -> Tensor:
        """(B,) bool: images whose values count; in a group that does not count at all, all of them."""
        counted_nG: Tensor = weights_B.unflatten(0, (-1, self.group_images)) > 0
        return torch.logical_or(counted_nG, ~counted_nG.any(dim=1, keepdim=True)).flatten()

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor, weights_B: Tensor | None) -> None:
        statistics_nS = torch.cat([mean.flatten(1), variance.flatten(1)], dim=1).double()
        if weights_B is None:
            counts_n1 = statistics_nS.new_ones(len(statistics_nS), 1)
        else:
            counts_n1 = weights_B.unflatten(0, (-1, self.group_images)).amax(1, keepdim=True).sign().double()
        self.pending += torch.cat([statistics_nS * counts_n1, counts_n1], dim=1).sum(0)


def group_norms(model: nn.Module) -> list[GroupBatchNorm2d]:
    """The layers of a model that keep statistics."""
    return [module for module in model.modules() if isinstance(module, GroupBatchNorm2d)]


@torch.no_grad()
def settle_statistics(norms: Iterable[GroupBatchNorm2d]) -> None:
    """Move the running statistics by the groups of a step, all workers' together."""
    norms = list(norms)
    if not norms:
        return
    pending = torch.cat([norm.pending for norm in norms])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(pending)
    for norm, of_norm in zip(norms, pending.split([len(norm.pending) for norm in norms]), strict=True):
        count = of_norm[-1]
        mean_D, variance_D = (of_norm[:-1] / count.clamp(min=1)).float().chunk(2)
        momentum = (norm.momentum or 0.0) * count.sign().float()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.running_mean.lerp_(mean_D, momentum)
        norm.running_var.lerp_(variance_D, momentum)
        norm.num_batches_tracked += 1
        norm.pending.zero_()


@torch.no_grad()
def drop_statistics(norms: Iterable[GroupBatchNorm2d]) -> None:
    """Forget what a batch that does not count left behind."""
    for norm in norms:
        norm.pending.zero_()


def with_group_norms(model: nn.Module, group_images: int) -> nn.Module:
    """Each batch normalisation of a model made one over row groups; the names and values of its state stay."""
    for name, child in model.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = GroupBatchNorm2d(child.num_features, group_images, eps=child.eps)
            norm.load_state_dict(child.state_dict())
            setattr(model, name, norm)
        else:
            with_group_norms(child, group_images)
    return model


def through(modules: Iterable[nn.Module], x: Tensor, seen: Seen) -> Tensor:
    """A row of plain layers, zero where nothing is visible after each that could fill it."""
    for module in modules:
        if isinstance(module, nn.Sequential):
            x = through(module, x, seen)
        elif isinstance(module, GroupBatchNorm2d):
            x = module(x, seen)
        elif isinstance(module, nn.ReLU | nn.Identity | nn.ReLU6):
            x = module(x)  # zero stays zero
        else:  # of pooling, too: its windows end where cells end, so none has both hidden and visible places
            x = seen.shown(module(x))
    return x
