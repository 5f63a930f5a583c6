"""MLflow that is away, slow, or started anew while a run trains: steps go on, and it has all metrics in the end."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launches import Launches
from maskray.config.schema import RunConfig, TrackingConfig
from maskray.pretrain import pretrain
from maskray.tracking.base import Fanout, MemoryTracker, Observer
from maskray.tracking.mlflow_runs import DatasetCard, RunCard, ensure_run
from maskray.tracking.mlflow_store import open_store
from maskray.tracking.mlflow_tracker import MlflowTracker
from maskray.training.checkpoint import WEIGHTS
from maskray.training.context import LocalContext
from mlflow_server import Server
from object_store import FaultyProxy
from outages import wait_for

from .conftest import LOG_STEPS, check_against, note

CARD = RunCard("run", "f00d", {"seed": 0}, {}, "name: run\n", DatasetCard("data", "/data", "d16e57", 1))
STEPS = 300
"""Of the long runs, which last longer than MLflow is away: 4 make a checkpoint, of which Train takes one in 2 s."""
AWAY_SECONDS, RESTART_SECONDS, SLOW_SECONDS = 60.0, 5.0, 3.0
MOST_STALL_SECONDS = 10.0
"""Between two looks at a ledger that does not grow: a checkpoint, or a machine that is busy."""


@pytest.fixture
def server(tmp_path: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # as the command line has it
    (tmp_path / "server").mkdir()
    shutil.copy(mlflow_tables, tmp_path / "server" / "mlflow.db")
    started = Server(tmp_path / "server", tmp_path / "server" / "mlflow.db")
    started.start()
    yield started
    started.kill()


@pytest.fixture
def before(server: Server) -> Iterator[FaultyProxy]:
    """What a run takes for MLflow: it lets everything through until told."""
    with FaultyProxy(server.uri, {}) as proxy:
        yield proxy


def digest(folder: Path) -> str:
    return hashlib.sha256((max(folder.glob("step_*")) / WEIGHTS).read_bytes()).hexdigest()


def test_steps_go_on_while_it_is_slow_and_then_gone(
    tiny: Callable[..., RunConfig], server: Server, before: FaultyProxy, tmp_path: Path
):
    """A run whose MLflow answers late from step 10 on, and is killed at step 40: it is trained before that is back."""
    num = 80
    config = tiny(optim={"steps": num}, probe={"enabled": False})
    pretrain(config, LocalContext(tmp_path / "quiet", config.data), MemoryTracker())

    store = open_store(TrackingConfig(uri=before.url), "unused")
    run_id = ensure_run(store, CARD)
    before.slow_seconds = SLOW_SECONDS

    def hinder(step: int, metrics: object) -> None:
        if step == 10:
            before.shares = {"slow": 1.0}
        elif step == 40:
            server.kill()

    tracker = MlflowTracker(before.url, run_id)
    start = time.monotonic()
    pretrain(config, LocalContext(tmp_path / "hindered", config.data), Fanout(tracker, Observer(hinder)))
    trained = time.monotonic() - start
    assert len(tracker.pending()) >= 2 * (num - 40) / 2, "it was told of everything before it was gone"
    assert trained < 2 * SLOW_SECONDS * (num / config.training.log_steps), "it waited for the answers"

    server.start()
    before.shares = {}
    assert tracker.close(60)
    client = store.client()
    wanted = list(range(config.training.log_steps, num + 1, config.training.log_steps))
    for key in ("pretrain/loss", "pretrain/lr", "throughput/images_per_second"):
        assert [m.step for m in client.get_metric_history(run_id, key)] == wanted
    assert digest(tmp_path / "hindered") == digest(tmp_path / "quiet")


# -------------------------------------------------------------------------------------------------------- the long form


@pytest.fixture
def tracked(launches, before: FaultyProxy) -> Callable[[str], Launches]:
    def make(name: str) -> Launches:
        run = launches(name, 2, optim={"steps": STEPS}, tracking={"uri": before.url})
        run.tracking_uri = before.url
        return run

    return make


def longest_stall(run: Launches, seconds: float) -> float:
    """While so many seconds pass: the longest in which no step was trained."""
    start = at = time.monotonic()
    last, longest = run.last_step(), 0.0
    while time.monotonic() - start < seconds:
        time.sleep(0.5)
        if (step := run.last_step()) > last:
            last, at = step, time.monotonic()
        longest = max(longest, time.monotonic() - at)
    assert run.last_step() < STEPS - 1, "it had ended before"
    return longest


def seconds_to_tell(run: Launches) -> float:
    """From now until MLflow has the metrics of all steps that are trained by now."""
    start, trained = time.monotonic(), run.last_step() + 1
    wait_for(lambda: max(run.metric_steps("pretrain/loss"), default=0) >= trained - LOG_STEPS, run)
    return time.monotonic() - start


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("case", "away"), [("away for a minute", AWAY_SECONDS), ("started anew", RESTART_SECONDS)])
def test_it_is_away(tracked, quiet, server: Server, case: str, away: float):
    wanted = quiet(2, STEPS)
    run = tracked("away")
    process = run.start()
    run.wait_for_step(process, 20)
    server.kill()
    stall = longest_stall(run, away)
    server.start()
    seconds = seconds_to_tell(run)
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    assert note(f"MLflow {case}", "2", run, wanted, seconds).steps_again == 0
    assert stall <= MOST_STALL_SECONDS


@pytest.mark.ray
@pytest.mark.slow
def test_it_answers_late(tracked, quiet, before: FaultyProxy):
    """All through the training, and no more at its end: a launch asks two dozen things there."""
    wanted = quiet(2, STEPS)
    run = tracked("late")
    process = run.start()
    run.wait_for_step(process, 20)
    before.slow_seconds, before.shares = SLOW_SECONDS, {"slow": 1.0}
    stall = longest_stall(run, AWAY_SECONDS)
    before.shares = {}
    seconds = seconds_to_tell(run)
    assert run.finish(process) == 0, run.output()
    assert before.faults["slow"] > 3, "else this test shows nothing"
    check_against(run, wanted)
    assert note(f"MLflow answers after {SLOW_SECONDS:.0f} s", "2", run, wanted, seconds).steps_again == 0
    assert stall <= MOST_STALL_SECONDS
