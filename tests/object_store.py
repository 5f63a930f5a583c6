"""A real S3 API over HTTP for tests: moto's server, and a proxy before it, or any server, that fails some requests."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

# Headers of one connection, not of what passes through.
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_ERRORS = {"throttle": (503, "SlowDown"), "refuse": (403, "AccessDenied")}
_XML = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>As the test wants it.</Message></Error>'
_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def moto_server() -> Iterator[str]:
    """The URL of an empty object store on a free port of this machine, while the block runs."""
    command = [sys.executable, "-c", _SERVE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        # It ends with its input, which is closed here, and by the kernel where the tests are killed.


def new_bucket(url: str, set_variable: Callable[[str, str], None]) -> str:
    """`s3://…` of a new bucket, after the environment has been made to lead to it."""
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "maskray",
        "AWS_SECRET_ACCESS_KEY": "maskray",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        set_variable(name, value)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    with urlopen(Request(f"{url}/{name}", method="PUT")):
        return f"s3://{name}"


class FaultyProxy:
    """Passes requests on to a server, an object store say, and fails a share, drawn from a seed in order of arrival.

    | kind     | what the client sees                                                                    |
    |----------|-----------------------------------------------------------------------------------------|
    | throttle | 503 SlowDown; the store does not see the request                                        |
    | away     | the connection is reset at once; the store does not see the request                     |
    | reset    | the request is done, then the connection is reset instead of an answer                  |
    | short    | the answer's headers and half of its body, then the end of the connection               |
    | fewer    | a whole answer of half the bytes that were asked for                                    |
    | slow     | the right answer, late                                                                  |
    | refuse   | 403 AccessDenied                                                                        |

    Only reads of a range have a body to cut: other requests are reset instead of `short` and `fewer`.

    Args:
        upstream: URL of the object store.
        shares: probability of each kind; may be changed while it runs.
        seed: of the draws.
    """

    def __init__(self, upstream: str, shares: Mapping[str, float], seed: int = 0) -> None:
        self.upstream, self.shares = urlsplit(upstream).netloc, dict(shares)
        self.requests: Counter[str] = Counter()
        """By method."""
        self.faults: Counter[str] = Counter()
        """By kind."""
        self.sent_bytes = 0
        """Of bodies."""
        self.script: list[str | None] = []
        """How the next requests fail, before any is drawn."""
        self.slow_seconds = 0.2
        """Of a `slow` answer."""
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="faulty-proxy")
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def draw(self, method: str, *, of_a_range: bool) -> str | None:
        """Count a request and say how it fails; None for not at all."""
        with self._lock:
            self.requests[method] += 1
            kinds, shares = [*self.shares, None], [*self.shares.values(), 1 - sum(self.shares.values())]
            kind = self.script.pop(0) if self.script else self._random.choices(kinds, shares)[0]
            if kind in ("short", "fewer") and not of_a_range:
                kind = "reset"
            if kind is not None:
                self.faults[kind] += 1
            return kind

    def forget(self) -> None:
        """Count from zero."""
        with self._lock:
            self.requests.clear()
            self.faults.clear()
            self.sent_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # clients keep idle connections
    proxy: FaultyProxy

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # at once: a FIN first would hide the reset


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _pass_on(self) -> None:
        body, of_a_range = self._body(), "Range" in self.headers
        fault = self.server.proxy.draw(self.command, of_a_range=of_a_range)
        if fault in _ERRORS:
            status, code = _ERRORS[fault]
            self._answer(status, {"Content-Type": "application/xml"}, _XML.format(code).encode())
            return
        if fault == "away":
            self._reset()
            return
        if fault == "slow":
            time.sleep(self.server.proxy.slow_seconds)
        try:
            status, headers, content = self._ask(body)
        except (OSError, http.client.HTTPException):  # that server itself is away
            self._reset()
            return
        if fault == "reset":
            self._reset()
        elif fault == "short":
            self._answer(status, headers, content, sent=len(content) // 2)
            self.close_connection = True
        else:
            self._answer(status, headers, content[: len(content) // 2] if fault == "fewer" else content)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _pass_on

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
        self.close_connection = True

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in {*_HOP_BY_HOP, "expect"}}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content

    def _answer(self, status: int, headers: dict[str, str], content: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
            self.server.proxy.sent_bytes += len(content[:sent])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: the counts say it."""
