"""Where images come from: a folder, or the digits that scikit-learn ships.

A source is a list of entries and a way to read one. To add one: a function that returns a `Source`, named in
`_EMBEDDED`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maskray.errors import DataError

IMAGE_SUFFIXES = frozenset(
    f".{kind}"
    for kind in ("jpg jpeg jpe png webp gif avif heic heif bmp tif tiff ppm pgm jp2").split()  # noqa: SIM905
)


class Place(NamedTuple):
    """Where an image's bytes lie in a source."""

    file: str
    """Relative to the source: the image's own file, or the archive or table that holds it."""
    at: int = 0
    """Where in it: the offset in bytes of a member of an archive, the row of a table."""
    size: int = 0
    """Bytes, where the listing says."""


class Entry(NamedTuple):
    """One image of a source."""

    key: str
    """Its name, unique, the same wherever the source lies: it decides on the split and the order."""
    label: int | None
    place: Place


@dataclass(frozen=True)
class Source:
    """Images to ingest."""

    entries: list[Entry]
    """In the order in which they are best read."""
    read: Callable[[Entry], bytes]
    """Encoded image of an entry. Picklable and small: it travels to each task."""
    class_names: tuple[str, ...]
    """Names of the labels 0, 1, …; empty where there are none."""
    stamp: str
    """Equal as long as nothing was touched; cheap, so that a finished ingest is recognised without reading images."""


def open_source(text: str) -> Source:
    """The source that `ingest.source` names.

    Raises:
        DataError: no such folder or embedded set, or no images in it.
    """
    if text in _EMBEDDED:
        return _EMBEDDED[text]()
    root = Path(text).expanduser().absolute()
    if not root.is_dir():
        raise DataError(
            "there is no such folder",
            key="source",
            found=text,
            allowed=f"a local folder of images, or {', '.join(_EMBEDDED)}",
        )
    return _folder(root)


# -------------------------------------------------------------------------------------------------------------- folder


@dataclass(frozen=True)
class _FolderReader:
    root: str

    def __call__(self, entry: Entry) -> bytes:
        return Path(self.root, entry.place.file).read_bytes()


def _folder(root: Path) -> Source:
    """Images below a folder. Where all of them lie in subfolders, those right below the root are the classes."""
    found = sorted(_walk(root, "", frozenset()))
    if not found:
        raise DataError(
            "there are no images in the folder",
            key="source",
            found=root,
            allowed=f"files with the suffixes {' '.join(sorted(IMAGE_SUFFIXES))}, at any depth",
        )
    stamp = hashlib.sha256()
    for item in found:
        stamp.update(repr(item).encode())
    keys = [key for key, _, _ in found]
    labelled = all("/" in key for key in keys)
    class_names = tuple(sorted({key.partition("/")[0] for key in keys})) if labelled else ()
    label_of = {name: label for label, name in enumerate(class_names)}
    entries = [
        Entry(key, label_of.get(key.partition("/")[0]) if labelled else None, Place(key, 0, size))
        for key, size, _ in found
    ]
    return Source(entries, _FolderReader(str(root)), class_names, stamp.hexdigest())


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    """(key, size, time of change) of each image; `above` holds the folders on the way, so a loop of links ends."""
    here = folder.stat()
    if (here.st_dev, here.st_ino) in above:
        return
    above |= {(here.st_dev, here.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # A name that is not UTF-8 has no key: under the escaped one it is not found, and so it is set aside.
            key = prefix + os.fsencode(entry.name).decode("utf-8", "backslashreplace")
            if entry.is_dir():
                yield from _walk(folder / entry.name, key + "/", above)
            elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
                info = entry.stat()
                yield key, info.st_size, info.st_mtime_ns


# -------------------------------------------------------------------------------------------------------------- digits


def _digits() -> Source:
    """1,797 handwritten digits of 8 × 8 pixels (UCI, by way of scikit-learn): real images with no download."""
    _, labels = _digit_pixels()
    entries = [Entry(f"digits/{i:04d}", int(label), Place("", i)) for i, label in enumerate(labels)]
    return Source(entries, _read_digit, tuple("0123456789"), "digits")


def _read_digit(entry: Entry) -> bytes:
    pixels_NHW, _ = _digit_pixels()
    buffer = io.BytesIO()
    Image.fromarray(pixels_NHW[entry.place.at]).save(buffer, "PNG")
    return buffer.getvalue()


@cache
def _digit_pixels() -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.int64]]]:
    from sklearn.datasets import load_digits  # slow to import, and no other source needs it

    data = load_digits()
    return (data.images.astype(np.int64) * 255 // 16).astype(np.uint8), data.target


_EMBEDDED: dict[str, Callable[[], Source]] = {"digits": _digits}
