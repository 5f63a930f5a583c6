"""Jobs on a cluster that is elsewhere, over the HTTP of its dashboard: sent, followed, stopped."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

import maskray
from maskray.errors import ClusterError
from maskray.on_ray import parcel
from maskray.on_ray.parcel import STOP_SECONDS, Parcel

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_POLL_SECONDS, _AWAY_SECONDS = 0.3, 120.0
# Ray takes these instead of an address that is given.
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_NO_JOB = "Request failed with status code 404"  # Ray's words


class Ended(NamedTuple):
    """How a job ended."""

    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    """Of its entry point, where that has ended by itself."""
    message: str


def address_of(given: str | None) -> str:
    """The dashboard's address: what is given, or the environment's.

    Raises:
        ClusterError: it is none of a dashboard.
    """
    of_environment = [value for name in _OVERRIDING if (value := os.environ.get(name, "")).startswith("http")]
    address = given or next(iter(of_environment), DEFAULT_ADDRESS)
    if not address.startswith(("http://", "https://")):
        raise ClusterError(
            "jobs are submitted to the dashboard of a cluster's head",
            key="--address",
            found=address,
            allowed="http://HEAD:8265, or https://…",
            fix="give that address; on Kubernetes: kubectl port-forward service/…-head-svc 8265",
        )
    return address.rstrip("/")


class Jobs:
    """The jobs of a cluster.

    Args:
        address: of its dashboard.

    Raises:
        ClusterError: nothing answers there, or the token is not the cluster's; as do all methods.
    """

    def __init__(self, address: str) -> None:
        self._address, self._shown = address, 0  # characters of the log that is followed
        with self._in_words(), _without_other_addresses():
            self._client = JobSubmissionClient(address)

    def submit(self, sent: Parcel) -> None:
        """Send a job."""
        with tempfile.TemporaryDirectory(prefix="maskray-") as folder:
            package = parcel.clean_copy(Path(maskray.__file__).parent, Path(folder))
            runtime_env = {"py_modules": [str(package)], "env_vars": dict(sent.variables)}
            if sent.files:
                archive = Path(folder) / "working_dir.zip"
                parcel.pack(sent.files, archive)
                runtime_env["working_dir"] = str(archive)
            with self._in_words():
                self._client.submit_job(
                    entrypoint=sent.entrypoint,
                    runtime_env=runtime_env,
                    submission_id=sent.submission_id,
                    metadata=dict(sent.metadata),
                    entrypoint_num_cpus=sent.resources.cpus,
                    entrypoint_num_gpus=sent.resources.gpus,
                    entrypoint_memory=sent.resources.memory_bytes,
                    entrypoint_resources=dict(sent.resources.custom) or None,
                )

    def follow(self, job: str, show: Callable[[str], object]) -> Ended:
        """Pass on what a job prints, from its beginning, until it ends. A dashboard that goes away is waited for."""
        self._shown, said, last_word, log_until = 0, "", time.monotonic(), float("inf")
        while True:
            try:
                found = self._client.get_job_info(job)
            except (OSError, RuntimeError) as error:
                if _is_of_no_job(error) or time.monotonic() - last_word > _AWAY_SECONDS:
                    raise self._error(error, job) from error
                time.sleep(_POLL_SECONDS)
                continue
            is_pending, is_over = found.status == JobStatus.PENDING, found.status.is_terminal()
            if is_pending and found.message and found.message != said:
                said = found.message
                show(f"{said}\n")
            if is_over:
                log_until = min(log_until, time.monotonic() + _AWAY_SECONDS)
            # Without an agent's address it ended before it began, and has printed nothing.
            has_log = not is_pending and bool(found.driver_agent_http_address)
            broken = asyncio.run(self._tail(job, show)) if has_log else None
            if is_over and (broken is None or time.monotonic() > log_until):
                if broken is not None:  # the node that has it may be gone
                    show(f"The rest of the log cannot be read: {broken}\n")
                return Ended(str(found.status.value), found.driver_exit_code, found.message or "")
            last_word = time.monotonic()  # a log is followed for as long as the job runs
            time.sleep(_POLL_SECONDS)

    async def _tail(self, job: str, show: Callable[[str], object]) -> Exception | None:
        """Pass on what was not shown yet; what broke it off, where something did."""
        seen, chunks = 0, self._client.tail_job_logs(job)
        while True:
            try:
                text = await anext(chunks)
            except StopAsyncIteration:
                return None
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                return error
            seen += len(text)
            if seen > self._shown:
                show(text[-(seen - self._shown) :])
                self._shown = seen

    def stop(self, job: str) -> Ended:
        """Stop a job, which closes what it has open, and wait until it has ended."""
        with self._in_words(job):
            self._client.stop_job(job)
            until = time.monotonic() + 2 * STOP_SECONDS
            while not (found := self._client.get_job_info(job)).status.is_terminal():
                if time.monotonic() > until:
                    raise ClusterError(
                        "the job does not end",
                        found=f"{job} is {found.status.value} after {2 * STOP_SECONDS} s",
                        fix=f"look at it: {self._address}/#/jobs",
                    )
                time.sleep(_POLL_SECONDS)
        return Ended(str(found.status.value), found.driver_exit_code, found.message or "")

    @contextmanager
    def _in_words(self, job: str | None = None) -> Iterator[None]:
        try:
            yield
        except ClusterError:
            raise
        except (OSError, RuntimeError, LookupError, ValueError, ray.exceptions.RayError) as error:
            raise self._error(error, job) from error

    def _error(self, error: Exception, job: str | None) -> ClusterError:
        text = " ".join(str(error).split())
        if isinstance(error, ray.exceptions.AuthenticationError):
            wrong = text.startswith("Authentication failed")
            return ClusterError(
                "the cluster does not take this token" if wrong else "the cluster wants a token, and none was sent",
                key="--address",
                found=self._address,
                fix="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token "
                "(`ray get-auth-token` on its head)",
            )
        if job is not None and _is_of_no_job(error):
            return ClusterError("the cluster has no such job", found=job, fix=f"look at {self._address}/#/jobs")
        if isinstance(error, OSError):
            again = f"; the job goes on: maskray submit --address {self._address} --follow {job}" if job else ""
            return ClusterError(
                "no Ray dashboard answers there",
                key="--address",
                found=f"{self._address} ({text[:200]})",
                fix="check host, port (8265 by default) and network, and that the head was started with "
                f"--dashboard-host=0.0.0.0, or reach it through a tunnel{again}",
            )
        return ClusterError("the cluster's dashboard refuses", found=f"{self._address}: {text[:500]}")


def _is_of_no_job(error: Exception) -> bool:
    """By the status of the reply: what a connection that failed says has the job's name in it, whatever that is."""
    return isinstance(error, RuntimeError) and str(error).startswith(_NO_JOB)


@contextmanager
def _without_other_addresses() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in _OVERRIDING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
