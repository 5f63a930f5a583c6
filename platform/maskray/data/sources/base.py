"""What a source is: entries, a way to read one, and the rules that hold for each kind of it."""

from __future__ import annotations

import errno
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from maskray.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    f".{kind}"
    for kind in ("jpg jpeg jpe jfif png webp gif avif heic heif bmp tif tiff ppm pgm pbm jp2 npy").split()  # noqa: SIM905
)
MAX_IMAGE_BYTES = 2**30
"""Longer files are no images that fit into a row of a shard; what is longer is never read."""

Label = int | str | None
"""As the source says it: a number, a name, or nothing."""

_MOST_NUMBERED_CLASSES = 2**16  # numbers above are identifiers: they become names
_SUFFIXES_SHOWN = 5


class Place(NamedTuple):
    """Where an image's bytes lie in a source."""

    file: str
    """Relative to the source: the image's own file, or the archive or table that holds it."""
    at: int = 0
    """Where in it: the offset in bytes of a member of an archive, the row of a table."""
    size: int = 0
    """Bytes, where the listing says."""
    crc32: int | None = None
    """Of the image, where the listing says."""


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
    """Encoded image of an entry. Picklable and small: it travels to each task. Raises OSError for what has no bytes to
    read, StorageError where the storage itself fails."""
    class_names: tuple[str, ...]
    """Names of the labels 0, 1, …; empty where there are none."""
    stamp: str
    """Equal as long as nothing was touched; cheap, so that a finished ingest is recognised without reading images."""
    reads_at_random: bool = True
    """Whether an image costs no more out of the order of `entries`."""


class Found(NamedTuple):
    """An image as a kind of source finds it."""

    key: str
    label: Label
    place: Place


def make_source(
    found: Sequence[Found],
    read: Callable[[Entry], bytes],
    stamp: str,
    class_names: Sequence[str] = (),
) -> Source:
    """A source of what was found, after a look at its keys and labels.

    Args:
        found: in the order in which they are best read.
        read: of the source.
        stamp: of the source.
        class_names: of numbered labels, where the source says them.

    Raises:
        DataError: there are no images, two of them have one key, or a label has no name.
    """
    if not found:
        raise DataError("there are no images in it", key="source", found="an empty archive or table")
    seen: dict[str, Place] = {}
    for key, _, place in found:
        if key in seen:
            first, second = (f"{p.file} at {p.at}" for p in (seen[key], place))
            raise DataError(
                "two images have the same key",
                key="source",
                found=f"{key} (in {first} and in {second})",
                fix="rename or remove one of them",
            )
        seen[key] = place
    labels, names = _numbered([f.label for f in found], tuple(class_names))
    entries = [Entry(f.key, label, f.place) for f, label in zip(found, labels, strict=True)]
    return Source(entries, read, names, stamp)


def stamp_of(parts: Iterable[object]) -> str:
    """Digest of what must not change unseen."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def refuse_too_large(size: int) -> None:
    """Raises OSError for what is longer than an image may be."""
    if size > MAX_IMAGE_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {MAX_IMAGE_BYTES} bytes")


def suffix_of(name: str) -> str:
    """In lower case, with its dot; empty where there is none."""
    return PurePosixPath(name).suffix.lower()


def say_left_out(suffixes: Counter[str], place: object) -> None:
    """Warn of files that nobody looks into, by their suffixes: there may be images under names of other kinds."""
    if suffixes:
        order = sorted(suffixes, key=lambda suffix: (-suffixes[suffix], suffix))
        shown = ", ".join(f"{suffixes[suffix]} {suffix or 'without one'}" for suffix in order[:_SUFFIXES_SHOWN])
        logger.warning(
            "%s: %d files are left out for their suffixes, which are not those of images: %s%s",
            place,
            suffixes.total(),
            shown,
            ", …" if len(suffixes) > _SUFFIXES_SHOWN else "",
        )


def as_utf8(name: str) -> str:
    """A name with those of its bytes escaped that are not UTF-8, in which no key could hold them."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_hidden(name: str) -> bool:
    """Whether a part of a path begins with a dot, and is more than that."""
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def read_label(text: str) -> Label:
    """A label that a file says in words or digits: a number where it is one, None where it is empty or negative."""
    text = text.strip()
    if text.removeprefix("-").isdecimal() and str(int(text)) == text:  # 007 is a name
        return int(text) if int(text) >= 0 else None
    return text or None


def class_folders(names: Sequence[str]) -> list[Label]:
    """The folder that each image lies in, right below what is common to all; None where one of them lies in none."""
    parts = [name.split("/") for name in names]
    while parts and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    return [p[0] for p in parts] if all(len(p) > 1 for p in parts) else [None] * len(parts)


def _numbered(labels: list[Label], names: tuple[str, ...]) -> tuple[list[int | None], tuple[str, ...]]:
    """Labels as numbers, and the names of those. Labels of some images only are no labels."""
    missing = sum(label is None for label in labels)
    if missing:
        if missing < len(labels):
            logger.warning("%d of %d images have no label: labels are left out", missing, len(labels))
        return [None] * len(labels), ()
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels):
        largest = max(numbers, default=0)
        if names and largest >= len(names):
            raise DataError(
                "a label has no name", key="source", found=largest, allowed=f"0 to {len(names) - 1}, as its table says"
            )
        if names or largest < _MOST_NUMBERED_CLASSES:
            return list(numbers), names or tuple(str(n) for n in range(largest + 1))
    texts = [str(label) for label in labels]
    names = tuple(sorted(set(texts)))
    number_of = {name: number for number, name in enumerate(names)}
    return [number_of[text] for text in texts], names
