"""What the board keeps for the driver."""

import logging

import pytest

from maskray.data.retry import Patience, persistently
from maskray.on_ray import gauges, worker
from maskray.on_ray.board import KIND_SECONDS, MOST_OF_A_KIND, Board, Seen, TrialBoard, Warnings
from maskray.on_ray.gauges import RESTARTS, VIEWS


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_warning_is_said_once_and_given_once():
    board = Board()
    for text in ("one", "two", "one"):
        board.warn(text)
    news = board.read(Seen())
    assert news.warnings == ["one", "two"]
    assert board.read(Seen()).warnings == ["one", "two"], "the answer may have been lost"
    board.warn("three")
    assert board.read(news.seen).warnings == ["three"]
    assert board.read(Seen()).warnings == ["three"], "whoever follows next does not hear the rest again"


def test_a_flood_of_one_kind_is_cut_and_counted_and_mutes_no_other():
    clock = Clock()
    warnings = Warnings(clock)
    for number in range(300):
        warnings.add(f"image {number} cannot be decoded", "maskray.data.decode:7")
    warnings.add("Notice that a node will be taken away")
    lines, seen = warnings.after(0)
    assert lines[:-1] == [f"image {number} cannot be decoded" for number in range(MOST_OF_A_KIND)]
    assert lines[-1] == "Notice that a node will be taken away"
    clock.now = KIND_SECONDS
    warnings.settle()
    ((counted,), _) = warnings.after(seen)
    assert counted.startswith(f"{300 - MOST_OF_A_KIND} more like it were left out")
    assert counted.endswith("image 299 cannot be decoded")


class InThisProcess:
    """A board as whoever warns of something knows it, without an actor."""

    def __init__(self) -> None:
        self.board = Board()
        self.warn = self

    def remote(self, *given: str) -> None:
        self.board.warn(*given)


def test_each_retry_of_a_worker_is_of_the_same_kind(monkeypatch: pytest.MonkeyPatch):
    """Its text names the file, the error and the number of the try."""
    told, asked = InThisProcess(), 0
    monkeypatch.setattr(worker.ray, "get", lambda answer, timeout: answer)
    said = logging.getLogger("maskray.data.retry")

    def attempt() -> None:
        nonlocal asked
        asked += 1
        if asked % 3:
            raise OSError(f"throttled, request {asked}")

    handler = worker._ToBoard(told)
    said.addHandler(handler)
    try:
        for number in range(30):
            persistently(f"read s3://bucket/{number}", attempt, lambda _: True, Patience(5, 60.0, 0.0, 0.0))
        said.warning("something else")
    finally:
        said.removeHandler(handler)
    warnings = told.board.read(Seen(), is_last=True).warnings
    assert len(warnings) == MOST_OF_A_KIND + 2
    assert warnings[MOST_OF_A_KIND] == "something else"
    assert warnings[-1].startswith(f"{2 * 30 - MOST_OF_A_KIND} more like it")


def test_what_is_said_again_later_is_said_again():
    clock = Clock()
    warnings = Warnings(clock)
    for clock.now in (0.0, 1.0, KIND_SECONDS, KIND_SECONDS + 1, 3 * KIND_SECONDS):
        warnings.add("Notice that a node will be taken away")
    assert len(warnings.after(0)[0]) == 3


def test_what_was_left_out_is_counted_at_the_end():
    board = Board()
    for number in range(MOST_OF_A_KIND + 1):
        board.warn(f"image {number}", "image %d")
    assert board.read(Seen(), is_last=True).warnings[-1].startswith("1 more like it")


def test_what_nobody_reads_is_bounded():
    warnings = Warnings()
    for number in range(5000):
        warnings.add(f"of another kind: {number}")
    lines, seen = warnings.after(0)
    assert (len(lines), lines[-1], seen) == (1000, "of another kind: 4999", 5000)


def test_a_board_that_was_started_again_gives_all_that_it_has():
    lost = Board()
    for text in ("one", "two"):
        lost.warn(text)
    seen = lost.read(Seen()).seen
    board = Board()
    board.warn("three")
    news = board.read(seen)
    assert news.warnings == ["three"]
    assert news.seen.board != seen.board


def test_the_totals_of_a_run_outlive_its_board(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gauges, "_interval_seconds", lambda: 60.0)
    lost = Board("tiny-0")
    for _ in range(3):
        lost.started()
    lost.post(10, {"throughput/views_without_image": 5, "pretrain/loss": 0.5})
    lost.probed({"probe/knn": 0.75})
    totals = lost.read(Seen()).totals
    board = Board("tiny-0")
    board.post(20, {"throughput/views_without_image": 2, "pretrain/loss": 0.25})
    board.take_up(totals)
    board.started()
    shown = board.read(Seen()).totals.values
    for each in (lost, board):
        each._gauges.close()
    assert shown == totals.values | {
        ("maskray_step", ""): 20.0,
        ("maskray_loss", ""): 0.25,
        (VIEWS, ""): 7.0,
        (RESTARTS, ""): 3.0,
    }


def test_beats_are_counted():
    board = TrialBoard()
    assert board.read_beats() == 0
    board.beat()
    board.beat()
    assert board.read_beats() == 2


def test_what_a_checkpoint_is_worth_is_kept_once():
    """A worker that was lost may judge again."""
    board = TrialBoard()
    board.found(5, {"probe/knn": 0.5})
    board.found(5, {"probe/knn": 0.5})
    assert board.read_found(()) == [(5, {"probe/knn": 0.5})]
    board.found(9, {"probe/knn": 0.6})
    assert board.read_found([5]) == [(9, {"probe/knn": 0.6})]
    assert board.read_found([5, 9]) == []
