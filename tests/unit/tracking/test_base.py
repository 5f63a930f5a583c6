import json
import math
from collections.abc import Mapping

from maskray.tracking.base import Fanout, MemoryTracker, Observer, Point, points_of


def test_point_survives_json() -> None:
    points = points_of({"pretrain/loss": 0.1 + 0.2, "pretrain/lr": 1e-300}, 7)
    again = [Point.from_plain(plain) for plain in json.loads(json.dumps([p.plain() for p in points], allow_nan=False))]
    assert again == points


def test_what_is_not_finite_is_left_out() -> None:
    points = points_of({"a": math.inf, "b": -math.inf, "c": math.nan, "d": 1.0}, 1)
    assert [p.key for p in points] == ["d"]


def test_fanout_tells_all_and_keeps_pending_of_the_one_that_stores() -> None:
    seen: list[int] = []
    stored = MemoryTracker()
    both = Fanout(stored, Observer(lambda step, metrics: seen.append(step)))
    stored.store.away = True
    both.log({"pretrain/loss": 1.0}, 3)
    both.figure("reconstruction", b"png", 3)
    both.event("rewind", "steps 1 to 3")
    both.tag("maskray.mfu_of", "one core")
    assert seen == [3]
    assert [plain[0] for plain in both.pending()] == ["pretrain/loss"]
    assert not both.flush(0.1)
    stored.store.away = False
    assert both.close()
    assert [p.step for p in stored.store.points] == [3]
    assert stored.store.figures == {("reconstruction", 3): b"png"}
    assert stored.store.events == [("rewind", "steps 1 to 3")]
    assert stored.store.tags == {"maskray.mfu_of": "one core"}


def test_fanout_restores_into_the_one_that_stores() -> None:
    stored = MemoryTracker()
    both = Fanout(Observer(), stored)
    both.restore([["pretrain/loss", 1.0, 5, 2]])
    assert stored.store.points == [Point("pretrain/loss", 1.0, 5, 2)]


def test_observer_that_breaks_does_not_end_the_run() -> None:
    def broken(step: int, metrics: Mapping[str, float]) -> None:
        raise BrokenPipeError(f"nobody reads {step}")

    observer = Observer(broken)
    observer.log({"pretrain/loss": 1.0}, 1)
    observer.log({"pretrain/loss": 1.0}, 2)
    assert observer.close()
