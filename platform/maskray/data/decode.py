"""Bytes to pixels."""

from __future__ import annotations

import io
import re

import numpy as np
import torch
from PIL import Image, ImageOps
from torchcodec.decoders import decode_image

_MODES = {1: ("GRAY", "L"), 3: ("RGB", "RGB")}
# Formats that torchcodec lacks. Named, because some of Pillow's others run programs (EPS) or have no signature (TGA).
_PILLOW_FORMATS = ("BMP", "JPEG2000", "PPM", "TIFF")


class UndecodableError(ValueError):
    """These bytes are no image that we can decode; the message is a reason to show."""


def decode(data: bytes, channels: int) -> torch.Tensor:
    """An image as uint8 of shape (C, H, W), upright (EXIF), without alpha; of an animation the first frame.

    Args:
        data: an encoded image; its format is told from the bytes.
        channels: 1 for gray, 3 for RGB; the image is converted.

    Raises:
        UndecodableError: not an image, cut short, or damaged.
    """
    if not data:
        raise UndecodableError("the file is empty")
    codec_mode, pillow_mode = _MODES[channels]
    # Not the bytes themselves: torchcodec would then change the process's warning filters, which is not thread-safe.
    source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        image = decode_image(source, mode=codec_mode)
    except ValueError:  # a format it does not know
        return _decode_with_pillow(data, pillow_mode)
    except RuntimeError as error:
        raise UndecodableError(_reason(error)) from error
    upright: torch.Tensor = image if image.dim() == 3 else image[0]
    return upright


def _decode_with_pillow(data: bytes, mode: str) -> torch.Tensor:
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16"):  # convert() would clip it to 255
                pixels_HW = (np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)
                upright = Image.fromarray(pixels_HW)
            elif upright.mode in ("I", "F"):
                raise UndecodableError(f"pixels of mode {upright.mode} (32 bits) have no known range")
            pixels = np.array(upright.convert(mode))
    except UndecodableError:
        raise
    except Exception as error:  # damaged files raise nearly anything in Pillow
        raise UndecodableError(_reason(error)) from error
    tensor = torch.from_numpy(pixels)
    return tensor[None] if tensor.dim() == 2 else tensor.permute(2, 0, 1)


def _reason(error: Exception) -> str:
    """The message without the place in torchcodec's source and without its advice."""
    text = re.sub(r"^.*?\.cpp:\d+, ", "", str(error).strip().partition("\n")[0])
    return re.sub(r"<_?io\.BytesIO object at \w+>", "the file", text)[:200] or type(error).__name__
