"""TIFFs whose directories lie: refused with a reason, or decoded to what they say, and no memory is taken for more."""

import io

import numpy as np
import psutil
import pytest
import tifffile

from maskray.data.decode import UndecodableError, measure
from maskray.data.survey import _decoded

MUTANTS = 4000
# Pillow warns of what it finds odd in damaged headers, once a place in its code.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def originals(picture, encoded):
    image, out = picture(21, 12, 10), []
    for mode in ("L", "RGB", "RGBA"):
        out += [encoded(image.convert(mode), "TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_deflate")]
    out.append(encoded(image, "TIFF", compression="jpeg"))
    for compression in (None, "zlib"):
        buffer = io.BytesIO()
        pixels_HWC = np.random.default_rng(0).integers(0, 256, (12, 10, 6), np.uint8)
        tifffile.imwrite(buffer, pixels_HWC, photometric="minisblack", compression=compression)
        out.append(buffer.getvalue())
    return out


def mutate(data, rng):
    """One to three bytes changed, most of them where a directory lies."""
    out, end = bytearray(data), len(data)
    for _ in range(rng.integers(1, 4)):
        first, last = [(2, 16), (2, 200), (end - 200, end), (2, end)][rng.integers(4)]
        out[rng.integers(first, last)] = rng.choice([0, 1, 2, 3, 4, 255, rng.integers(256)])
    return bytes(out)


def test_mutated_tiffs_neither_crash_nor_hang_nor_take_memory(picture, encoded, capfd, no_hang):
    rng, sources = np.random.default_rng(2027), originals(picture, encoded)
    memory, decoded = psutil.Process().memory_info().rss, 0
    with no_hang(300):
        for number in range(MUTANTS):
            data = mutate(sources[number % len(sources)], rng)
            try:
                height, width, channels = measure(data, max_pixels=2**20)
                image_CHW = _decoded(data, channels)
            except UndecodableError:
                continue
            assert sorted(image_CHW.shape[1:]) == sorted((height, width))
            decoded += 1
    capfd.readouterr()  # libtiff's warnings
    assert psutil.Process().memory_info().rss - memory < 64 * 2**20
    assert 0.1 < decoded / MUTANTS < 0.9, "mutants of which some live"
