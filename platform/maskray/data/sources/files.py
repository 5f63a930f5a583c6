"""The one seam between sources and where they lie: a local folder or an `s3://` prefix."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from maskray.credentials import are_in
from maskray.data.sources.base import MAX_IMAGE_BYTES, as_utf8, is_hidden, refuse_too_large
from maskray.errors import DataError, StorageError

S3 = "s3://"
_MOST_WAYS_TO_A_FOLDER = 100  # folders that all link to each other have more paths than atoms
_BLOCK_BYTES = 2**22  # that an object which is opened for reading is fetched in

_Identity = tuple[int, int]
"""Device and inode of a folder."""


class Listed(NamedTuple):
    """A file as its listing shows it."""

    name: str
    """Relative to the place, with `/`."""
    size: int
    """Bytes."""
    stamp: str
    """Another one when the file was written again."""


class Files(Protocol):
    """The files of one place. Picklable, small, hashable; reads from any number of threads."""

    def find(self, wanted: Callable[[str], bool], *, deep: bool = True) -> list[Listed]:
        """All files whose names are wanted, in the order of names; hidden ones are left out.

        Args:
            wanted: told a name relative to the place.
            deep: at any depth, and not only right here.
        """
        ...

    def look_at(self, name: str) -> Listed | None:
        """One file; None where there is none (a folder is none) or it may not be looked at."""
        ...

    def read(self, name: str, at: int = 0, size: int | None = None, *, exact: bool = True) -> bytes:
        """A range of a file, or all of it; not `exact`: what there is of the range.

        Raises:
            OSError: this file cannot be read, or is shorter.
            StorageError: nothing can be read there.
        """
        ...

    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file to seek in."""
        ...


def place_of(text: str) -> tuple[Files, str]:
    """The folder or prefix that holds what `text` names, and its name in there."""
    base, mark, options = text.partition("?") if text.startswith(S3) else (text, "", "")
    if not mark and not base.startswith(S3):
        path = Path(base.removeprefix("file://")).expanduser().absolute()
        return LocalFiles(str(path.parent)), path.name
    parent, _, name = base.rstrip("/").rpartition("/")
    return BucketFiles(parent.removeprefix(S3), options), name


def folder_of(text: str) -> Files | None:
    """The folder or prefix that `text` names; None where it is none.

    Raises:
        DataError: there are credentials in it.
    """
    if are_in(text):
        raise DataError(
            "credentials do not belong into a source, which the manifest names",
            key="source",
            found=text,
            fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment instead",
        )
    if text.startswith(S3):
        base, _, options = text.partition("?")
        bucket = BucketFiles(base.removeprefix(S3).strip("/"), options)
        return bucket if bucket.is_folder() else None
    path = Path(text.removeprefix("file://")).expanduser().absolute()
    return LocalFiles(str(path)) if _leads_to(path.is_dir) else None


def _exactly(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise OSError(errno.EIO, f"the file ends after {len(data)} of {size} bytes")
    return data


# --------------------------------------------------------------------------------------------------------------- local


@dataclass(frozen=True)
class LocalFiles:
    """Files below a local folder."""

    root: str

    def __str__(self) -> str:
        return self.root

    def find(self, wanted: Callable[[str], bool], *, deep: bool = True) -> list[Listed]:
        """Links are followed. What looks wanted and is no file (a pipe, a link to nothing) is listed with size 0."""
        out: list[Listed] = []
        visits: Counter[_Identity] = Counter()
        # Of each folder: the path, the name, and the folders on the way to it, so that a loop of links ends.
        waiting: list[tuple[Path, str, frozenset[_Identity]]] = [(Path(self.root), "", frozenset())]
        while waiting:
            folder, prefix, above = waiting.pop()
            identity, scanned = _scan(folder)
            if identity in above:
                continue
            visits[identity] += 1
            if visits[identity] > _MOST_WAYS_TO_A_FOLDER:
                raise _too_many_ways(folder)
            for entry in scanned:
                # A name that is not UTF-8 has no key: under the escaped one it is not found, and so it is set aside.
                name = prefix + as_utf8(entry.name)
                if entry.name.startswith("."):
                    continue
                if _leads_to(entry.is_dir):
                    if deep:
                        waiting.append((folder / entry.name, name + "/", above | {identity}))
                elif wanted(name):
                    out.append(_listed(name, entry.stat(follow_symlinks=_leads_to(entry.is_file))))
        return sorted(out)

    def look_at(self, name: str) -> Listed | None:
        """A regular file."""
        try:
            info = Path(self.root, name).stat()
        except (OSError, ValueError):  # the latter of a name with a zero byte
            return None
        return _listed(name, info) if stat.S_ISREG(info.st_mode) else None

    def read(self, name: str, at: int = 0, size: int | None = None, *, exact: bool = True) -> bytes:
        """Never waits for a pipe."""
        # Without blocking: the opening of a pipe that nobody writes to would wait for ever.
        try:
            handle = os.open(f"{self.root}/{name}", os.O_RDONLY | os.O_NONBLOCK)  # making a Path takes as long
        except ValueError as error:  # a zero byte
            raise OSError(errno.EINVAL, "no file can have this name") from error
        try:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            length = info.st_size if size is None else size
            refuse_too_large(length)
            data = os.pread(handle, length, at)
            return _exactly(data, length) if exact else data
        finally:
            os.close(handle)

    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """By Python's own open."""
        return Path(self.root, name).open("rb")


def _scan(folder: Path) -> tuple[_Identity, list[os.DirEntry[str]]]:
    try:
        here = folder.stat()
        with os.scandir(folder) as scanned:
            return (here.st_dev, here.st_ino), list(scanned)
    except OSError as error:
        raise DataError(
            "a folder cannot be listed", key="source", found=error, fix="let this user read it, or move it away"
        ) from error


def _leads_to(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link that leads to itself, a name that is too long, a folder that is closed
        return False


def _too_many_ways(folder: Path) -> DataError:
    return DataError(
        "links lead to one folder by too many ways",
        key="source",
        found=folder,
        allowed=f"at most {_MOST_WAYS_TO_A_FOLDER} ways",
        fix="remove links that lead in circles",
    )


def _listed(name: str, info: os.stat_result) -> Listed:
    is_file = stat.S_ISREG(info.st_mode)
    return Listed(name, info.st_size if is_file else 0, str(info.st_mtime_ns))


# ------------------------------------------------------------------------------------------------------------------ S3


@dataclass(frozen=True)
class BucketFiles:
    """Objects below a prefix of a bucket, by s3fs. Never fork a process that has used it.

    Endpoint, region and credentials come from the standard variables (AWS_ENDPOINT_URL, AWS_DEFAULT_REGION,
    AWS_ACCESS_KEY_ID, …), or the first two from the options.
    """

    root: str
    """bucket/prefix."""
    options: str = ""
    """As pyarrow takes them after the `?` of a URI: endpoint_override, scheme, region, anonymous."""

    def __str__(self) -> str:
        return S3 + self.root

    def is_folder(self) -> bool:
        """Whether anything lies below."""
        with self._explained():
            return bool(self._s3().isdir(self.root))

    def find(self, wanted: Callable[[str], bool], *, deep: bool = True) -> list[Listed]:
        """One request for a thousand objects."""
        with self._explained():
            found = self._s3().find(self.root, maxdepth=None if deep else 1, detail=True)
        names = ((path.removeprefix(self.root).lstrip("/"), info) for path, info in found.items())
        return sorted(_listed_object(name, info) for name, info in names if not is_hidden(name) and wanted(name))

    def look_at(self, name: str) -> Listed | None:
        """An object."""
        with self._explained():
            try:
                info = self._s3().info(self._path(name))
            except FileNotFoundError:
                return None
        return _listed_object(name, info) if info["type"] == "file" else None

    def read(self, name: str, at: int = 0, size: int | None = None, *, exact: bool = True) -> bytes:
        """One request. An object that is missing or forbidden is its own matter, and no failure of the storage."""
        refuse_too_large(size or 0)
        if size == 0:  # an empty range cannot be asked for
            return b""
        # Always a range: for a whole object s3fs would ask for its size first, in a request of its own.
        end = at + (MAX_IMAGE_BYTES + 1 if size is None else size)
        with self._explained(FileNotFoundError, PermissionError):
            try:
                data = self._s3().cat_file(self._path(name), start=at, end=end)
            except OSError as error:
                if not _is_past_the_end(error):
                    raise
                data = b""
        refuse_too_large(len(data))
        return data if size is None or not exact else _exactly(data, size)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """In blocks, read ahead."""
        with self._explained(), self._s3().open(self._path(name), "rb", block_size=_BLOCK_BYTES) as file:
            yield cast("BinaryIO", file)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _s3(self) -> Any:
        import s3fs  # its import takes longer than the listing of a folder, and most sources are local

        # s3fs keeps an instance for each thread and set of arguments.
        return s3fs.S3FileSystem(use_listings_cache=False, **_s3_arguments(self.options))

    @contextlib.contextmanager
    def _explained(self, *allowed: type[OSError]) -> Iterator[None]:
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except allowed:
            raise
        except (OSError, BotoCoreError, ClientError) as error:  # the last two begin at Exception
            raise StorageError(
                f"cannot read {self}",
                found=str(error) or type(error).__name__,
                fix="check the bucket's name, the endpoint, the region, and the credentials in the environment (AWS_*)",
            ) from error


def _is_past_the_end(error: OSError) -> bool:
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") in ("InvalidRange", "416")


def _listed_object(name: str, info: dict[str, Any]) -> Listed:
    return Listed(name, int(info["size"]), f"{info.get('ETag')} {info.get('LastModified')}")


def _s3_arguments(options: str) -> dict[str, Any]:
    """Arguments for s3fs from the options of a URI."""
    from urllib.parse import parse_qsl

    known = dict(parse_qsl(options, keep_blank_values=True))
    arguments: dict[str, Any] = {}
    scheme = known.pop("scheme", "https")
    if endpoint := known.pop("endpoint_override", ""):
        arguments["endpoint_url"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
    if region := known.pop("region", ""):
        arguments["client_kwargs"] = {"region_name": region}
    if known.pop("anonymous", "").lower() in ("1", "true"):
        arguments["anon"] = True
    if known:
        raise DataError(
            "an option of the address is not known",
            key="source",
            found=", ".join(sorted(known)),
            allowed="endpoint_override, scheme, region, anonymous",
        )
    return arguments
