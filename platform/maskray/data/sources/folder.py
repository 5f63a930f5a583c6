"""A folder or prefix of image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maskray.data.sources.base import Entry, Found, Place, Source, make_source, stamp_of
from maskray.data.sources.files import Files, Listed


@dataclass(frozen=True)
class _Reader:
    files: Files

    def __call__(self, entry: Entry) -> bytes:
        return self.files.read(entry.place.file)


def open_folder(files: Files, listed: Sequence[Listed]) -> Source:
    """Images below a folder. Where all of them lie in subfolders, those right below the root are the classes."""
    labelled = all("/" in item.name for item in listed)
    found = [
        Found(item.name, item.name.partition("/")[0] if labelled else None, Place(item.name, 0, item.size))
        for item in listed
    ]
    return make_source(found, _Reader(files), stamp_of(listed))
