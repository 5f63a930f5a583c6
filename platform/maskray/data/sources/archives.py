"""Tars and zips, also with the names of WebDataset, read at random where they lie: nothing is unpacked.

A tar has no list of its members, so its headers are read through once, at each start; a zip has one. Compressed tars
cannot be read at random at all, and ingest reads an image where it needs it: unpack those first.
"""

from __future__ import annotations

import errno
import json
import logging
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from maskray.data.sources.base import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    Entry,
    Found,
    Label,
    Place,
    Source,
    as_utf8,
    class_folders,
    is_hidden,
    make_source,
    read_label,
    say_left_out,
    stamp_of,
    suffix_of,
)
from maskray.data.sources.files import Files, Listed
from maskray.data.storage import leads_out
from maskray.errors import DataError, MaskrayError

logger = logging.getLogger(__name__)

_LABEL_SUFFIXES = (".cls", ".json")
_LABEL_KEYS = ("label", "cls", "class", "class_name")
_MAX_LABEL_BYTES = 2**20
_ARCHIVES_AT_ONCE = 8
_NO_BYTES = -1  # the offset of a member that is a link or a device
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
# What the standard library raises for archives that are broken, encrypted or of a kind it does not know.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError)
_TAR_BLOCK = 512
_ZIP_HEADER = 30
_ZIP_SLACK = 1024  # bytes read for name and extra fields of a member along with it
_ZIP_STORED, _ZIP_DEFLATED = 0, 8


class _Member(NamedTuple):
    name: str
    at: int
    size: int
    """Bytes in the archive."""
    label: Label = None
    """What a label's member says."""
    crc32: int | None = None


def open_archives(files: Files, listed: Sequence[Listed]) -> Source:
    """The images in tars or zips, in the order in which they lie.

    Where a sample has a member `.cls` or `.json`, that is its label; where none has, its folder is.

    Raises:
        DataError: an archive is damaged, compressed or holds names that lead out of it; no images; two of one key.
    """
    with ThreadPoolExecutor(_ARCHIVES_AT_ONCE, thread_name_prefix="maskray-archives") as pool:
        members = list(pool.map(lambda item: _members_of(files, item), listed))
    images: list[tuple[str, Place]] = []
    said: list[Label] = []
    left_out: Counter[str] = Counter()
    for archive, found in zip(listed, members, strict=True):
        label_of = {_sample(m.name): m.label for m in found if suffix_of(m.name) in _LABEL_SUFFIXES}
        for m in sorted(found, key=lambda m: m.at):
            if suffix_of(m.name) in IMAGE_SUFFIXES:
                images.append((m.name, Place(archive.name, m.at, m.size, m.crc32)))
                said.append(label_of.get(_sample(m.name)))
            elif suffix_of(m.name) not in _LABEL_SUFFIXES:
                left_out[suffix_of(m.name)] += 1
    say_left_out(left_out, f"{files}/{listed[0].name}" if len(listed) == 1 else files)
    has_labels = any(label is not None for label in said)
    labels = said if has_labels else class_folders([name for name, _ in images])
    # One archive is the source itself; of many, each is a folder of it.
    alone = len(listed) == 1
    keyed = [
        Found(name if alone else f"{place.file}/{name}", label, place)
        for (name, place), label in zip(images, labels, strict=True)
    ]
    return make_source(keyed, _Reader(files), stamp_of(listed))


def _sample(name: str) -> str:
    """WebDataset: what is the same up to the first dot of the file's name belongs together."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _members_of(files: Files, archive: Listed) -> list[_Member]:
    scan = _zip_members if archive.name.lower().endswith(".zip") else _tar_members
    place = f"{files}/{archive.name}"
    try:
        with files.open(archive.name) as file:
            found = list(scan(file, archive.size, place))
    except MaskrayError:
        raise
    except _DAMAGED as error:
        raise DataError(
            f"the archive {place} cannot be read",
            key="source",
            found=str(error) or type(error).__name__,
            fix="copy it again from where it came, or make it anew",
        ) from error
    return [m._replace(name=_plain(m.name)) for m in found if not is_hidden(_plain(m.name))]


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _checked(name: str, place: str) -> str:
    is_outside, name = leads_out(name), as_utf8(name)  # in this order: escapes have backslashes
    if is_outside:
        raise DataError(
            f"a member of {place} has a name that leads out of it",
            key="source",
            found=name,
            allowed="relative names without `..`",
            fix="make the archive anew from a folder that holds all files; who made it may mean harm",
        )
    return name


def _label_in(data: bytes, name: str) -> Label:
    """What a label's member says; None where that is nothing that could be a label."""
    text = data.decode("utf-8", "replace")
    if suffix_of(name) == ".cls":
        return read_label(text)
    try:
        said: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(said, dict):
        said = next((said[key] for key in _LABEL_KEYS if key in said), None)
    return read_label(str(said)) if isinstance(said, int | str) and not isinstance(said, bool) else None


# ----------------------------------------------------------------------------------------------------------------- tar


def _tar_members(file: BinaryIO, size: int, place: str) -> Iterator[_Member]:
    start = file.read(8)
    file.seek(0)
    if start.startswith(_COMPRESSED):
        raise compressed_tar(place)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them: a kilobyte for each image
            name = _checked(member.name, place)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                yield _Member(name, _NO_BYTES, 0)
            elif member.offset_data + member.size > size:
                raise tarfile.ReadError(f"it ends within {name}")
            elif suffix_of(name) in _LABEL_SUFFIXES and member.size <= _MAX_LABEL_BYTES:
                file.seek(member.offset_data)
                label = _label_in(file.read(member.size), name)
                yield _Member(name, member.offset_data, member.size, label)
            else:
                yield _Member(name, member.offset_data, member.size)
        # tarfile takes anything that is no header for the end.
        file.seek(tar.offset)
        rest = file.read(_TAR_BLOCK)
        if not rest:
            logger.warning("%s has no mark of its end: it may have been cut short", place)
        elif rest.strip(b"\0"):
            raise tarfile.ReadError(f"there is no header at byte {tar.offset}, where one should be")


def compressed_tar(place: str) -> DataError:
    """What a user who gives a compressed tar meets."""
    return DataError(
        "a compressed tar cannot be read at random",
        key="source",
        found=place,
        allowed="a plain .tar, a zip, a folder",
        fix="unpack it (tar -xf), or only decompress it (gunzip, unxz, …), and ingest that",
    )


# ----------------------------------------------------------------------------------------------------------------- zip


def _zip_members(file: BinaryIO, size: int, place: str) -> Iterator[_Member]:
    del size  # zipfile looks for itself
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = _checked(info.filename, place)
            if info.is_dir():
                continue
            label = None
            if suffix_of(name) in _LABEL_SUFFIXES and info.file_size <= _MAX_LABEL_BYTES:
                label = _label_in(archive.read(info), name)
            yield _Member(name, info.header_offset, info.compress_size, label, info.CRC)


def _read_zipped(files: Files, place: Place) -> bytes:
    """A member by its own header, in one read: the list of all members would be read again in every task.

    Sizes and checksum may be missing in that header (they may follow the data), so the list's are those that count.
    """
    wanted = _ZIP_HEADER + _ZIP_SLACK + place.size
    data = files.read(place.file, place.at, wanted, exact=False)
    if data[:4] != b"PK\x03\x04" or len(data) < _ZIP_HEADER:
        raise OSError(errno.EIO, "there is no zip header where one should be")
    flags, method = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    start = _ZIP_HEADER + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    if start + place.size > len(data):
        data = files.read(place.file, place.at, start + place.size)
    packed = data[start : start + place.size]
    if flags & 0x1:
        raise OSError(errno.EINVAL, "it is encrypted")
    if method not in (_ZIP_STORED, _ZIP_DEFLATED):
        raise OSError(errno.EINVAL, f"zip's compression method {method} is not known, only store and deflate")
    content = packed if method == _ZIP_STORED else _inflate(packed)
    if zlib.crc32(content) != place.crc32:
        raise OSError(errno.EIO, "its checksum is wrong")
    return content


def _inflate(packed: bytes) -> bytes:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = stream.decompress(packed, MAX_IMAGE_BYTES)
    except zlib.error as error:
        raise OSError(errno.EIO, f"it cannot be decompressed ({error})") from error
    if not stream.eof:
        raise OSError(errno.EFBIG, f"it is cut short, or larger than {MAX_IMAGE_BYTES} bytes")
    return content


@dataclass(frozen=True)
class _Reader:
    files: Files

    def __call__(self, entry: Entry) -> bytes:
        place = entry.place
        if place.at == _NO_BYTES:
            raise OSError(errno.EINVAL, "a link or special file in an archive has no bytes of its own")
        if place.file.lower().endswith(".zip"):
            return _read_zipped(self.files, place)
        return self.files.read(place.file, place.at, place.size)
