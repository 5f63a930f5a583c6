"""Folders for copies on this machine, which the next process removes where one was killed before it could.

    maskray-temporary-<user id>/    in the folder of temporary files; nobody else may look into it
        <random name>/              a copy, locked while its process lives

The system opens the locks of a process that dies, however it does. So what a killed one has left is known by having no
lock, and is removed by the next that makes a folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from maskray.data.storage import room_for_temporary

_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""Of file systems that lock no folders, as those of a network."""
_TRIES = 1000
"""Where each time another process removes what is made."""


class Held:
    """A new folder that nobody removes until it is let go of, or this process ends.

    Args:
        what: it is for, for the message: a path or URI.

    Raises:
        StorageError: the disk of the folder of temporary files is full.
    """

    def __init__(self, what: str) -> None:
        with room_for_temporary(what):
            self.path, self._lock = _made()

    def release(self) -> None:
        """Let go of it: what is still there is removed by the next that makes one."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            with contextlib.suppress(OSError):  # others are there
                self.path.parent.rmdir()


@contextlib.contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """A new folder for a copy of something, which is removed with all that is in it. Raises as `Held`."""
    held = Held(what)
    try:
        yield held.path
    finally:
        shutil.rmtree(held.path, ignore_errors=True)
        held.release()


def own_folder(name: str) -> Path | None:
    """The folder of this user for a purpose, made where it is not there. None: others can have put something there.

    Its name is known to all who use the machine.

    Raises:
        OSError: it cannot be made.
    """
    base = Path(tempfile.gettempdir()) / f"maskray-{name}-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        base.mkdir(mode=0o700)
    found = base.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return base if is_ours else None


def _made() -> tuple[Path, int | None]:
    """A folder and its lock. None: it has none, and lies where nothing is removed."""
    for _ in range(_TRIES):
        try:
            base = own_folder("temporary")
            if base is None:
                break
            for left in base.iterdir():
                _remove_unheld(left)
            folder = base / uuid.uuid4().hex
            folder.mkdir(mode=0o700)
            try:
                lock = _locked(folder)
            except OSError:
                folder.rmdir()
                raise
        except FileNotFoundError:  # the last that had one has removed `base`
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            break
        if lock is not None:  # or another has removed it before it was locked
            return folder, lock
    return Path(tempfile.mkdtemp(prefix="maskray-")), None


def _remove_unheld(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another removes it too
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """Its lock, held until it is closed. None: another has it, or has removed the folder."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), folder.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None
