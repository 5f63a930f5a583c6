"""From images as they come to features: decoded and resized as in training, in batches.

What a registered model takes along: no more than decoding and the model itself.

Shape letters: N images, C channels, H and W pixels down and across, D width of a feature.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from maskray.data import decode
from maskray.models.encoder import Encoder, resize

Features = np.ndarray[Any, np.dtype[np.float32]]
Precision = Literal["fp32", "bf16"]

BATCH = 256
"""Images that the encoder gets at once: what memory a call takes does not depend on how many it is given."""


def picture_of(data: bytes, channels: int, size_HW: tuple[int, int]) -> Tensor:
    """An encoded image as the encoder takes it: uint8 (C, H, W), whole, resized as in training.

    Raises:
        UndecodableError: not an image, cut short, damaged, or of another number of bands.
    """
    return resize(decode.decode(data, channels)[None], size_HW)[0]


def encode(pictures: list[Tensor], encoder: Encoder, batch: int = BATCH, precision: Precision = "fp32") -> Features:
    """Features (N, D) of uint8 images (C, H, W) that have the encoder's size."""
    device = next(encoder.parameters()).device
    parts = [np.empty((0, encoder.width), np.float32)]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.inference_mode(), autocast:
        for first in range(0, len(pictures), batch):
            bytes_NCHW = torch.stack(pictures[first : first + batch])
            parts.append(encoder(bytes_NCHW.to(device)).cpu().numpy())
    return np.concatenate(parts)
