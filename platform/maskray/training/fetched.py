"""One copy of a checkpoint, for all processes of a machine that want it at the same time.

    maskray-fetched-<user id>/      in the folder of temporary files; nobody else may look into it
        <digest of the URI>/
            files/                  the copy: whole where a process reads it, and else not to be trusted
            readers                 a lock that is shared by all who read
            door                    a lock that is held alone: to fetch, to begin or end to read, to remove

The system opens the locks of a process that dies, however it does. So what a killed one has left is known by having no
readers, and is removed by the next that fetches anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from maskray.data.storage import TEMPORARY, Storage, room_for_temporary
from maskray.data.temporary import own_folder
from maskray.training import checkpoint

FILES = "files"
_READERS, _DOOR = "readers", "door"


@contextlib.contextmanager
def shared(storage: Storage) -> Iterator[Path]:
    """The checkpoint at a place as a local folder, not to be written to: itself, or a copy, removed by its last reader.

    One process fetches it, the others wait.

    Raises:
        StorageError: it cannot be read, or there is no room for the copy.
    """
    base = None
    if not storage.is_local:
        with room_for_temporary(storage.uri):
            base = own_folder("fetched")
    if base is None:
        with checkpoint.on_disk(storage) as folder:
            yield folder
        return
    for left in base.iterdir():
        _remove_unread(left, wait=False)
    entry = base / hashlib.sha256(storage.uri.encode()).hexdigest()[:32]
    try:
        with _begun(entry, storage):
            yield entry / FILES
    finally:
        _remove_unread(entry, wait=True)


def _begun(entry: Path, storage: Storage) -> IO[bytes]:
    """The lock of a reader, until it is closed; there is a whole copy."""
    with room_for_temporary(storage.uri), _opened(entry):
        readers = (entry / _READERS).open("a+b")
        try:
            if _lock(readers, fcntl.LOCK_EX | fcntl.LOCK_NB):  # nobody reads
                shutil.rmtree(entry / FILES, ignore_errors=True)
                (entry / FILES).mkdir()
                checkpoint.copy(storage, entry / FILES)
            _lock(readers, fcntl.LOCK_SH)
        except BaseException:
            readers.close()
            raise
        return readers


def _opened(entry: Path) -> IO[bytes]:
    """The door of an entry, which is made where it is not there."""
    while True:
        with contextlib.suppress(FileExistsError):  # `exist_ok` looks again, and it may be gone by then
            entry.mkdir()
        if (door := _door(entry, wait=True)) is not None:
            return door


def _door(entry: Path, *, wait: bool) -> IO[bytes] | None:
    """The door, held. None: the entry has been removed, or another process holds it and is not to be waited for."""
    try:
        door = (entry / _DOOR).open("a+b")
    except FileNotFoundError:
        return None
    if _lock(door, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
        try:
            if os.path.samestat(os.fstat(door.fileno()), (entry / _DOOR).stat()):
                return door
        except FileNotFoundError:  # with the entry, while this process waited
            pass
    door.close()
    return None


def _remove_unread(entry: Path, *, wait: bool) -> None:
    # On a full disk there may be no room for a lock; the next that fetches anything comes by here again.
    with contextlib.suppress(OSError):
        door = _door(entry, wait=wait)
        if door is None:
            return
        with door, (entry / _READERS).open("a+b") as readers:
            if _lock(readers, fcntl.LOCK_EX | fcntl.LOCK_NB):
                # Not where it is: another could find a part of it, and begin to read.
                gone = entry.rename(entry.with_name(f"{TEMPORARY}{uuid.uuid4().hex}"))
                shutil.rmtree(gone, ignore_errors=True)


def _lock(file: IO[bytes], how: int) -> bool:
    """Whether it is held now; always where it is waited for."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    return True
