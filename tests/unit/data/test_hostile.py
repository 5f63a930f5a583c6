"""Files that mean harm, or look as if: each bad one is listed with a reason, each good one arrives with its pixels."""

import gc
import io
import os
import socket
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from maskray.data.decode import UndecodableError, decode, measure
from maskray.data.shards import Dataset

MAX_PIXELS = 178_956_970
# Pillow warns of what it finds odd in damaged headers, once a place in its code.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, idat, *extra, bits=1, colour=0):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = b"".join([chunk(b"IHDR", header), *extra, chunk(b"IDAT", idat), chunk(b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + body


def png_bomb(side):
    """A valid PNG of 1 bit a pixel, all black."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8)) * 100
    packed = b"".join(squeeze.compress(row) for _ in range(-(-side // 100)))
    return png(side, side, packed + squeeze.flush())


def jpeg_with_size(data, height, width):
    """The same JPEG with another size in its header."""
    frame = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2))
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def little_tiff(width, height, offset_of_next=0):
    """One strip of one byte, whatever the size says."""
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (279, 4, 1),
    ]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return (
        b"II*\0"
        + struct.pack("<I", 12)
        + bytes(4)
        + struct.pack("<H", len(tags))
        + directory
        + struct.pack("<I", offset_of_next)
    )


def _tiff_tag(data, tag, value, kind=3):
    """The same TIFF with another entry for a tag."""
    at = data.index(struct.pack("<H", tag), 16)
    return data[:at] + struct.pack("<HHII", tag, kind, 1, value) + data[at + 12 :]


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npy_of_shape(shape):
    return npy(np.zeros((1, 1, 3), np.uint8)).replace(b"(1, 1, 3), }", f"({shape}), }}".encode().ljust(12)[:40])


def bad_files(picture, encoded):
    """Name → bytes that cannot be an image."""
    image = picture(1, 200, 300)
    jpeg, png_, webp = encoded(image, "JPEG"), encoded(image), encoded(image, "WEBP", lossless=True)
    progressive = encoded(image, "JPEG", progressive=True)
    last_scan = progressive.rindex(b"\xff\xda")
    gif, tiff, bmp = encoded(image, "GIF"), encoded(image, "TIFF"), encoded(image, "BMP")
    moving = encoded(image, "WEBP", save_all=True, append_images=[picture(2, 200, 300)])
    half = {
        f"half.{kind.lower()}{n}.png": data[: len(data) // 2]
        for n, (kind, data) in enumerate(
            [("JPEG", jpeg), ("PNG", png_), ("WEBP", webp), ("GIF", gif), ("TIFF", tiff), ("BMP", bmp)]
            + [("JPEG", progressive), ("JPEG", encoded(image.convert("CMYK"), "JPEG")), ("WEBP", moving)]
            + [(kind, encoded(image, kind)) for kind in ("AVIF", "JPEG2000", "PPM")]
            + [("TIFF", encoded(image, "TIFF", compression=c)) for c in ("tiff_lzw", "tiff_deflate", "jpeg")]
        )
    }
    return half | {
        "empty.jpg": b"",
        "one byte.jpg": b"\xff",
        "only magic.jpg": b"\xff\xd8\xff",
        "only magic.png": b"\x89PNG\r\n\x1a\n",
        "only magic.gif": b"GIF89a",
        "only magic.webp": b"RIFF\x10\0\0\0WEBPVP8 ",
        "only magic.tif": b"II*\0",
        "only magic.avif": b"\0\0\0\x18ftypavif\0\0\0\0avifmif1",
        "only magic.heic": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1",
        "only magic.jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
        "only magic.npy": b"\x93NUMPY\x01\0",
        "without end.jpg": jpeg[:-2],
        "one percent short.jpg": jpeg[: len(jpeg) * 99 // 100],
        "cut and closed.jpg": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "cut and filled with zeros.jpg": jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2),
        "without header.jpg": jpeg[200:],
        "height 0.jpg": jpeg_with_size(jpeg, 0, 300),
        "endless scans.jpg": progressive[:last_scan] + progressive[last_scan:-2] * 5000 + b"\xff\xd9",
        "bomb.jpg": jpeg_with_size(jpeg, 65500, 65500),
        "bomb progressive.jpg": jpeg_with_size(progressive, 65500, 65500),
        "bomb.png": png_bomb(30_000),
        "bomb of a header.png": png(2**31 - 1, 2**31 - 1, b""),
        "bomb of text.png": png(8, 8, zlib.compress(bytes(16)), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**27)))),
        "bomb.webp": webp[:21] + b"\xff\xff\xff\x0f" + webp[25:],
        "bomb moving.webp": moving[:24] + b"\xff\x3f\0\xff\x3f\0" + moving[30:],
        "bomb.gif": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "bomb.tif": little_tiff(100_000, 100_000),
        "bomb.bmp": bmp[:18] + struct.pack("<ii", 50_000, 50_000) + bmp[26:],
        "bomb.ppm": b"P6 100000 100000 255\n",
        "bomb.npy": npy_of_shape("99999, 99999, 3"),
        "bomb of bands.tif": _tiff_tag(little_tiff(9_000, 9_000), 277, 60),
        "bands.tif": _tiff_tag(little_tiff(9, 9), 277, 65),
        "bands.npy": npy(np.zeros((1, 1, 40_000), np.uint8)),
        "two widths.tif": little_tiff(64, 64).replace(struct.pack("<HHI", 256, 4, 1), struct.pack("<HHI", 256, 4, 2)),
        "width in letters.tif": _tiff_tag(little_tiff(64, 64), 256, 64, kind=2),
        "short strip.tif": little_tiff(64, 64),
        "directory in a circle.tif": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "floats.tif": _tiff(np.ones((4, 4), np.float32)),
        "pickle.npy": npy(np.array([[[os]]], dtype=object)[:0], allow_pickle=True),
        "floats.npy": npy(np.zeros((4, 4, 3))),
        "wrong checksum.png": png_.replace(b"IHDR", b"IHDR", 1)[:29] + b"\0\0\0\0" + png_[33:],
        "damaged.png": png_[:200] + bytes(50) + png_[250:],
        "palette missing.png": png(8, 8, zlib.compress(bytes(9 * 8)), bits=8, colour=3),
        "no frame.gif": gif[:13] + b";",
        "page.jpg": b"<!doctype html><html>404</html>" * 20,
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n",
        "zeros.jpg": bytes(10_000),
        "noise.png": np.random.default_rng(0).bytes(10_000),
        "archive.jpg": b"PK\x03\x04" + bytes(100),
    }


def _tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def good_files(picture, encoded):
    """Name → (bytes, pixels of shape (H, W, 3), largest mean difference)."""
    image = picture(3, 40, 56)
    pixels = np.asarray(image)
    gray = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2)
    ramp = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29
    ramp8 = np.repeat(np.rint(ramp / 257).astype(np.uint8)[..., None], 3, axis=2)
    palette = image.quantize(32)
    turned = Image.Exif()
    turned[274] = 6
    jpeg = encoded(image, "JPEG", quality=95)
    moving = [picture(4, 40, 56), picture(5, 40, 56)]
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    return {
        "a jpeg.png": (jpeg, pixels, 5),
        "a png.jpg": (encoded(image), pixels, 0),
        "a tiff.gif": (encoded(image, "TIFF"), pixels, 0),
        "SHOUTED.PNG": (encoded(image), pixels, 0),
        "progressive.jpg": (encoded(image, "JPEG", progressive=True, quality=95), pixels, 5),
        "gray.jpg": (encoded(image.convert("L"), "JPEG", quality=95), gray, 3),
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG", quality=95), pixels, 5),
        "restarts.jpg": (encoded(image, "JPEG", quality=95, restart_marker_rows=1), pixels, 5),
        "turned.jpg": (encoded(image, "JPEG", quality=95, exif=turned), np.rot90(pixels, -1), 5),
        "more behind the end.jpg": (jpeg + b"\0" * 1000 + jpeg, pixels, 5),
        "a long comment.jpg": (jpeg[:2] + comment + jpeg[2:], pixels, 5),
        "alpha.png": (encoded(image.convert("RGBA")), pixels, 0),
        "gray and alpha.png": (encoded(image.convert("LA")), gray, 0),
        "palette.png": (encoded(palette), np.asarray(palette.convert("RGB")), 0),
        "palette with a hole.png": (encoded(palette, transparency=3), np.asarray(palette.convert("RGB")), 0),
        "one bit.png": (encoded(image.convert("1")), np.asarray(image.convert("1").convert("RGB")), 0),
        "sixteen bits.png": (encoded(Image.fromarray(ramp)), ramp8, 0),
        "sixteen bits.tif": (_tiff(ramp), ramp8, 0),
        "lossless.webp": (encoded(image, "WEBP", lossless=True), pixels, 0),
        "moving.webp": (encoded(image, "WEBP", save_all=True, append_images=moving, lossless=True), pixels, 0),
        "moving.gif": (
            encoded(palette, "GIF", save_all=True, append_images=moving),
            np.asarray(palette.convert("RGB")),
            0,
        ),
        "moving.png": (encoded(image, "PNG", save_all=True, append_images=moving), pixels, 0),
        "pages.tif": (encoded(image, "TIFF", save_all=True, append_images=moving), pixels, 0),
        "lzw.tif": (encoded(image, "TIFF", compression="tiff_lzw"), pixels, 0),
        "deflate.tif": (encoded(image, "TIFF", compression="tiff_deflate"), pixels, 0),
        "palette.bmp": (encoded(palette, "BMP"), np.asarray(palette.convert("RGB")), 0),
        "plain.ppm": (encoded(image, "PPM"), pixels, 0),
        "array.npy": (npy(pixels), pixels, 0),
        "one pixel.png": (encoded(image.crop((0, 0, 1, 1))), pixels[:1, :1], 0),
        "a thread.png": (encoded(picture(6, 1, 5000)), np.asarray(picture(6, 1, 5000)), 0),
        "猫 🐈 é\u0301 \u202egnp.png": (encoded(picture(7)), np.asarray(picture(7)), 0),
        "new\nline 'quote' \"two\" \\back, comma;%00.png": (encoded(picture(8)), np.asarray(picture(8)), 0),
        f"{'n' * 251}.png": (encoded(picture(9)), np.asarray(picture(9)), 0),
        f"{'d' * 200}/{'e' * 200}/{'f' * 200}.png": (encoded(picture(10)), np.asarray(picture(10)), 0),
        "a folder.jpg/in it.png": (encoded(picture(11)), np.asarray(picture(11)), 0),
    }


def strange_files(root, scratch, good):
    """What is no plain file. The keys of those that must be set aside; a good one reached by a link."""
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(root)  # a socket's path may have 107 characters
        listener.bind("socket.png")
    (root / "to nothing.png").symlink_to(scratch / "nothing.png")
    (root / "to itself.png").symlink_to(root / "to itself.png")
    (root / "zeros for ever.png").symlink_to("/dev/zero")
    (root / "loop").symlink_to(root)
    (root / "a folder.jpg/loop").symlink_to(root / "a folder.jpg")
    (scratch / "outside.png").write_bytes(good)
    (root / "to a good one.png").symlink_to(scratch / "outside.png")
    with (root / "sparse, 4 TB.png").open("wb") as file:
        file.truncate(2**42)
    Path(os.fsdecode(os.fsencode(root) + b"/not utf-8 \xff.png")).write_bytes(good)
    bad = {"pipe.jpg", "socket.png", "to nothing.png", "to itself.png", "zeros for ever.png", "sparse, 4 TB.png"}
    bad.add(r"not utf-8 \xff.png")
    if os.geteuid() != 0:
        (root / "forbidden.png").write_bytes(good)
        (root / "forbidden.png").chmod(0)
        bad.add("forbidden.png")
    return bad


def rows_of(path):
    return {k: d for g in Dataset.open(str(path)).iter_groups() for k, d in zip(g.keys, g.images, strict=True)}


def quarantine_of(path):
    return {r["key"]: r["reason"] for r in pq.read_table(path / "quarantine.parquet").to_pylist()}


def test_each_bad_file_is_listed_and_each_good_one_arrives(
    tmp_path, monkeypatch, picture, encoded, ingest_here, no_hang
):
    monkeypatch.chdir(tmp_path)
    root, scratch = tmp_path / "in", tmp_path / "scratch"
    scratch.mkdir()
    good, bad = good_files(picture, encoded), bad_files(picture, encoded)
    for name, data in bad.items() | {(name, data) for name, (data, _, _) in good.items()}:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    strange = strange_files(root, scratch, encoded(picture(12)))
    good["to a good one.png"] = (encoded(picture(12)), np.asarray(picture(12)), 0)

    memory = psutil.Process().memory_info().rss
    with no_hang(300):
        ingest_here(root, tmp_path / "shards", held_out_fraction=0, max_bad_fraction=1, max_pixels=MAX_PIXELS)
    assert psutil.Process().memory_info().rss - memory < 400 * 2**20, "a bomb went off"

    listed, rows = quarantine_of(tmp_path / "shards"), rows_of(tmp_path / "shards")
    assert len(bad) + len(strange) >= 40
    assert set(listed) == set(bad) | strange
    assert set(rows) == set(good)
    for name, reason in listed.items():
        assert 3 < len(reason) <= 200, name
        assert ".cpp" not in reason
        assert "0x" not in reason
    for name in (n for n in bad if "bomb" in n and n != "bomb of text.png"):
        assert f"max_pixels {MAX_PIXELS}" in listed[name], (name, listed[name])
    for name, (data, pixels_HWC, tolerance) in good.items():
        assert rows[name] == data
        found_HWC = decode(data, 3).permute(1, 2, 0).numpy()
        assert found_HWC.shape == pixels_HWC.shape, name
        assert abs(found_HWC.astype(int) - pixels_HWC).mean() <= tolerance, name


# ------------------------------------------------------------------------------------------------------------- mutants

MUTANTS = 2000


def originals(picture, encoded):
    exif = Image.Exif()
    exif[274], exif[271] = 8, "x" * 300
    image = picture(20, 90, 130)
    kinds = [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"exif": exif}, {"subsampling": 0, "quality": 95}]
    made = [encoded(image, "JPEG", **kind) for kind in kinds]
    return made + [encoded(image.convert(mode), "JPEG", progressive=p) for mode in ("L", "CMYK") for p in (False, True)]


def mutate(data, rng):
    """A JPEG with something done to it; and whether that must not change its picture."""
    out = bytearray(data)
    at, to = sorted(rng.integers(2, len(out), 2).tolist())
    match rng.integers(8):
        case 0:
            for place in rng.integers(2, len(out), rng.integers(1, 9)).tolist():
                out[place] ^= 1 << int(rng.integers(8))
        case 1:
            del out[at:]
        case 2:
            out[at:at] = bytes([0xFF, int(rng.integers(0xC0, 0xFF))]) + rng.bytes(int(rng.integers(0, 9)))
        case 3:
            size = min(int(rng.integers(1, 64)), len(out) - to)
            out[at : at + size], out[to : to + size] = out[to : to + size], out[at : at + size]
        case 4:
            out[at:to] = rng.bytes(int(rng.integers(1, 200)))
        case 5:
            out[at:at] = out[at:to]
        case 6:
            place = int(rng.integers(2, min(700, len(out))))  # where the headers are
            out[place] = int(rng.integers(256))
        case 7:
            out[2:2] = b"\xff\xfe\x00\x2a" + bytes(40)
            return bytes(out) + rng.bytes(20), True
    return bytes(out), False


@pytest.fixture(scope="module")
def mutants(picture, encoded):
    """Name → (bytes, the pixels it must have or None)."""
    rng = np.random.default_rng(2026)
    sources = [(data, decode(data, 3)) for data in originals(picture, encoded)]
    out = {}
    for number in range(MUTANTS):
        data, pixels = sources[number % len(sources)]
        changed, is_harmless = mutate(data, rng)
        out[f"{number:04d}.jpg"] = (changed, pixels if is_harmless else None)
    return out


def test_mutated_jpegs_neither_crash_nor_hang_nor_leak(mutants, capfd, no_hang):
    process, level = psutil.Process(), 0
    decoded = 0
    with no_hang(300):
        for round_ in range(3):  # the first warms up
            for data, pixels in mutants.values():
                try:
                    height, width, _ = measure(data, max_pixels=2**22)
                    image = decode(data, 3)
                except UndecodableError:
                    assert pixels is None
                    continue
                assert sorted(image.shape) == sorted((3, height, width))
                assert pixels is None or bool((image == pixels).all())
                decoded += 1
            gc.collect()
            capfd.readouterr()  # libjpeg's warnings
            level = process.memory_info().rss if round_ == 0 else level
    assert process.memory_info().rss - level < 32 * 2**20
    assert 0.2 < decoded / (3 * MUTANTS) < 0.9, "mutants of which some live"


def test_mutated_jpegs_are_delivered_or_listed(mutants, tmp_path, ingest_here, no_hang):
    with tarfile.open(tmp_path / "mutants.tar", "w") as tar:
        for name, (data, _) in mutants.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with no_hang(300):
        ingest_here(
            tmp_path / "mutants.tar", tmp_path / "shards", held_out_fraction=0, max_bad_fraction=1, max_pixels=2**22
        )
    listed, rows = quarantine_of(tmp_path / "shards"), rows_of(tmp_path / "shards")
    assert not set(listed) & set(rows)
    assert set(listed) | set(rows) == set(mutants)
    assert all(3 < len(reason) <= 200 for reason in listed.values())
    for name, data in rows.items():
        assert data == mutants[name][0]
    assert {name for name, (_, pixels) in mutants.items() if pixels is not None} <= set(rows)
