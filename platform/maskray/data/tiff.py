"""TIFFs of any number of bands, by tifffile, and what Pillow would not say of the others.

What is wrong with a file is raised as ValueError, or as whatever tifffile stumbles over.
"""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_MAX_PILLOW_BANDS = 4
# TIFF 6.0, and its supplements 1 and 2.
_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3, 9: 3, 10: 3}  # by photometric interpretation; others have one
_ALPHA = (1, 2)  # of ExtraSamples
_INFLATERS: dict[int, Callable[[], Any]] = {
    8: zlib.decompressobj,
    32946: zlib.decompressobj,
    34925: lzma.LZMADecompressor,
}
_SMALL_BYTES = 64 * 2**20  # a tile may be larger than the picture


def first_page(data: bytes) -> Any:
    """The first picture's directory, as tifffile has it."""
    import tifffile  # few need it, and its import takes a while

    return tifffile.TiffFile(io.BytesIO(data)).pages[0]


def size_of(page: Any) -> tuple[int, int, int, int]:
    """Height, width, channels (a palette has three) and bytes of a pixel in a band, as the directory says."""
    size = page.imagelength, page.imagewidth, page.samplesperpixel
    if not all(isinstance(number, int) and number > 0 for number in size):  # a tag may hold anything
        raise ValueError("it gives no whole numbers for its size")
    height, width, bands = size
    channels = 3 if page.colormap is not None else bands
    return height, width, channels, 1 if page.dtype is None else page.dtype.itemsize


def refuse_hidden_bands(page: Any, channels: int) -> None:
    """A band more that is not said to be alpha may be infrared: Pillow would drop it without a word."""
    alpha = [kind for kind in page.extrasamples if kind in _ALPHA]
    if page.samplesperpixel > min(_MAX_PILLOW_BANDS, _COLOURS.get(page.photometric, 1) + len(alpha)):
        raise ValueError(f"it has {page.samplesperpixel} bands, {channels} are asked for")


def refuse_bomb(page: Any, data: bytes) -> None:
    """Tifffile inflates a strip or tile whole, however much comes out. So it is done here first, to a bound."""
    inflater = _INFLATERS.get(page.compression)
    if inflater is None:
        return
    most = max(prod(size_of(page)), _SMALL_BYTES)
    for at, size in zip(page.dataoffsets, page.databytecounts, strict=False):
        if len(inflater().decompress(data[at : at + size], most + 1)) > most:
            raise ValueError(f"a part of it inflates to more than {most} bytes")


def read(data: bytes) -> Bytes:
    """All bands of the first page, interleaved or one after another, as (C, H, W), upright."""
    page = first_page(data)
    if page.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels of type {page.dtype} have no known range")
    axes = {"YX": "SYX", "SYX": "SYX", "YXS": "YXS"}.get(page.axes)
    if axes is None:
        raise ValueError(f"its axes are {page.axes}, not height, width and bands")
    pixels = page.asarray()
    pixels = pixels if page.dtype == np.uint8 else to_eight_bits(pixels)
    pixels_CHW = pixels.reshape(-1, *pixels.shape[-2:]) if axes == "SYX" else np.moveaxis(pixels, -1, 0)
    return np.ascontiguousarray(_upright(pixels_CHW, page.tags.valueof("Orientation", 1)))


def to_eight_bits(pixels: np.ndarray[Any, Any]) -> Bytes:
    """round(255 · x / 65535), as libpng has it."""
    return ((pixels.astype(np.uint32) * 255 + 32895) >> 16).astype(np.uint8)


def _upright(pixels_CHW: Bytes, orientation: int) -> Bytes:
    """Turned as the EXIF orientation says, 1 to 8."""
    if orientation >= 5:
        pixels_CHW = pixels_CHW.swapaxes(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return np.flip(pixels_CHW, flips)
