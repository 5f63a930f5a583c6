"""Where images come from: folders, archives, tables, local or in a bucket, and the digits that scikit-learn ships.

A source is a list of entries and a way to read one. To add one: a function that returns a `Source`, named in
`_EMBEDDED` or in `_open_kind`; `files.py` is where bytes come from, so a new kind is local and in a bucket at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from maskray.data.sources.archives import compressed_tar, open_archives
from maskray.data.sources.base import IMAGE_SUFFIXES, Entry, Place, Source, say_left_out, suffix_of
from maskray.data.sources.digits import open_digits
from maskray.data.sources.files import Files, Listed, folder_of, place_of
from maskray.data.sources.folder import open_folder
from maskray.data.sources.tables import open_csv, open_parquet
from maskray.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "Entry", "Place", "Source", "is_shipped", "open_source"]

ALLOWED = (
    "a folder of images; a .tar or .zip, or a folder of those; a .csv, .tsv or .parquet of paths; "
    "a .parquet with images, or a folder of those; each local or s3://bucket/…, with * in its last part for many"
)

_EMBEDDED: dict[str, Callable[[], Source]] = {"digits": open_digits}
_KINDS = {
    **dict.fromkeys(IMAGE_SUFFIXES, "images"),
    ".tar": "tars",
    ".zip": "zips",
    ".csv": "tables of paths",
    ".tsv": "tables of paths",
    ".parquet": "Parquet files",
}
_OF_A_FOLDER = ("images", "tars", "zips", "Parquet files")  # a .csv beside images is often something else
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_shipped(text: str) -> bool:
    """Whether a library ships what `ingest.source` names: then it lies at no place."""
    return text in _EMBEDDED


def open_source(text: str) -> Source:
    """The source that `ingest.source` names.

    Raises:
        DataError: there is no such thing; no images in it; it is damaged; a name in an archive leads out of it; two
            images of one key.
        StorageError: the bucket cannot be read.
    """
    if text in _EMBEDDED:
        return _EMBEDDED[text]()
    if text.lower().endswith(_COMPRESSED_TARS):
        raise compressed_tar(text)
    files = folder_of(text)
    if files is not None:
        return _open_folder(files, text)
    files, name = place_of(text)
    if "*" in name:
        return _open_kind(files, _matching(files, name), text)
    one = files.look_at(name)
    if one is None:
        raise DataError(
            "there is no such folder or file",
            key="source",
            found=text,
            allowed=f"{ALLOWED}; or {', '.join(_EMBEDDED)}",
        )
    return _open_kind(files, [one], text)


def _open_folder(files: Files, text: str) -> Source:
    left_out: Counter[str] = Counter()

    def is_wanted(name: str) -> bool:
        wanted = _kind_of(name) in _OF_A_FOLDER
        if not wanted:
            left_out[suffix_of(name)] += 1
        return wanted

    source = _open_kind(files, files.find(is_wanted), text)
    say_left_out(left_out, text)
    return source


def _kind_of(name: str) -> str | None:
    return _KINDS.get(suffix_of(name))


def _matching(files: Files, pattern: str) -> list[Listed]:
    """Files right below the folder, in the order of names."""
    return files.find(lambda name: fnmatchcase(name, pattern) and _kind_of(name) is not None, deep=False)


def _open_kind(files: Files, listed: Sequence[Listed], text: str) -> Source:
    kinds = sorted({kind for item in listed if (kind := _kind_of(item.name))})
    if not listed or not kinds:
        raise DataError(
            "there are no images in it",
            key="source",
            found=text,
            allowed=f"{ALLOWED}; images have the suffixes {' '.join(sorted(IMAGE_SUFFIXES))}, at any depth",
        )
    if len(kinds) > 1:
        example = f"{text.rstrip('/')}/*{PurePosixPath(listed[0].name).suffix}"
        raise DataError(
            f"it holds {' and '.join(kinds)}: which are meant?",
            key="source",
            found=text,
            fix=f"name them (such as {example}), or move the others away",
        )
    match kinds[0]:
        case "images":
            return open_folder(files, listed)
        case "Parquet files":
            return open_parquet(files, listed)
        case "tables of paths":
            if len(listed) > 1:
                raise DataError("only one table of paths can be read", key="source", found=text, fix="join them")
            return open_csv(files, listed[0])
        case _:
            return open_archives(files, listed)
