"""What the board keeps for the driver."""

from maskray.on_ray.board import MOST_WARNINGS, Board, TrialBoard


def test_a_warning_is_kept_once_and_given_once():
    board = Board()
    for text in ("one", "two", "one"):
        board.warn(text)
    assert board.read(0)[2] == ["one", "two"]
    assert board.read(2)[2] == []


def test_a_flood_is_cut_and_says_so():
    board = Board()
    for number in range(3 * MOST_WARNINGS):
        board.warn(f"image {number} cannot be decoded")
    warnings = board.read(0)[2]
    assert len(warnings) == MOST_WARNINGS + 1
    assert "more warnings" in warnings[-1]


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
    assert board.read_found(0) == [(5, {"probe/knn": 0.5})]
    board.found(9, {"probe/knn": 0.6})
    assert board.read_found(1) == [(9, {"probe/knn": 0.6})]
    assert board.read_found(2) == []
