"""S3 for code that is not ours, Ray Train's: a pyarrow file system whose every request is as patient as `Storage`'s.

pyarrow's own asks for six seconds, lists but once, and forgets in a pickle how patient it was told to be. Train's
controller ends at the first request that fails, and the run with it.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from maskray.data import s3, storage
from maskray.data.retry import persistently
from maskray.data.storage import Storage

T = TypeVar("T")


def for_train(root: Storage) -> dict[str, Any]:
    """`storage_path` and `storage_filesystem` of a place, as Ray Train's `RunConfig` takes them. Picklable."""
    if not root.uri.startswith(s3.SCHEME):
        return {"storage_path": root.uri}
    _, path = s3.connect(root.uri)
    return {"storage_path": path, "storage_filesystem": fs.PyFileSystem(_Handler(root.uri))}


class _Handler(fs.FileSystemHandler):
    """Paths are `bucket/prefix/name`.

    Args:
        uri: any place in the object store, with its options.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        connection, _ = s3.connect(uri)
        self._once, self._streams = connection.once, connection.patient

    def __reduce__(self) -> tuple[Any, ...]:
        return _Handler, (self._uri,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handler) and other._uri == self._uri

    def __hash__(self) -> int:
        return hash(self._uri)

    def get_type_name(self) -> str:
        """For messages."""
        return "patient-s3"

    def normalize_path(self, path: str) -> str:
        """As it is."""
        return str(self._once.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[Any]:
        """Of files or folders."""
        return self._ask("look for", paths[0], lambda: list(self._once.get_file_info(paths)))

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        """Of what is in a folder."""
        return self._ask("list", selector.base_dir, lambda: list(self._once.get_file_info(selector)))

    def create_dir(self, path: str, recursive: bool) -> None:
        """A folder is a name with a slash at its end."""
        self._ask("create", path, lambda: self._once.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        """With all that is in it; one that a try before has deleted is no error."""

        def delete() -> None:
            if self._once.get_file_info(path).type != fs.FileType.NotFound:
                self._once.delete_dir(path)

        self._ask("delete", path, delete)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """The folder stays."""
        self._ask("empty", path, lambda: self._once.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        """Never.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("all buckets at once")

    def delete_file(self, path: str) -> None:
        """One that is not there is no error in S3."""
        self._ask("delete", path, lambda: self._once.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        """A copy, and then a deletion."""
        self._ask("move", src, lambda: self._once.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        """Within the store."""
        self._ask("copy", src, lambda: self._once.copy_file(src, dest))

    def open_input_stream(self, path: str) -> Any:
        """What is read is asked for by the more patient client."""
        return self._ask("read", path, lambda: self._streams.open_input_stream(path))

    def open_input_file(self, path: str) -> Any:
        """As `open_input_stream`."""
        return self._ask("read", path, lambda: self._streams.open_input_file(path))

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """Held in memory until it is closed, so that an upload can begin anew: for records, not for checkpoints."""

        def upload(content: bytes) -> None:
            def attempt() -> None:
                with self._streams.open_output_stream(path, metadata=metadata) as stream:
                    stream.write(content)

            self._ask("write", path, attempt)

        return pa.PythonFile(_Upload(upload), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        """S3 has none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(path)

    @staticmethod
    def _ask(verb: str, path: str, attempt: Callable[[], T]) -> T:
        return persistently(f"{verb} {s3.SCHEME}{path}", attempt, s3.is_passing, storage.PATIENCE)


class _Upload:
    """A file that is uploaded when it is closed."""

    def __init__(self, upload: Callable[[bytes], None]) -> None:
        self._upload, self._content, self.closed = upload, BytesIO(), False

    def write(self, content: Any) -> int:
        """To memory."""
        return self._content.write(content)

    def flush(self) -> None:
        """Nothing: it comes as a whole."""

    def close(self) -> None:
        """Upload it."""
        if not self.closed:
            self.closed = True
            self._upload(self._content.getvalue())
