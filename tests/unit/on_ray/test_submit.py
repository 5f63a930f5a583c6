"""Jobs that are followed through a dashboard that drops what it streams, or is away: one that speaks HTTP as Ray's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from aiohttp import web

from maskray.errors import ClusterError
from maskray.on_ray import submit
from maskray.on_ray.submit import Ended, Jobs

LINES = [f"line {number}\n" for number in range(6)]


class Dashboard:
    """Streams a job's log from its beginning, as often as it is asked.

    Args:
        lets_go_after: of each stream, how many lines it gives and for how many seconds it is open then, before it is
            dropped without a word. One more is given to its end.
    """

    def __init__(self, *lets_go_after: tuple[int, float]) -> None:
        self._drops, self.streams = lets_go_after, 0
        self.status: str | None = None
        """Of the job; None: it runs for as long as streams are dropped."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)

    def end(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/jobs/{job}", self._job)
        app.router.add_get("/api/jobs/{job}/logs/tail", self._tail)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})

    async def _job(self, request: web.Request) -> web.Response:
        if request.match_info["job"] == "unknown":
            return web.Response(status=404, text="Job unknown does not exist")
        status = self.status or ("RUNNING" if self.streams < len(self._drops) else "SUCCEEDED")
        told = {"type": "SUBMISSION", "status": status, "entrypoint": "", "driver_agent_http_address": "http://node"}
        return web.json_response(told)

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        stream, self.streams = self.streams, self.streams + 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        lines, seconds = self._drops[stream] if stream < len(self._drops) else (len(LINES), 0.0)
        for line in LINES[:lines]:
            await socket.send_str(line)
        await asyncio.sleep(seconds)
        if stream < len(self._drops):
            assert request.transport is not None
            request.transport.abort()
        return socket


@pytest.fixture
def dashboard() -> Iterator[Callable[..., Dashboard]]:
    made = []

    def make(*lets_go_after: tuple[int, float]) -> Dashboard:
        made.append(Dashboard(*lets_go_after))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_AWAY_SECONDS", 1.0)
    monkeypatch.setattr(submit, "_POLL_SECONDS", 0.02)


def test_a_stream_that_is_dropped_is_taken_up_however_long_it_was_open(dashboard: Callable[..., Dashboard]):
    head, shown = dashboard((2, 1.5), (2, 0.0), (3, 0.0)), list[str]()
    assert Jobs(head.address).follow("long", shown.append) == Ended("SUCCEEDED", None, "")
    assert "".join(shown) == "".join(LINES)
    assert head.streams == 4


def test_a_log_that_cannot_be_had_does_not_hide_how_the_job_ended(dashboard: Callable[..., Dashboard]):
    head, shown = dashboard(*[(2, 0.0)] * 1000), list[str]()
    head.status = "FAILED"
    assert Jobs(head.address).follow("lost", shown.append).status == "FAILED"
    assert "".join(shown).startswith("line 0\nline 1\nThe rest of the log cannot be read: ")


def test_a_dashboard_that_comes_back_is_waited_for(dashboard: Callable[..., Dashboard]):
    head, shown = dashboard((2, 0.2)), list[str]()
    jobs = Jobs(head.address)
    head.stop()
    back = threading.Timer(0.5, head.start)
    back.start()
    assert jobs.follow("job-404", shown.append).status == "SUCCEEDED"
    assert "".join(shown) == "".join(LINES)


def test_a_dashboard_that_stays_away_is_said_whatever_the_job_is_called(dashboard: Callable[..., Dashboard]):
    head = dashboard()
    jobs = Jobs(head.address)
    head.stop()
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"no Ray dashboard answers there.*--follow job-404"):
        jobs.follow("job-404", print)
    assert time.monotonic() - start > 1
    with pytest.raises(ClusterError, match=r"no Ray dashboard answers there.*--follow job-404"):
        jobs.stop("job-404")
    head.start()


def test_a_job_that_is_not_there_is_said_at_once(dashboard: Callable[..., Dashboard]):
    with pytest.raises(ClusterError, match=r"the cluster has no such job\. Found: unknown"):
        Jobs(dashboard().address).follow("unknown", print)
