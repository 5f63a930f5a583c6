"""Bytes to pixels, for every format and mode."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskray.data.decode import UndecodableError, decode

LOSSLESS = ["PNG", "BMP", "TIFF", "PPM", "JPEG2000"]


def exif_quarter_turn():
    exif = Image.Exif()
    exif[274] = 6  # shown turned by 90 degrees clockwise
    return exif


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_the_pixels(picture, encoded, kind):
    image = picture(3)
    tensor = decode(encoded(image, kind), 3)
    assert tensor.dtype == torch.uint8
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "AVIF"])
def test_lossy_formats_come_close(picture, encoded, kind):
    image = picture(3)
    tensor = decode(encoded(image, kind), 3).permute(1, 2, 0).numpy()
    assert abs(tensor.astype(int) - np.asarray(image)).mean() < 12


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_channels_asked_for(picture, encoded, mode, channels):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    tensor = decode(encoded(picture(4).convert(mode), kind), channels)
    assert tensor.shape == (channels, 24, 32)
    assert tensor.dtype == torch.uint8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(encoded, kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    tensor = decode(encoded(Image.fromarray(ramp), kind), 1)
    assert abs(tensor[0].numpy().astype(int) - (ramp >> 8)).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_turned_upright(picture, encoded, kind, channels):
    lying = encoded(picture(5), kind, exif=exif_quarter_turn())
    upright = encoded(picture(5), kind)
    assert decode(lying, channels).shape == (channels, 32, 24)
    assert torch.equal(decode(lying, channels), torch.rot90(decode(upright, channels), -1, (1, 2)))


def test_of_an_animation_the_first_frame_counts(picture, encoded):
    moving = encoded(picture(6), "GIF", save_all=True, append_images=[picture(7)])
    assert torch.equal(decode(moving, 3), decode(encoded(picture(6), "GIF"), 3))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_files_cut_short_are_refused_with_a_reason(picture, encoded, kind):
    data = encoded(picture(8), kind)
    with pytest.raises(UndecodableError) as caught:
        decode(data[: len(data) // 2], 3)
    assert 0 < len(str(caught.value)) <= 200
    assert ".cpp" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello, I am no image", b"<html>" * 50, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(UndecodableError):
        decode(data, 3)


def test_pixels_without_a_known_range_are_refused(encoded):
    with pytest.raises(UndecodableError, match="32 bits"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), 1)
