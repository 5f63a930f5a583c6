"""The walk of a split that lies decoded on the accelerator: crops, flips and masks are made there, a row group at once.

Order, boxes, flips and masks are those of the other walks to the bit, pixels to within 1/255 (see `resize`). The host
only draws boxes and says where they lie; it never waits for the device, so it runs ahead as it does in a step.

Shape letters: N views of a row group, as in `stream`; n some of them; Y and X pixels of boxes, padded to the largest;
C, H, W channels and pixels of the result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch

from maskray.config.schema import DataConfig
from maskray.data.cache import WholeImages
from maskray.data.resize import resize
from maskray.data.shards import Dataset, decoded_bytes
from maskray.data.spec import StreamSpec
from maskray.data.stream import Array, Unit, draw_crops, draw_masks
from maskray.errors import ConfigError

logger = logging.getLogger(__name__)

_SCRATCH_PIXELS = 2**22
"""Of boxes that are resized at once; about 40 bytes of memory each with three channels."""
_GIB = 2**30


def check(dataset: Dataset, data: DataConfig, device: torch.device) -> None:
    """Refuse a split that the device cannot hold; warn where its products are not those of float32.

    Raises:
        ConfigError: it needs more than is free, or, where the device is the CPU, than `data.local_bytes`.
    """
    needed = decoded_bytes(dataset, data.channels)
    if device.type == "cuda":
        room, whose = torch.cuda.mem_get_info(device)[0], f"free on {device}"
    else:
        room, whose = data.local_bytes, "of data.local_bytes"
    if needed > room:
        raise ConfigError(
            "the decoded training split does not fit on the device",
            key="data.cache",
            found=f"device, for {needed / _GIB:.2f} GiB",
            allowed=f"at most {room / _GIB:.2f} GiB {whose}, and the model needs its share",
            fix="take data.cache: host, or ingest again with smaller images",
        )
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":  # NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
        logger.warning(
            "float32 products are computed with less (%s): pixels may differ from those of other caches by more than "
            "1/255",
            precision,
        )


def device_units(spec: StreamSpec, images: WholeImages, positions: Iterator[int]) -> Iterator[Unit]:
    """The row groups at positions of the plan, on the device that the images lie on."""
    for position in positions:
        yield load_unit(spec, images, position)


def load_unit(spec: StreamSpec, images: WholeImages, position: int) -> Unit:
    """As `stream.load_unit`, a pure function, but images and visibility are tensors on the device."""
    pass_, group = spec.plan.locate(position)
    rows, num_views, device = images.rows(group), spec.views_per_image, images.pixels.device
    sizes = np.stack([images.heights[rows], images.widths[rows]], axis=1)
    boxes_N4, flips_N = draw_crops(spec, pass_, rows, sizes)
    view_N = torch.arange(len(boxes_N4), device=device)
    of_N = (view_N // num_views + int(rows[0]), view_N % num_views)
    visible_NHW, target_NHW = draw_masks(spec, position, pass_, *of_N, xp=torch)
    return Unit(
        position=position,
        images_NCHW=_crop(images, np.repeat(rows, num_views), boxes_N4, flips_N, spec.image_size),
        visible_NHW=visible_NHW,
        weights_N=np.repeat(images.is_decoded[rows], num_views).astype(np.float32),
        keys=[key for key in images.keys_of(group) for _ in range(num_views)],
        target_NHW=target_NHW,
    )


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, where it may lie already. From pinned memory, or the host would wait for the copy."""
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _crop(
    images: WholeImages, rows_N: Array, boxes_N4: Array, flips_N: Array, size_HW: tuple[int, int]
) -> torch.Tensor:
    """(N, C, H, W) uint8."""
    tops, lefts, heights, widths = boxes_N4.T
    strides = images.widths[rows_N]
    planes = images.heights[rows_N] * strides
    firsts = images.offsets[rows_N] + tops * strides + lefts
    geometry_N6 = np.stack([firsts, strides, planes, heights, widths, flips_N], axis=1)
    some = max(1, _SCRATCH_PIXELS // int(heights.max() * widths.max()))
    parts = []
    for part_n6 in moved(torch.from_numpy(geometry_N6), images.pixels.device).split(some):
        firsts_n, strides_n, planes_n, heights_n, widths_n, flips_n = part_n6.unbind(1)
        at_nYX = _offsets(firsts_n, strides_n, heights_n, widths_n, (int(heights.max()), int(widths.max())))
        channels = [images.pixels[at_nYX + c * planes_n[:, None, None]] for c in range(images.channels)]
        parts.append(resize(torch.stack(channels, dim=2), heights_n, widths_n, flips_n.bool(), size_HW))
    return torch.cat(parts)


def _offsets(
    firsts_n: torch.Tensor,
    strides_n: torch.Tensor,
    heights_n: torch.Tensor,
    widths_n: torch.Tensor,
    most_YX: tuple[int, int],
) -> torch.Tensor:
    """Where each pixel of each box lies; beyond its end, its last row or column again. (n, Y, X) int64."""
    y_nY, x_nX = (
        torch.minimum(torch.arange(most, device=ends_n.device), ends_n[:, None] - 1)
        for most, ends_n in zip(most_YX, (heights_n, widths_n), strict=True)
    )
    return (firsts_n[:, None] + y_nY * strides_n[:, None])[:, :, None] + x_nX[:, None, :]
