"""Files at a place, a local folder or an `s3://` prefix: the few verbs that shards, checkpoints and leases need."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeVar

from pyarrow import fs

from maskray import credentials
from maskray.data import s3
from maskray.data.retry import Patience, persistently
from maskray.errors import StorageError, UnreachableError

T = TypeVar("T")

TEMPORARY = ".tmp-"
"""Prefix of files that are still being written. A killed writer leaves one; nothing ever reads it."""
PATIENCE = Patience()
_SPOOLED_BYTES = 16 * 2**20
_COPIED_BYTES = 8 * 2**20

_DRIVE = re.compile(r"[A-Za-z]:")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def leads_out(name: str) -> bool:
    """Whether a name that should be relative to a folder may mean something outside of it, here or on Windows."""
    return _leads_out_here(name.replace("\\", "/")) or _DRIVE.match(name) is not None


def _leads_out_here(name: str) -> bool:
    return name.startswith("/") or "\0" in name or (".." in name and ".." in name.split("/"))


class Storage:
    """A folder or bucket prefix. Names are relative to it, with `/` between their parts. Picklable.

    Names may come from files that others wrote: none of them leads out.

    Whatever is written under a name appears there whole or not at all.

    Args:
        uri: a local path, or a URI such as `s3://bucket/prefix` (options after `?`, as pyarrow takes them).

    Raises:
        StorageError: no such kind of place, or credentials in the URI: where things lie is written down in many places.
    """

    def __init__(self, uri: str | Path) -> None:
        text = os.fspath(uri)
        if credentials.are_in(text):
            raise StorageError(
                "credentials do not belong into the URI of a place, which is kept with what lies there",
                found=text,
                allowed="s3://bucket/prefix",
                fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment instead",
            )
        self.is_local = "://" not in text or text.startswith("file://")
        if self.is_local:
            # Ray's workers run in another folder: a relative path would name another place there.
            root = Path(text.removeprefix("file://")).expanduser().absolute()
            self.uri = self._root = str(root)
            self._s3, self._fs = None, fs.LocalFileSystem()
            self._streams = self._fs
            return
        self.uri, self._s3 = text, None
        with self._explained("open"):
            try:
                if text.startswith(s3.SCHEME):
                    self._s3, self._root = s3.connect(text)
                    self._fs, self._streams = self._s3.once, self._s3.patient
                else:
                    self._fs, self._root = fs.FileSystem.from_uri(text)
                    self._streams = self._fs
            except ValueError as error:
                raise StorageError(
                    "this kind of storage is not known", found=text, allowed="a local path or s3://bucket/prefix"
                ) from error

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.uri,)

    @property
    def address(self) -> tuple[str, str]:
        """The path or URI, and its options with their `?`. In the name of a local folder a `?` is a letter."""
        base, mark, options = (self.uri, "", "") if self.is_local else self.uri.partition("?")
        return base, mark + options

    def join(self, *names: str) -> str:
        """The path or URI of a name below this place."""
        base, options = self.address
        return "/".join([base.rstrip("/"), *names]) + options

    def child(self, *names: str) -> Storage:
        """The place below this one."""
        return Storage(self.join(*names))

    # -------------------------------------------------------------------------------------------------------- reading

    def read_bytes(self, name: str) -> bytes:
        """All of a file.

        Raises:
            FileNotFoundError: there is no such file.
            UnreachableError: the object store did not answer, however often it was asked.
            StorageError: it cannot be read.
        """

        def read() -> bytes:
            with self._fs.open_input_file(self._path(name)) as file:
                return s3.read_exactly(file, 0, file.size())

        return self._persistently("read", name, read)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Part of a file that does not change once it is written: on S3 one request. Raises as `read_bytes` does.

        Raises:
            ShortReadError: the file ends before that.
        """

        def read() -> bytes:
            if self._s3 is not None:
                return self._s3.read_range(self._path(name), offset, length)
            with self._fs.open_input_file(self._path(name)) as file:
                return s3.read_exactly(file, offset, length)

        return self._persistently("read", name, read)

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """All of a file, a piece at a time, for what may not fit into memory. Raises as `read_range` does."""
        with self._persistently("read", name, lambda: self._fs.open_input_file(self._path(name))) as file:
            for at in range(0, file.size(), _COPIED_BYTES):
                length = min(_COPIED_BYTES, file.size() - at)
                yield self._persistently("read", name, functools.partial(s3.read_exactly, file, at, length))

    def open_input_file(self, name: str) -> Any:
        """A pyarrow file for reads at any offset; close it. Raises as `read_bytes` does."""
        with self._explained("read", name):
            return self._streams.open_input_file(self._path(name))

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or folder of this name."""
        info = self._persistently("look for", name, lambda: self._fs.get_file_info(self._path(name)))
        return bool(info.type != fs.FileType.NotFound)

    def list_names(self, folder: str = "") -> list[str]:
        """Sorted names of the files and folders right below a folder; none where it does not exist."""
        return sorted(info.base_name for info in self._infos(folder))

    def list_sizes(self, folder: str = "") -> dict[str, int]:
        """Name and size in bytes of each file right below a folder, in one request a thousand files."""
        return {i.base_name: i.size for i in self._infos(folder) if i.type == fs.FileType.File}

    def _infos(self, folder: str) -> list[Any]:
        selector = fs.FileSelector(self._path(folder), recursive=False, allow_not_found=True)
        return self._persistently("list", folder, lambda: list(self._fs.get_file_info(selector)))

    # -------------------------------------------------------------------------------------------------------- writing

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file, over an old one if there is one."""
        if self.is_local:
            with self.open_output(name) as stream:
                stream.write(content)
        else:
            self._upload(name, BytesIO(content))

    @contextlib.contextmanager
    def open_output(self, name: str) -> Iterator[Any]:
        """A binary stream whose content appears under `name` when the block ends well, and never otherwise.

        What goes to an object store lies on this machine's disk until then: so a lost connection begins the upload
        anew, and not the work that made the content.
        """
        if not self.is_local:
            with (
                room_for_temporary(self._place(name)),  # also where it is closed, which writes what is left
                tempfile.SpooledTemporaryFile(max_size=_SPOOLED_BYTES, prefix="maskray-") as spool,
            ):
                yield spool
                spool.flush()
                self._upload(name, spool)
            return
        target = Path(self._path(name))
        partial = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{target.name}")
        with self._explained("write", name):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._fs.open_output_stream(str(partial)) as stream:
                    yield stream
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

    def write_file(self, name: str, source: Path) -> None:
        """Write the content of a file of this machine, over an old one if there is one: no other copy of it is made."""
        with source.open("rb") as content:
            if self.is_local:
                with self.open_output(name) as stream:
                    shutil.copyfileobj(content, stream, _COPIED_BYTES)
            else:
                self._upload(name, content)

    def _upload(self, name: str, content: IO[bytes]) -> None:
        def upload() -> None:
            content.seek(0)
            with self._streams.open_output_stream(self._path(name)) as stream:
                shutil.copyfileobj(content, stream, _COPIED_BYTES)

        self._persistently("write", name, upload)

    def create_exclusive(self, name: str, content: bytes) -> bool:
        """Create a file that must not exist yet; False where it does. For locks, so `content` should name its writer.

        Exact on a local disk and on S3. An object store without conditional writes is written and read back, and the
        writer whose content stayed has it.
        """
        if self.exists(name):
            return False
        if not self.is_local:
            return self._create_object(name, content)
        target = Path(self._path(name))
        with self._explained("create", name):
            target.parent.mkdir(parents=True, exist_ok=True)
            whole = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{target.name}")
            try:
                whole.write_bytes(content)
                target.hardlink_to(whole)  # a reader that sees the file sees all of it
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create_in_place(target, content)
            finally:
                whole.unlink(missing_ok=True)
        return True

    def _create_object(self, name: str, content: bytes) -> bool:
        with self._explained("create", name):
            created = self._s3.create_exclusive(self._path(name), content) if self._s3 is not None else None
        if created:
            return True
        if created is None:
            self.write_bytes(name, content)
        try:  # it may be there because our first request came through and its answer did not
            return self.read_bytes(name) == content
        except FileNotFoundError:  # its holder has just given it back
            return False

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all that is in it; nothing happens where there is none."""

        def delete() -> None:
            kind = self._fs.get_file_info(self._path(name)).type
            if kind == fs.FileType.Directory:
                self._fs.delete_dir(self._path(name))
            elif kind != fs.FileType.NotFound:
                self._fs.delete_file(self._path(name))

        self._persistently("delete", name, delete)

    def check_writable(self) -> None:
        """Write a small file and delete it.

        Raises:
            StorageError: it cannot be done, and why.
        """
        probe = f"{TEMPORARY}{uuid.uuid4().hex}"
        self.write_bytes(probe, b"maskray looks whether it can write here\n")
        self.delete(probe)

    def _path(self, name: str) -> str:
        if _leads_out_here(name):
            raise StorageError("a name leads out of its place", found=name, allowed="relative names without `..`")
        return f"{self._root}/{name}" if name else self._root

    def _persistently(self, verb: str, name: str, attempt: Callable[[], T]) -> T:
        with self._explained(verb, name):
            if self.is_local:
                return attempt()
            return persistently(f"{verb} {self._place(name)}", attempt, s3.is_passing, PATIENCE)

    @contextlib.contextmanager
    def _explained(self, verb: str, name: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if verb == "read" and isinstance(error, FileNotFoundError | s3.ShortReadError):
                raise
            if verb == "read" and s3.is_not_there(error):
                raise FileNotFoundError(errno.ENOENT, str(error)) from error
            raise self.error(f"cannot {verb} {self._place(name)}", error) from error

    def error(self, problem: str, cause: OSError, *, key: str | None = None) -> StorageError:
        """What to raise where this place could not be used, with what to do.

        Args:
            problem: what could not be done.
            cause: what it met.
            key: what names the place to a user.
        """
        unreachable = not self.is_local and s3.is_passing(cause)
        kind = UnreachableError if unreachable else StorageError
        return kind(problem, key=key, found=str(cause), fix=_advice(cause, self.is_local, unreachable))

    def _place(self, name: str) -> str:
        return self.join(name) if name else self.uri


def nearest_folder(path: Path) -> Path:
    """What there is of the way to a path: itself, or the nearest folder above it."""
    return next(each for each in (path, *path.parents) if each.exists())


@contextlib.contextmanager
def room_for_temporary(what: str) -> Iterator[None]:
    """While the block writes a copy of something to the folder of temporary files.

    Args:
        what: for the message, its path or URI.

    Raises:
        StorageError: the disk of that folder is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        folder = tempfile.gettempdir()
        raise StorageError(
            f"there is no room for a temporary copy of {what}",
            key="TMPDIR",
            found=f"{error} ({shutil.disk_usage(folder).free:,} bytes are free in {folder})",
            fix="free some space, or let the variable name a folder on another disk, and start again",
        ) from error


def _create_in_place(target: Path, content: bytes) -> bool:
    """For a file system without hard links: for a moment the file is there and empty."""
    try:
        with target.open("xb", buffering=0) as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _advice(error: OSError, is_local: bool, unreachable: bool) -> str:
    if unreachable:
        return "check that the object store answers (AWS_ENDPOINT_URL names another than Amazon's), and start again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "take a folder that this user may write to, or change its permissions"
    if error.errno in _FULL:
        return "free some space, or take a folder on another disk"
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "take another path: a part of this one is a file where a folder is needed, or the reverse"
    if is_local:
        return "take another folder"
    return "check the bucket's name, the region, and the credentials in the environment (AWS_*)"
