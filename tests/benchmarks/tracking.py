"""What telling MLflow and Prometheus costs training: host seconds within the calls, counted in the process.

    python tests/benchmarks/tracking.py --repeats 3

The run of `configs/pretrain/digits.yaml`, whose steps are as short as any (so nothing hides the calls), in this process
and without Ray Data: by the tracker that the first worker has, MLflow's and the board of a real cluster. Into an
embedded store (SQLite), and to a server over HTTP. The second figure is the share of one step that a log step's calls
take; the third the CPU time of the thread that writes to MLflow, which shares the interpreter with training.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from itertools import count
from pathlib import Path
from typing import Any

from measure import Report, alternate, arguments

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # an embedded cluster of this process alone
sys.path.append(str(Path(__file__).parents[1]))

import psutil

from maskray.config.load import load
from maskray.config.schema import ClusterConfig, IngestConfig
from maskray.credentials import Hidden
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.launch import card
from maskray.on_ray import fit, worker
from maskray.on_ray.cluster import connected
from maskray.preparing import prepare
from maskray.pretrain import pretrain
from maskray.tracking.base import Tracker
from maskray.tracking.mlflow_runs import ensure_run
from maskray.training.context import LocalContext
from mlflow_server import Server

ROOT = Path(__file__).parents[2]
KINDS = ("SQLite", "HTTP")
NEEDED = 0.01


class Counted:
    """A tracker, and the seconds that training spends in its calls."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self.spent, self.logs = tracker, 0.0, list[tuple[float, float, int]]()
        for name in ("figure", "event", "tag", "pending", "restore"):
            setattr(self, name, self._counted(getattr(tracker, name)))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        start = time.perf_counter()
        self._tracker.log(metrics, step)
        end = time.perf_counter()
        self.spent += end - start
        self.logs.append((start, end, step))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def counted(*given: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*given)
            finally:
                self.spent += time.perf_counter() - start

        return counted


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--steps", type=int, default=300, help="of a run (default: %(default)s)")
    given = parser.parse_args()
    report = Report("telling MLflow and Prometheus", given.json)
    found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="maskray-") as text:
        folder = Path(text)
        digits = IngestConfig(source="digits", destination=str(folder / "data"), group_rows=16, held_out_fraction=0.2)
        ingest(digits, thread_mapper(1))
        server = Server(folder, folder / "server.db")
        turns = count()

        def side(kind: str) -> float:
            uri = server.uri if kind == "HTTP" else "null"
            found[kind].append(measured(folder, f"run-{next(turns)}", given.steps, uri))
            return found[kind][-1][0]

        try:
            server.start()
            with connected(ClusterConfig(embedded_cpus=2)):
                measured(folder, "warm-up", 40, "null")
                alternate({kind: partial(side, kind) for kind in KINDS}, given.repeats)
        finally:
            server.kill()
    for kind in KINDS:
        spent, at_log_step, of_thread, milliseconds, step = zip(*found[kind], strict=True)
        report.add(f"{kind}: in calls / all of the time", spent, "", at_most=NEEDED)
        report.add("  a log step's calls / a step", at_log_step, "")
        report.add("  the thread's CPU time / all of the time", of_thread, "")
        report.add("  a log step's calls", milliseconds, "ms")
        report.add("  a step", step, "ms")
    report.show()


def measured(folder: Path, name: str, steps: int, uri: str) -> Sequence[float]:
    """Shares of the time between the first log step and the last; of calls and steps the median, in ms."""
    sets = [f"name={name}", f"optim.steps={steps}", f"data.path={folder / 'data'}", "data.stream=local"]
    sets += [f"data.cache_folder={folder / 'cache'}", f"storage.path={folder / name}", f"tracking.uri={uri}"]
    config = load(ROOT / "configs/pretrain/digits.yaml", [*sets, "training.probe_steps=null"])
    prepared = prepare(config)
    run_id = ensure_run(prepared.store, card(prepared))
    board = fit.board(prepared.plan.run_name)
    settings = {"tracking_uri": Hidden(prepared.store.uri), "run_id": run_id, "board": board}
    tracker = worker.tracker_of(settings, config, 0)
    counted = Counted(tracker)
    thread_before = cpu_seconds_of_the_thread()
    pretrain(config, LocalContext(folder / name / "run", config.data), counted)  # type: ignore[arg-type]
    thread = cpu_seconds_of_the_thread() - thread_before
    tracker.close()
    (first, _, first_step), (last, _, last_step) = counted.logs[0], counted.logs[-1]
    step_seconds = (last - first) / (last_step - first_step)
    call_seconds = statistics.median(end - start for start, end, _ in counted.logs)
    whole = step_seconds * steps
    return counted.spent / whole, call_seconds / step_seconds, thread / whole, 1e3 * call_seconds, 1e3 * step_seconds


def cpu_seconds_of_the_thread() -> float:
    """Of the one that writes to MLflow."""
    ids = {thread.native_id for thread in threading.enumerate() if thread.name == "maskray-mlflow"}
    return sum(each.user_time + each.system_time for each in psutil.Process().threads() if each.id in ids)


if __name__ == "__main__":
    main()
