"""Bytes to what a model sees, on the device of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from maskray.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """(x / 255 - mean) / std for each channel, in fp32.

    Args:
        mean: one value a channel, in units of 0 to 1.
        std: likewise, above 0.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        assert len(mean) == len(std)
        # Not in the state: they belong to the config and the dataset, and a checkpoint's keys are the authors' alone.
        self.register_buffer("mean_C11", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std_C11", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)

    @classmethod
    def from_kind(
        cls,
        kind: Literal["dataset", "imagenet", "symmetric"],
        channels: int,
        dataset_mean: Sequence[float] = (),
        dataset_std: Sequence[float] = (),
    ) -> Normalize:
        """The normalisation that `data.normalize` names.

        Args:
            kind: `imagenet` (for gray images the mean of its three channels), `symmetric` ([0, 255] to [-1, 1]), or
                `dataset`.
            channels: of the images.
            dataset_mean: for `dataset`: one value a channel in units of 0 to 1, or one for all.
            dataset_std: likewise.

        Raises:
            DataError: the dataset's statistics are for another number of channels, or a channel is constant.
        """
        if kind == "symmetric":
            return cls([0.5] * channels, [0.5] * channels)
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if kind == "imagenet" else (tuple(dataset_mean), tuple(dataset_std))
        if kind == "imagenet" and channels == 1:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        if kind == "dataset" and len(mean) == 1:  # gray images shown as RGB repeat their one channel
            mean, std = mean * channels, std * channels
        if len(mean) != channels or len(std) != channels:
            whose, others = ("ImageNet", "dataset") if kind == "imagenet" else ("the dataset", "imagenet")
            raise DataError(
                f"mean and std of {whose} are those of {len(mean)} channels, the run asks for {channels}",
                key="data.normalize",
                found=kind,
                allowed=f"{others} or symmetric, or data.channels as ingested",
            )
        if min(std) <= 0:
            raise DataError(
                "a channel of the dataset is constant: its std is 0",
                key="data.normalize",
                found=f"std {list(std)}",
                fix="use symmetric, and look at the images",
            )
        return cls(mean, std)

    def forward(self, bytes_BCHW: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to fp32 of the same shape."""
        return (bytes_BCHW.float() / 255 - self.mean_C11) / self.std_C11

    def to_bytes(self, images_BCHW: Tensor) -> Tensor:
        """The way back, rounded and clipped to uint8: for looking at."""
        pixels_BCHW = (images_BCHW.float() * self.std_C11 + self.mean_C11) * 255
        return pixels_BCHW.round().clamp(0, 255).to(torch.uint8)
