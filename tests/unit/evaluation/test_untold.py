"""What probes have for MLflow while it is away: nothing is lost, and nothing told twice."""

from pathlib import Path

import pytest

from maskray.data.storage import Storage
from maskray.evaluation.untold import FOLDER, Untold, names, tell
from maskray.tracking.base import MemoryStore, MemoryTracker, Point


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def keep(run: Storage, step: int) -> Untold:
    kept = Untold()
    kept.log({"probe/knn": step / 100}, step)
    kept.figure("pretrain/reconstruction", b"PNG %d" % step, step)
    kept.event("probe_failed", f"at step {step}")
    kept.keep(run, f"step_{step:09d}-a")
    return kept


def points(store: MemoryStore) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in store.points]


def test_what_is_not_taken_stays_and_is_told_later_in_order(run: Storage):
    store = MemoryStore(away=True)
    made = [Point.from_plain(each) for step in (8, 4) for each in [keep(run, step)._points[0].plain()]]
    assert not tell(run, lambda: MemoryTracker(store), 0.0)
    assert names(run) == ["step_000000004-a", "step_000000008-a"]
    store.away = False
    store.figures.clear(), store.events.clear()
    assert tell(run, lambda: MemoryTracker(store), 0.0)
    assert store.points == made[::-1], "with the time of their making"
    assert store.figures == {("pretrain/reconstruction", step): b"PNG %d" % step for step in (4, 8)}
    assert store.events == [("probe_failed", "at step 4"), ("probe_failed", "at step 8")]
    assert names(run) == []


def test_what_was_taken_before_a_kill_is_not_told_twice(run: Storage):
    store = MemoryStore()
    keep(run, 4)
    tell(run, lambda: MemoryTracker(store), 0.0)
    keep(run, 4)
    keep(run, 8)
    tell(run, lambda: MemoryTracker(store), 0.0)
    assert points(store) == [(4, 0.04), (8, 0.08)]


def test_no_tracker_is_opened_for_nothing(run: Storage):
    assert tell(run, lambda: pytest.fail("there is nothing to tell"), 0.0)


def test_a_tracker_gets_no_more_figures_than_it_holds(run: Storage):
    store, opened = MemoryStore(), list[MemoryTracker]()
    for step in range(1, 46):
        keep(run, step)

    def open_tracker() -> MemoryTracker:
        opened.append(MemoryTracker(store))
        return opened[-1]

    assert tell(run, open_tracker, 0.0)
    assert [step for step, _ in points(store)] == list(range(1, 46))
    assert len(opened) == 3


def test_what_cannot_be_read_is_said_and_left(run: Storage, caplog):
    store = MemoryStore()
    keep(run, 4)
    run.write_bytes(f"{FOLDER}/step_000000002-a.json", b"[1")
    assert tell(run, lambda: MemoryTracker(store), 0.0)
    assert points(store) == [(4, 0.04)]
    assert "step_000000002-a.json cannot be read" in caplog.text
    assert names(run) == ["step_000000002-a"]
