"""S3 for `Storage`: one client for a process, which errors may pass, and the one request that pyarrow cannot make.

Who tries again. What is one step (read a range, list, delete) is asked once by `Connection.once` and done anew as a
whole by `Storage`, which counts it and says it. What streams (an upload in parts, a file read at the caller's pace)
goes through `Connection.patient`: the SDK repeats the request that failed, for nobody else can, and `Storage` begins an
upload anew only where that did not help. So no request is tried tries × tries times, but in a long outage of an upload.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from pyarrow import fs

SCHEME = "s3://"
_STREAM_TRIES = 6
_HANDLES_KEPT = 2**16  # of 0.7 kB each

# pyarrow tells what was answered in its text alone; HEAD has no body, so there is no more than the HTTP status.
_PASSING = re.compile(
    r"AWS Error (SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|NETWORK_CONNECTION)\b"
    r"|HTTP status (408|429|5\d\d)"
    # The answer to the last request of an upload was lost, and the SDK asked again.
    r"|AWS Error NO_SUCH_UPLOAD"
)
_BAD_CERTIFICATE = re.compile(r"curlCode: (58|60|77)\b")
_NOT_THERE = re.compile(r"AWS Error (NO_SUCH_KEY|RESOURCE_NOT_FOUND)\b")


class ShortReadError(OSError):
    """A file has fewer bytes than its reader thinks."""


def read_exactly(file: Any, offset: int, length: int) -> bytes:
    """Part of an open pyarrow file.

    Raises:
        ShortReadError: the file ends before that.
    """
    content, num_read = bytearray(length), 0
    if offset + length <= file.size():  # beyond it, files on S3 raise something else
        # Into zeros: pyarrow does not see that an object store sent less than was asked. Its own buffers would then
        # hold what lay in memory, another file's bytes or an older read's, and pass for what came.
        file.seek(offset)
        num_read = file.readinto(content)
    if num_read != length:
        raise ShortReadError(f"it has {file.size()} bytes, {offset + length} were expected")
    return bytes(content)


def is_passing(error: OSError) -> bool:
    """Whether the same request may do better later: throttling, a lost or cut connection, a time-out."""
    text = str(error)
    return bool(_PASSING.search(text)) and not _BAD_CERTIFICATE.search(text)


def is_not_there(error: OSError) -> bool:
    """Whether an object is gone that was open already: that is said in another way than at its opening."""
    return bool(_NOT_THERE.search(str(error)))


class Connection:
    """A client of an object store. Thread-safe."""

    def __init__(self, uri: str) -> None:
        found, _ = fs.FileSystem.from_uri(uri)
        # pyarrow reads a URI and AWS_ENDPOINT_URL only there and takes a retry strategy only here; what it pickles is
        # the way from one to the other. A small file is one PUT instead of an upload in parts, which takes three.
        self._options = found.__reduce__()[1][0] | {"allow_delayed_open": True}
        self.once, self.patient = (self._client(tries) for tries in (1, _STREAM_TRIES))
        self._handles: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def _client(self, tries: int) -> Any:
        return fs.S3FileSystem(**self._options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=tries))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Part of an object that does not change once it is written, in one request.

        To open one asks for its size: an open one is kept, and holds no connection.
        """
        with self._lock:
            handle = self._handles.pop(path, None)
        if handle is None:
            handle = self.once.open_input_file(path)
        content = read_exactly(handle, offset, length)
        with self._lock:  # not where it failed: what is there now may be another object
            self._handles[path] = handle
            while len(self._handles) > _HANDLES_KEPT:
                self._handles.popitem(last=False)
        return content

    def create_exclusive(self, path: str, content: bytes) -> bool | None:
        """Create an object that must not exist yet; False where it does, None where the store knows no such request.

        Raises:
            OSError: it cannot be done.
        """
        # Here, because they take a second to import and only a launch needs them.
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.session import get_session

        options, (bucket, _, key) = self._options, path.partition("/")
        endpoint = options["endpoint_override"]
        if endpoint and "://" not in endpoint:
            endpoint = f"{options['scheme']}://{endpoint}"
        by_path = bool(endpoint) and not options["force_virtual_addressing"]  # as pyarrow does
        client = get_session().create_client(
            "s3",
            region_name=options["region"] or None,
            endpoint_url=endpoint or None,
            aws_access_key_id=options["access_key"],
            aws_secret_access_key=options["secret_key"],
            aws_session_token=options["session_token"],
            config=Config(
                retries={"mode": "standard", "total_max_attempts": _STREAM_TRIES},
                s3={"addressing_style": "path" if by_path else "auto"},
            ),
        )
        try:
            client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                return False
            if code in ("NotImplemented", "501"):
                return None
            raise OSError(str(error)) from error
        except BotoCoreError as error:
            raise OSError(str(error)) from error
        finally:
            client.close()
        return True


def connect(uri: str) -> tuple[Connection, str]:
    """The process's connection for `s3://bucket/prefix?options`, and the path below it.

    Raises:
        ValueError: no such address.
        OSError: the bucket cannot be asked.
    """
    address, mark, options = uri.partition("?")
    place, _, path = address.removeprefix(SCHEME).partition("/")
    bucket = place.rpartition("@")[2]  # credentials may stand before it
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _connection(f"{SCHEME}{place}{mark}{options}", environment), f"{bucket}/{unquote(path)}".rstrip("/")


@lru_cache(maxsize=64)
def _connection(uri: str, environment: tuple[tuple[str, str], ...]) -> Connection:  # noqa: ARG001 - the client reads it
    """A client takes 10 ms to make and then connects anew: each Ray task unpickles a Storage."""
    return Connection(uri)
