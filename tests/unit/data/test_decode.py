"""Bytes to pixels and back, for every format and mode."""

import io
import lzma
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from maskray.data.decode import UndecodableError, decode, encode, measure

LOSSLESS = ["PNG", "BMP", "TIFF", "PPM", "JPEG2000"]


# How an image must be turned to stand upright, for each EXIF orientation.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: torch.rot90(x, 2, (1, 2)),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: torch.rot90(x, -1, (1, 2)),
    7: lambda x: torch.rot90(x, 2, (1, 2)).transpose(1, 2),
    8: lambda x: torch.rot90(x, 1, (1, 2)),
}


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def bands(number, dtype=np.uint8, size=(20, 30)):
    """(C, H, W)"""
    return np.random.default_rng(number).integers(0, np.iinfo(dtype).max, (number, *size), dtype, endpoint=True)


def multi_band_tiff(pixels_CHW, planar="contig", **options):
    stored = np.moveaxis(pixels_CHW, 0, -1) if planar == "contig" else pixels_CHW
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, stored, planarconfig=planar, photometric="minisblack", **options)
    return buffer.getvalue()


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_turned_upright(picture, encoded, kind, orientation, channels):
    lying = encoded(picture(5), kind, exif=exif(orientation))
    stored = encoded(picture(5), kind)
    assert torch.equal(decode(lying, channels), UPRIGHT[orientation](decode(stored, channels)))
    assert measure(lying)[0] * measure(lying)[1] == 24 * 32


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "AVIF", "PNG"])
def test_of_an_animation_the_first_frame_counts(picture, encoded, kind):
    moving = encoded(picture(6), kind, save_all=True, append_images=[picture(7), picture(8)])
    still = decode(encoded(picture(6), kind), 3)
    assert abs(decode(moving, 3).int() - still.int()).float().mean() < 4
    assert measure(moving) == (24, 32, 3)


# ------------------------------------------------------------------------------- where decoders differ, what is right


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "TIFF"])
def test_alpha_is_dropped_and_not_blended(picture, encoded, kind):
    image = picture(9).convert("RGBA")
    alpha = np.zeros((24, 32), np.uint8)
    alpha[:, 16:], alpha[:12] = 255, 77
    image.putalpha(Image.fromarray(alpha))
    options = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(
        kind, {}
    )
    data = encoded(image, kind, **options)
    expected_HWC = np.asarray(picture(9)).astype(int)
    tolerance = 6 if kind == "AVIF" else 0
    assert abs(decode(data, 3).permute(1, 2, 0).numpy() - expected_HWC).max() <= tolerance
    gray_HW = np.asarray(picture(9).convert("L")).astype(int)
    assert abs(decode(data, 1)[0].numpy() - gray_HW).max() <= tolerance + 1
    assert torch.equal(decode(data, 4)[:3], decode(data, 3))
    np.testing.assert_array_equal(decode(data, 4)[3].numpy(), alpha)
    assert measure(data) == (24, 32, 4)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_keeps_its_colour(picture, encoded, kind):
    image = picture(10).quantize(64)
    data = encoded(image, kind, transparency=5, background=9)
    np.testing.assert_array_equal(decode(data, 3).permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))
    assert measure(data) == (24, 32, 3)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_the_light_that_its_ink_leaves(picture, encoded, kind):
    ink_HWC = np.asarray(picture(11).convert("CMYK")).copy()
    ink_HWC[..., 3] = 40
    data = encoded(Image.fromarray(ink_HWC, "CMYK"), kind, **({"quality": 100} if kind == "JPEG" else {}))
    paper_HWC = (255.0 - ink_HWC[..., :3]) * (255 - ink_HWC[..., 3:]) / 255
    assert abs(decode(data, 3).permute(1, 2, 0).numpy() - paper_HWC).mean() < (8 if kind == "JPEG" else 1)
    assert measure(data) == (24, 32, 4)


@pytest.mark.parametrize("dtype", [np.uint16, np.dtype(">u2")])
def test_one_rule_scales_sixteen_bits(encoded, dtype):
    ramp_HW = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected_HW = np.rint(ramp_HW / 257).astype(np.uint8)
    byte_order = ">" if dtype != np.uint16 else "<"
    stored = io.BytesIO()
    tifffile.imwrite(stored, ramp_HW, byteorder=byte_order)
    for data in (encoded(Image.fromarray(ramp_HW), "PNG"), stored.getvalue()):
        np.testing.assert_array_equal(decode(data, 1)[0].numpy(), expected_HW)
    many = multi_band_tiff(np.stack([ramp_HW] * 5), byteorder=byte_order)
    np.testing.assert_array_equal(decode(many, 5)[4].numpy(), expected_HW)


# ------------------------------------------------------------------------------------------------------------- N bands


@pytest.mark.parametrize("number", [2, 4, 5, 13])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_tiff_of_many_bands(number, planar, compression):
    data = multi_band_tiff(bands(number), planar, compression=compression)
    np.testing.assert_array_equal(decode(data, number).numpy(), bands(number))
    assert measure(data) == (20, 30, number)


@pytest.mark.parametrize(
    ("extra", "is_alpha"), [("unspecified", False), ("unassalpha", True), ("assocalpha", True), (None, False)]
)
def test_a_fourth_band_is_dropped_only_if_it_is_alpha(extra, is_alpha):
    pixels, buffer = bands(4), io.BytesIO()
    tifffile.imwrite(buffer, np.moveaxis(pixels, 0, -1), photometric="rgb", extrasamples=[extra or "unassalpha"])
    data = buffer.getvalue()
    if extra is None:  # its tag becomes one that nobody knows
        data = data.replace(struct.pack("<HHI", 338, 3, 1), struct.pack("<HHI", 337, 3, 1))
    np.testing.assert_array_equal(decode(data, 4).numpy(), pixels)
    if is_alpha:
        assert decode(data, 3).shape == (3, *pixels.shape[1:])
    else:
        with pytest.raises(UndecodableError, match="it has 4 bands, 3 are asked for"):
            decode(data, 3)


@pytest.mark.parametrize(
    ("kind", "pack"), [(8, zlib.compress), (34925, partial(lzma.compress, format=lzma.FORMAT_XZ, preset=0))]
)
def test_a_tiff_of_many_bands_that_inflates_to_more_than_it_says_is_refused(kind, pack):
    strip = pack(bytes(100 * 2**20))
    data = tiff(10, 10, bands=5, compression=kind, strip=strip)
    with pytest.raises(UndecodableError, match=f"a part of it inflates to more than {64 * 2**20} bytes"):
        measure(data, 1000)
    whole = tiff(10, 10, bands=5, compression=kind, strip=pack(bytes(range(250)) * 2))
    assert measure(whole, 1000) == (10, 10, 5)
    assert decode(whole, 5)[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_tiff_of_many_bands_is_turned_upright():
    for orientation, turn in UPRIGHT.items():
        data = multi_band_tiff(bands(5), extratags=[(274, "H", 1, orientation, True)])
        assert torch.equal(decode(data, 5), turn(torch.from_numpy(bands(5))))


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npy_file_is_taken_as_it_is(number, order):
    data = npy(np.asarray(np.moveaxis(bands(number), 0, -1), order=order))
    np.testing.assert_array_equal(decode(data, number).numpy(), bands(number))
    assert measure(data) == (20, 30, number)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.zeros((4, 4, 5), np.float32)), "float32"),
        (npy(np.zeros((4, 4), np.uint8)), r"shape \(4, 4\)"),
        (npy(np.zeros((4, 0, 5), np.uint8)), "shape"),
        (npy(np.array([[[{}]]], dtype=object), allow_pickle=True), "object"),
        (npy(np.zeros((4, 4, 5), np.uint8))[:-1], "79 bytes of pixels, 80 expected"),
        (npy(np.zeros((4, 4, 5), np.uint8)) + b"x", "81 bytes of pixels, 80 expected"),
        (npy(np.zeros((4, 4, 6), np.uint8)), "it has 6 bands, 5 are asked for"),
        (multi_band_tiff(bands(4)), "it has 4 bands, 5 are asked for"),
        (multi_band_tiff(bands(5).astype(np.float32)), "float32"),
    ],
)
def test_other_arrays_and_numbers_of_bands_are_refused(data, reason):
    with pytest.raises(UndecodableError, match=reason):
        decode(data, 5)


@pytest.mark.parametrize("channels", [1, 3])
def test_many_bands_do_not_become_a_colour(channels):
    with pytest.raises(UndecodableError, match=f"it has 13 bands, {channels} are asked for"):
        decode(multi_band_tiff(bands(13)), channels)


# ------------------------------------------------------------------------------------------------- measure and encode


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_measure_agrees_with_decode(picture, encoded, kind, mode):
    data = encoded(picture(12, 21, 34).convert(mode), kind)
    height, width, channels = measure(data)
    assert (height, width) == decode(data, 3).shape[1:] == (21, 34)
    always_colour = kind in ("WEBP", "GIF")  # the format or its palette has no gray
    assert channels == (3 if mode == "RGB" or always_colour else 1)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": exif(1)}, {"lossless": True, "exif": exif(1)}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_each_kind_of_webp_is_measured(picture, encoded, options, mode):
    image = picture(12, 21, 34).convert(mode)
    if mode == "RGBA":
        image.putalpha(100)
    assert measure(encoded(image, "WEBP", **options)) == (21, 34, len(mode))


def test_a_heic_is_as_large_as_its_largest_part():
    boxes = b"".join(
        b"\0\0\0\x14ispe" + struct.pack(">III", 0, w, h) for w, h in ((512, 512), (4032, 3024), (320, 240))
    )
    assert measure(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + boxes) == (3024, 4032, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_encoded_as_jpeg_it_stays_close(picture, channels):
    image_CHW = decode(_png(picture(13)), channels)
    data = encode(image_CHW, 95)
    assert data[:3] == b"\xff\xd8\xff"
    assert abs(decode(data, channels).int() - image_CHW.int()).float().mean() < 6
    assert len(encode(image_CHW, 30)) < len(data)
    turned = encode(torch.rot90(image_CHW, 1, (1, 2)), 95)  # not contiguous
    assert decode(turned, channels).shape == (channels, 32, 24)


@pytest.mark.parametrize("number", [2, 4, 13])
def test_other_numbers_of_channels_are_encoded_without_loss(number):
    image_CHW = torch.from_numpy(bands(number))
    assert torch.equal(decode(encode(image_CHW, 90), number), image_CHW)


def test_a_picture_longer_than_a_jpeg_can_be_is_not_encoded():
    with pytest.raises(ValueError, match="70000 x 4 pixels do not fit into a JPEG, which has 65500 at most"):
        encode(torch.zeros(3, 4, 70_000, dtype=torch.uint8), 90)


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------- bad


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


def tiff(width, height, bands=1, bits=8, compression=1, strip=b"\0", more=()):
    """A TIFF of one strip. `more` are entries (tag, type, count, value)."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (277, 3, 1, bands), (279, 4, 1, len(strip)), *more]
    packed = b"".join(struct.pack("<HHII", *e) for e in sorted(entries, key=lambda e: e[0]))
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(entries)) + packed + bytes(4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(13_000, 13_000, 1000), "it has 1000 bands, more than 64"),
        (npy(np.zeros((1, 1, 40_000), np.uint8)), "it has 40000 bands, more than 64"),
        (
            tiff(13_000, 13_000, 9),
            r"13000 x 13000 pixels of 9 bands take more than 8 bytes for each of max_pixels 1\d+",
        ),
        (tiff(13_000, 13_000, 5, bits=16), "of 5 bands take more than 8 bytes"),
        (tiff(13_000, 14_000), "13000 x 14000 pixels are more than max_pixels 1"),
    ],
)
def test_bands_count_as_pixels_do(data, reason):
    with pytest.raises(UndecodableError, match=reason):
        measure(data, 178_956_970)
    assert measure(tiff(13_000, 13_000, 4, bits=16), 178_956_970) == (13_000, 13_000, 4)


@pytest.mark.parametrize("tag", [256, 257, 277])
@pytest.mark.parametrize(("kind", "count", "value"), [(3, 2, 0), (2, 4, 0), (11, 1, 0), (4, 1, 0)])
def test_a_size_that_is_no_number_is_refused(tag, kind, count, value):
    entries = bytearray(tiff(16, 16))
    at = entries.index(struct.pack("<HH", tag, 3 if tag == 277 else 4))
    entries[at : at + 12] = struct.pack("<HHII", tag, kind, count, value)
    with pytest.raises(UndecodableError):
        measure(bytes(entries), 1000)


@pytest.mark.parametrize("tag", [256, 257])
def test_a_second_size_does_not_get_round_max_pixels(tag):
    once, nowhere = struct.pack("<HHII", tag, 4, 1, 16), struct.pack("<HHII", tag, 16, 1, 0)
    data = tiff(16, 16, more=[(tag, 4, 1, 16)]).replace(once, nowhere, 1)
    assert measure(data, 1000) == (16, 16, 1)
    with pytest.raises(UndecodableError, match="its header gives two sizes"):  # Pillow takes the file's first bytes
        decode(data, 1)


def test_pixels_without_a_known_range_are_refused(encoded):
    with pytest.raises(UndecodableError, match="32 bits"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("size", [(240, 320), (233, 313), (239, 319)])
def test_a_jpeg_that_was_cut_and_closed_again_is_refused(picture, encoded, mode, orientation, size):
    data = encoded(picture(14, *size).convert(mode), "JPEG", exif=exif(orientation))
    for share in (0.5, 0.9):
        with pytest.raises(UndecodableError, match="end before the picture does"):
            decode(data[: int(len(data) * share)] + b"\xff\xd9", 3)
    assert decode(data, 3).shape[0] == 3


def test_a_gray_jpeg_is_no_cut_one_and_nothing_is_said_of_it(encoded, capfd):
    flat = encoded(Image.new("RGB", (64, 48), (128, 128, 128)), "JPEG")
    assert decode(flat, 3).unique().tolist() == [128]
    assert capfd.readouterr().err == ""


def test_a_jpeg_of_endless_scans_is_refused(picture, encoded):
    data = encoded(picture(15, 64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(UndecodableError, match="more than 200 scans"):
        measure(data[:last] + data[last:-2] * 10_000 + b"\xff\xd9")
    assert measure(data) == (64, 64, 3)
