"""A few hundred photographs, repeated, as files in class folders.

The repeats of a picture differ by a comment in the JPEG, so that no side can keep or drop them as equal.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT.parent / "shared" / "data" / "imagenet-sample-500.tar"
WORK = ROOT / "runs" / "bench"
_START_OF_IMAGE, _COMMENT = b"\xff\xd8", b"\xff\xfe"


def make_files(work: Path, rows: int, *, short_side: int | None = None, square: int | None = None) -> Path:
    """A folder with a folder of JPEG files for each class, as ImageFolder wants it; made once.

    Args:
        work: where it goes.
        rows: number of files.
        short_side: to encode anew at this many pixels, as `maskray ingest` with `resize_short` does; None keeps the
            files as they came.
        square: to encode anew as squares of this many pixels.
    """
    kind = f"short-{short_side}" if short_side else f"square-{square}" if square else "original"
    folder = work / f"files-{kind}-{rows}"
    if folder.exists():
        return folder
    partial = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    pictures = [(name, encode_anew(data, short_side, square)) for name, data in photographs()]
    for number, (name, data) in enumerate(islice(cycle(pictures), rows)):
        target = partial / name.partition("_")[0] / f"{number:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_with_comment(data, str(number).encode()))
    partial.rename(folder)
    return folder


def photographs() -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each."""
    if not ARCHIVE.exists():
        raise SystemExit(f"There are no photographs to measure with: {ARCHIVE} is missing.")
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            if member.isfile():
                file = archive.extractfile(member)
                assert file is not None
                yield Path(member.name).name, file.read()


def encode_anew(data: bytes, short_side: int | None, square: int | None = None) -> bytes:
    """A JPEG of quality 92 at another size."""
    if short_side is None and square is None:
        return data
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if square:
        size = (square, square)
    else:
        scale = min(1.0, short_side / min(image.size))
        size = (round(image.width * scale), round(image.height * scale))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
    return out.getvalue()


def _with_comment(data: bytes, text: bytes) -> bytes:
    assert data.startswith(_START_OF_IMAGE)
    return _START_OF_IMAGE + _COMMENT + (len(text) + 2).to_bytes(2, "big") + text + data[2:]
