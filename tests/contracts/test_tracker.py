"""What every tracker that stores must do, over each of them. A tracker opened again on the same store is a restart."""

import io
import json
import math
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from maskray.config.schema import TrackingConfig
from maskray.tracking.base import MemoryStore, MemoryTracker, Tracker
from maskray.tracking.mlflow_runs import DatasetCard, RunCard, ensure_run
from maskray.tracking.mlflow_store import DATABASE, Store, open_store
from maskray.tracking.mlflow_tracker import MlflowTracker

KEYS = ("pretrain/loss", "pretrain/lr", "probe/accuracy")


@dataclass
class Case:
    """A store, seen from outside."""

    open: Callable[[], Tracker]
    open_away: Callable[[], Tracker]
    """A tracker whose store cannot be reached."""
    stored: Callable[[str], list[tuple[int, float, int]]]
    """(step, value, time) of a key, in the order of storing where the store knows it."""
    figures: Callable[[], list[tuple[str, int]]]
    tags: Callable[[], Mapping[str, str]]


@pytest.fixture(params=["memory", "mlflow"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    if request.param == "memory":
        yield memory_case()
        return
    shutil.copy(request.getfixturevalue("mlflow_tables"), tmp_path / DATABASE)
    yield mlflow_case(open_store(TrackingConfig(), str(tmp_path)))


def memory_case() -> Case:
    store = MemoryStore()
    return Case(
        open=lambda: MemoryTracker(store),
        open_away=lambda: MemoryTracker(MemoryStore(away=True)),
        stored=lambda key: [(p.step, p.value, p.timestamp_ms) for p in store.points if p.key == key],
        figures=lambda: sorted(store.figures),
        tags=lambda: store.tags,
    )


def mlflow_case(store: Store) -> Case:
    card = RunCard("run", "f00d", {}, {}, "name: run\n", DatasetCard("data", "/data", "d16e57", 1))
    run_id, client = ensure_run(store, card), store.client()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{s.getsockname()[1]}"

    def stored(key: str) -> list[tuple[int, float, int]]:
        return [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run_id, key)]

    def figures() -> list[tuple[str, int]]:
        paths = [a.path for a in client.list_artifacts(run_id, "images") if a.path.endswith(".png")]
        parts = [p.removeprefix("images/").split("+") for p in paths]
        return sorted((name, int(step)) for name, _, step, *_ in parts)

    return Case(
        open=lambda: MlflowTracker(store.uri, run_id),
        open_away=lambda: MlflowTracker(nobody, run_id),
        stored=stored,
        figures=figures,
        tags=lambda: client.get_run(run_id).data.tags,
    )


def png() -> bytes:
    out = io.BytesIO()
    FigureCanvasAgg(Figure(figsize=(2, 1))).print_png(out)
    return out.getvalue()


def log_steps(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log({"pretrain/loss": 1 / step, "pretrain/lr": step * 1e-4}, step)


def test_all_is_stored_in_order(case: Case) -> None:
    tracker = case.open()
    log_steps(tracker, 1, 1500)  # more than one batch
    assert tracker.close(60)
    for key in ("pretrain/loss", "pretrain/lr"):
        steps = [step for step, *_ in case.stored(key)]
        assert steps == list(range(1, 1501))
    times = [time for *_, time in case.stored("pretrain/loss")]
    assert times == sorted(times)


def test_the_last_word_of_a_tag_stays(case: Case) -> None:
    for text in ("slow", "fast"):
        tracker = case.open()
        tracker.tag("maskray.mfu_of", text)
        assert tracker.close()
        tracker.tag("maskray.mfu_of", "after the end")
    assert case.tags()["maskray.mfu_of"] == "fast"


def test_flush_stores_and_goes_on(case: Case) -> None:
    tracker = case.open()
    log_steps(tracker, 1, 3)
    assert tracker.flush(30)
    assert tracker.pending() == []
    assert len(case.stored("pretrain/loss")) == 3
    log_steps(tracker, 4, 5)
    assert tracker.close()
    assert len(case.stored("pretrain/loss")) == 5


def test_resumed_run_may_log_its_steps_again(case: Case) -> None:
    first = case.open()
    log_steps(first, 1, 30)
    assert first.close()
    before = case.stored("pretrain/loss")
    second = case.open()  # from the checkpoint at step 20
    log_steps(second, 21, 40)
    assert second.close()
    assert case.stored("pretrain/loss")[:30] == before
    assert [step for step, *_ in case.stored("pretrain/loss")] == list(range(1, 41))


def test_each_key_has_its_own_last_step(case: Case) -> None:
    first = case.open()
    log_steps(first, 1, 10)
    assert first.close()
    second = case.open()
    second.log({"probe/accuracy": 0.5}, 0)
    second.log({"probe/accuracy": 0.7, "pretrain/loss": 99.0}, 10)
    assert second.close()
    assert [(step, value) for step, value, _ in case.stored("probe/accuracy")] == [(0, 0.5), (10, 0.7)]
    assert len(case.stored("pretrain/loss")) == 10


def test_pending_goes_through_a_checkpoint(case: Case) -> None:
    away = case.open_away()
    log_steps(away, 1, 5)
    away.log({"pretrain/loss": math.nan}, 6)
    pending = json.loads(json.dumps(away.pending(), allow_nan=False))
    assert [(plain[0], plain[3]) for plain in pending[::2]] == [("pretrain/loss", step) for step in range(1, 6)]
    assert not away.close(0.1)

    tracker = case.open()
    tracker.restore(pending)
    log_steps(tracker, 6, 8)
    assert tracker.close()
    stored = case.stored("pretrain/loss")
    assert [step for step, *_ in stored] == list(range(1, 9))
    assert [time for *_, time in stored[:5]] == [plain[2] for plain in pending[::2]]  # the time of their making


def test_pending_that_was_stored_after_all_is_not_stored_twice(case: Case) -> None:
    first = case.open()
    log_steps(first, 1, 3)
    assert first.close()
    before: list[Any] = [case.stored(key) for key in KEYS]
    second = case.open()
    second.restore([["pretrain/loss", 1 / 2, 5, 2], ["pretrain/loss", 1 / 3, 6, 3], ["pretrain/lr", 3e-4, 6, 3]])
    assert second.close()
    assert [case.stored(key) for key in KEYS] == before


def test_values_that_are_not_finite_make_a_gap(case: Case) -> None:
    tracker = case.open()
    for step, value in enumerate((1.0, math.nan, math.inf, -math.inf, 2.0), start=1):
        tracker.log({"pretrain/loss": value}, step)
    assert tracker.close()
    assert [(step, value) for step, value, _ in case.stored("pretrain/loss")] == [(1, 1.0), (5, 2.0)]


def test_figures_make_a_series_and_come_once(case: Case) -> None:
    first = case.open()
    picture = png()
    first.figure("reconstruction", picture, 0)
    first.figure("reconstruction", picture, 20)
    assert first.close()
    second = case.open()
    second.figure("reconstruction", picture, 20)
    second.figure("reconstruction", picture, 40)
    assert second.close()
    assert case.figures() == [("reconstruction", 0), ("reconstruction", 20), ("reconstruction", 40)]


def test_what_is_told_after_close_is_dropped(case: Case) -> None:
    tracker = case.open()
    log_steps(tracker, 1, 2)
    assert tracker.close()
    log_steps(tracker, 3, 4)
    tracker.figure("reconstruction", b"", 4)
    tracker.event("late", "nobody hears it")
    assert tracker.close()
    assert [step for step, *_ in case.stored("pretrain/loss")] == [1, 2]
    assert tracker.pending() == []
