"""What the board keeps for the driver."""

from maskray.on_ray.board import MOST_WARNINGS, WITHOUT_IMAGE, Board


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


def test_images_that_tasks_could_not_decode_are_told_of():
    board = Board()
    board.post(10, {WITHOUT_IMAGE: 0.0})
    assert board.read(0) == (10, {WITHOUT_IMAGE: 0.0}, [])
    board.post(20, {WITHOUT_IMAGE: 3.0})
    board.post(30, {WITHOUT_IMAGE: 2.0})
    (warning,) = board.read(0)[2]
    assert WITHOUT_IMAGE in warning
