"""What a fault costs a run that is launched as a user does it: seconds without training, steps trained again."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from launches import PATIENCE_SECONDS, ROOT, Launches, is_worker

RESULTS = "MASKRAY_CHAOS_RESULTS"
"""In the environment: the file that gets a line of JSON for each case, for tests/chaos/RESULTS.md."""
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Outage:
    """A row of the table."""

    case: str
    workers: str
    seconds: float | None
    """From the end of the fault until what it held up goes on; None where it held up nothing that can be timed."""
    steps_again: int
    weights: str
    """What the final ones are equal to, to the bit."""
    loss_gap: float
    """Largest distance of a logged loss from that of the run without a fault."""

    def note(self) -> None:
        """Into the table, where one is asked for."""
        note(asdict(self))


def note(line: Mapping[str, object]) -> None:
    """A line of JSON, with the time and the commit that it is of, into the file of the results, where one is named."""
    if place := os.environ.get(RESULTS):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
        at = {"at": f"{datetime.now():%Y-%m-%d %H:%M}", "commit": commit}
        with Path(place).open("a") as file:
            file.write(json.dumps(dict(line) | at) + "\n")


def processes(title: str) -> list[psutil.Process]:
    """Those that this process has started, or that were started by them, by what Ray calls them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in "".join(process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:  # gone in the meantime
            continue
    return found


def train_workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if is_worker(p)]


def wait_for(ready: Callable[[], object], run: Launches) -> None:
    """Until something is so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert time.monotonic() < deadline, f"nothing happened\n{run.output()}"
        time.sleep(_LOOK_SECONDS)


def seconds_to_train(run: Launches, known: Iterable[psutil.Process]) -> float:
    """From now to the first step of workers that are not the known ones."""
    start, old = time.monotonic(), {p.pid for p in known}
    wait_for(lambda: any(p.pid not in old for p in train_workers()), run)
    trained = len(run.lines())
    wait_for(lambda: len(run.lines()) > trained, run)
    return time.monotonic() - start


def longest_pause(run: Launches, steps: int) -> float:
    """From now until all steps of the run are trained: the longest time in which none was."""
    last, longest = run.last_step(), 0.0
    at = start = time.monotonic()
    while last < steps - 1:
        assert time.monotonic() < start + PATIENCE_SECONDS, f"it does not end\n{run.output()}"
        time.sleep(_LOOK_SECONDS)
        if (step := run.last_step()) > last:
            last, at = step, time.monotonic()
        longest = max(longest, time.monotonic() - at)
    return longest


def kill_at_work(title: str, run: Launches) -> None:
    """SIGKILL of a process while it does what its title says: it is stopped first, and looked at again."""
    killed = False

    def kill() -> bool:
        nonlocal killed
        for process in processes(title):
            process.suspend()
            killed = process in processes(title)
            if killed:
                process.kill()
                return True
            process.resume()
        return False

    wait_for(kill, run)


def steps_again(run: Launches) -> int:
    """Steps that were trained more than once."""
    return sum(n - 1 for n in Counter(line["step"] for line in run.lines() if line["rank"] == 0).values())
