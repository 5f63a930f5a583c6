"""Bytes to pixels and back.

The format is told from the bytes, never from a name. torchcodec decodes what it knows; Pillow the rest and, of an
animation, the first frame alone (torchcodec would decode them all); tifffile TIFFs of any number of bands.

Shape letters: C channels, H and W pixels down and across.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    ImageOps,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.Image import Image, fromarray
from torchcodec import decoders
from torchcodec.encoders import JpegEncoder

from maskray.config.schema import MAX_CHANNELS
from maskray.data import tiff

_CODECS: dict[str, Callable[..., torch.Tensor]] = {
    "JPEG": decoders.decode_jpeg,
    "PNG": decoders.decode_png,
    "WEBP": decoders.decode_webp,
    "AVIF": decoders.decode_avif,
    "HEIC": decoders.decode_heic,
}
# By class, not by Image.open: that asks every plug-in, some of which run programs (EPS), and has a pixel limit of its
# own that is one number for the whole process.
_READERS: dict[str, Callable[[io.BytesIO, str], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
}
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "AVIF": rb"....ftyp.{0,52}avi[fs]",
    "HEIC": rb"....ftyp.{0,52}(hei[cxms]|hev[cx]|mif1|msf1)",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\x00|MM\x00[*+]",
    "PPM": rb"P[1-6]\s",
    "JPEG2000": rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51",
    "NPY": rb"\x93NUMPY",
}
_SIGNATURE = re.compile(b"|".join(b"(?P<%s>%s)" % (n.encode(), s) for n, s in _SIGNATURES.items()), re.DOTALL)

_CODEC_MODES = {1: "GRAY", 3: "RGB"}
_PILLOW_MODES = {1: "L", 3: "RGB"}

_REASON = 200  # letters at most
_PIXEL_BYTES = 8  # that `max_pixels` allows for: four bands of sixteen bits
_JPEG_SCAN = b"\xff\xda"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_NO_SEGMENT = frozenset((0x00, 0x01, *range(0xD0, 0xD9), 0xFF))
_LONGEST_JPEG = 65_500  # JPEG_MAX_DIMENSION of libjpeg
_MAX_JPEG_SCANS = 200  # progressive ones have about ten; each costs a pass over the whole picture
# What libjpeg leaves where the data of a picture ended early: no coefficients, so 128 in each component, as gray, RGB
# and (the other two) CMYK and YCCK come out of it.
_UNPAINTED = frozenset((128, 64, 63, 127))
_FILLER = bytes(range(1, 255))
_JPEG_BLOCK = 8


class UndecodableError(ValueError):
    """These bytes are no image that we can decode; the message is a reason to show."""


def decode(data: bytes, channels: int) -> torch.Tensor:
    """An image as uint8 of shape (C, H, W), upright (EXIF); of an animation the first frame.

    Sixteen bits are scaled to eight. Alpha is dropped, not blended with a background that nobody chose: a pixel keeps
    the colour that the file stores for it.

    Args:
        data: an encoded image.
        channels: 1 for gray and 3 for RGB: the image is converted. Any other number: the image must have exactly so
            many bands.

    Raises:
        UndecodableError: not an image, cut short, damaged, or of another number of bands.
    """
    kind = _kind_of(data)
    try:
        if kind == "NPY":
            image_CHW = _decode_npy(data)
        elif kind == "TIFF" and channels not in _PILLOW_MODES:
            image_CHW = torch.from_numpy(tiff.read(data))
        elif kind in _CODECS and not _is_animated(kind, data):
            image_CHW = _decode_with_torchcodec(kind, data, channels)
        else:
            image_CHW = _decode_with_pillow(kind, data, channels)
    except UndecodableError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise UndecodableError(reason_of(error)) from error
    if len(image_CHW) != channels:
        raise UndecodableError(f"it has {len(image_CHW)} bands, {channels} are asked for")
    return image_CHW


def is_image(data: bytes) -> bool:
    """Whether data begin as a known image format does."""
    return _SIGNATURE.match(data) is not None


def measure(data: bytes, max_pixels: int | None = None) -> tuple[int, int, int]:
    """Height, width and channels as stored, from the header alone: what `decode` would take, before it takes it.

    Channels count alpha; a palette is colour. EXIF may turn the image: then decoded height and width are swapped.

    Args:
        data: an encoded image.
        max_pixels: height × width at most; with all bands eight bytes for each.

    Raises:
        UndecodableError: not an image, without a whole header, larger, of more bands than `data.channels` allows, or
            made to take for ever or to inflate without end.
    """
    height, width, channels, sample_bytes = _header(data)
    if channels > MAX_CHANNELS:
        raise UndecodableError(f"it has {channels} bands, more than {MAX_CHANNELS}")
    if max_pixels is not None and height * width > max_pixels:
        raise UndecodableError(f"{width} x {height} pixels are more than max_pixels {max_pixels}")
    if max_pixels is not None and height * width * channels * sample_bytes > _PIXEL_BYTES * max_pixels:
        raise UndecodableError(
            f"{width} x {height} pixels of {channels} bands take more than {_PIXEL_BYTES} bytes for each of "
            f"max_pixels {max_pixels}"
        )
    if channels not in _PILLOW_MODES and _kind_of(data) == "TIFF":
        _refuse_bomb(data)
    return height, width, channels


def _refuse_bomb(data: bytes) -> None:
    try:
        tiff.refuse_bomb(tiff.first_page(data), data)
    except Exception as error:  # as in decode
        raise UndecodableError(reason_of(error)) from error


class _Header(NamedTuple):
    height: int
    width: int
    channels: int
    sample_bytes: int = 1
    """Of a pixel in a band. Two are not told from one where there are no more than four bands."""


def _header(data: bytes) -> _Header:
    kind = _kind_of(data)
    try:
        if kind == "NPY":
            return _Header(*_npy_header(data)[0])
        if kind == "JPEG":  # a sixth of Pillow's time
            return _Header(*_jpeg_header(data))
        if kind == "TIFF":  # Pillow knows four bands at most
            return _Header(*tiff.size_of(tiff.first_page(data)))
        if kind == "HEIC":
            return _Header(*_heic_header(data))
        if kind == "WEBP":  # Pillow would take memory for the picture
            return _Header(*_webp_header(data))
        opened = _READERS[kind](io.BytesIO(data), "")
    except UndecodableError:
        raise
    except Exception as error:  # as in decode
        raise UndecodableError(f"its {kind} header is damaged or cut short ({reason_of(error)})"[:_REASON]) from error
    width, height = opened.size
    return _Header(height, width, 3 if opened.mode == "P" else len(opened.getbands()))


def encode(image_CHW: torch.Tensor, quality: int) -> bytes:
    """An image as JPEG where it is gray or RGB, and lossless (.npy) with any other number of channels.

    Args:
        image_CHW: uint8.
        quality: of the JPEG, 1 to 100.

    Raises:
        ValueError: it is longer than a JPEG can be.
    """
    buffer = io.BytesIO()
    if len(image_CHW) in _CODEC_MODES:
        height, width = image_CHW.shape[1:]
        if max(height, width) > _LONGEST_JPEG:
            raise ValueError(f"{width} x {height} pixels do not fit into a JPEG, which has {_LONGEST_JPEG} at most")
        JpegEncoder(image_CHW).to_file_like(buffer, quality=quality)
    else:
        np.save(buffer, np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy()), allow_pickle=False)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- formats


def _kind_of(data: bytes) -> str:
    found = _SIGNATURE.match(data)
    if found is not None and found.lastgroup is not None:
        return found.lastgroup
    raise UndecodableError("no image format that is known begins so" if data else "the file is empty")


def _is_animated(kind: str, data: bytes) -> bool:
    if kind == "WEBP":
        return data[12:16] == b"VP8X" and bool(data[20:21] and data[20] & 2)
    return kind == "AVIF" and b"avis" in data[8:64]


def _decode_with_torchcodec(kind: str, data: bytes, channels: int) -> torch.Tensor:
    mode = _CODEC_MODES.get(channels, "UNCHANGED")
    blends = kind in ("AVIF", "HEIC") and channels in _CODEC_MODES  # it would multiply the colours by alpha
    image = _CODECS[kind](_as_tensor(data), mode=f"{mode}_ALPHA" if blends else mode)
    image_CHW = image if image.dim() == 3 else image[0]
    if kind == "JPEG" and _ends_early(data, image_CHW):
        raise UndecodableError("the picture's data end before the picture does")
    return image_CHW[:channels] if blends else image_CHW


def _as_tensor(data: bytes) -> torch.Tensor:
    # Not the bytes themselves: torchcodec would then change the process's warning filters, which is not thread-safe.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _ends_early(data: bytes, image_CHW: torch.Tensor) -> bool:
    """Whether a JPEG was cut and closed again: libjpeg only warns, and leaves the rest of the picture gray.

    Where the block of a corner is of that gray, more data before the end must change nothing. Pillow decodes for that:
    it keeps libjpeg's warnings to itself.
    """
    pixels_CHW = image_CHW.numpy()  # each image comes by here: this is faster than torch's own indexing
    _, height, width = pixels_CHW.shape
    rows, columns = (height - 1) % _JPEG_BLOCK + 1, (width - 1) % _JPEG_BLOCK + 1
    ends_H = (0, slice(rows)), (-1, slice(-rows, None))
    ends_W = (0, slice(columns)), (-1, slice(-columns, None))
    for (y, block_H), (x, block_W) in product(ends_H, ends_W):
        if pixels_CHW[0, y, x] in _UNPAINTED and _UNPAINTED.issuperset(
            pixels_CHW[:, block_H, block_W].ravel().tolist()
        ):
            end = data.rfind(b"\xff\xd9")
            one, two = (_with_pillow(whole) for whole in (data, data[:end] + _FILLER + data[end:]))
            return not np.array_equal(one, two)
    return False


def _with_pillow(jpeg: bytes) -> np.ndarray[Any, Any]:
    with _READERS["JPEG"](io.BytesIO(jpeg), "") as opened:
        return np.asarray(opened)


def _decode_with_pillow(kind: str, data: bytes, channels: int) -> torch.Tensor:
    page = tiff.first_page(data) if kind == "TIFF" else None
    if page is not None:
        tiff.refuse_hidden_bands(page, channels)
    with _READERS[kind](io.BytesIO(data), "") as opened:
        if page is not None and sorted(opened.size) != sorted((page.imagewidth, page.imagelength)):
            raise UndecodableError("its header gives two sizes")  # one for `measure`, and one for Pillow
        upright: Image = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):  # convert() would clip it to 255
            upright = fromarray(tiff.to_eight_bits(np.asarray(upright)))
        elif upright.mode in ("I", "F"):
            raise UndecodableError(f"pixels of mode {upright.mode} (32 bits) have no known range")
        pixels = np.array(upright.convert(_PILLOW_MODES[channels]) if channels in _PILLOW_MODES else upright)
    tensor = torch.from_numpy(pixels)
    return tensor[None] if tensor.dim() == 2 else tensor.permute(2, 0, 1)


def _npy_header(data: bytes) -> tuple[tuple[int, int, int], bool, int]:
    """((height, width, channels), whether column by column, offset of the pixels)."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version > (2, 0):
        raise UndecodableError(f"it is of version {version} of the .npy format, not of 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if dtype != np.uint8 or len(shape) != 3 or min(shape) < 1:
        raise UndecodableError(f"an array of {dtype} and shape {shape} is not uint8 of (height, width, channels)")
    height, width, channels = shape
    return (height, width, channels), is_fortran, stream.tell()


def _decode_npy(data: bytes) -> torch.Tensor:
    shape, is_fortran, offset = _npy_header(data)
    pixels = np.frombuffer(data, np.uint8, offset=offset)
    if len(pixels) != np.prod(shape):
        raise UndecodableError(f"{len(pixels)} bytes of pixels, {np.prod(shape)} expected")
    pixels_HWC = pixels.reshape(shape, order="F" if is_fortran else "C")
    return torch.from_numpy(np.moveaxis(pixels_HWC, -1, 0).copy())


def _jpeg_header(data: bytes) -> tuple[int, int, int]:
    """ITU-T T.81, annex B.2: markers up to the first scan, skipping what libjpeg skips."""
    at, frame, is_progressive = 2, None, False
    while True:
        at = data.index(b"\xff", at)
        marker = data[at + 1]
        if marker in _JPEG_NO_SEGMENT:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _JPEG_FRAMES:
            frame = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9]), data[at + 9]
            is_progressive = marker & 0x03 == 2
        elif marker == _JPEG_SCAN[1]:
            break
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    if frame is None:
        raise UndecodableError("its first scan comes before its size")
    # One scan of all components: what comes after it is never looked at.
    if (is_progressive or data[at + 4] < frame[2]) and data.count(_JPEG_SCAN) > _MAX_JPEG_SCANS:
        raise UndecodableError(f"it has more than {_MAX_JPEG_SCANS} scans")
    return frame


def _webp_header(data: bytes) -> tuple[int, int, int]:
    """RFC 9649, sections 2.5 to 2.7."""
    if len(data) < 30:
        raise UndecodableError("the header is cut short")
    match data[12:16]:
        case b"VP8X":
            width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
            has_alpha = bool(data[20] & 0x10)
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            width, height = (1 + (bits >> shift & 0x3FFF) for shift in (0, 14))
            has_alpha = bool(bits >> 28 & 1)
        case b"VP8 ":
            width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
            has_alpha = False
        case _:
            raise UndecodableError("its first chunk is no picture")
    return height, width, 4 if has_alpha else 3


def _heic_header(data: bytes) -> tuple[int, int, int]:
    """The largest of the sizes in its `ispe` boxes: tiles and thumbnails have their own."""
    sizes = [
        (
            int.from_bytes(data[at.end() + 8 : at.end() + 12], "big"),
            int.from_bytes(data[at.end() + 4 : at.end() + 8], "big"),
        )
        for at in re.finditer(b"ispe", data)
    ]
    if not sizes:
        raise UndecodableError("it does not say its size")
    return *max(sizes, key=lambda size: size[0] * size[1]), 3


def reason_of(error: Exception) -> str:
    """An error's message to show, without the place in torchcodec's source and without its advice."""
    text = re.sub(r"^.*?\.cpp:\d+, ", "", str(error).strip().partition("\n")[0])
    return re.sub(r"<_?io\.BytesIO object at \w+>", "the file", text)[:_REASON] or type(error).__name__
