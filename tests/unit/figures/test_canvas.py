"""Letters and the room they take."""

import pytest

from maskray.figures.canvas import DPI, Box, axes_in, blank, cut, filled, png, width_of, write


def test_letters_that_are_misplaced_are_found(letters):
    figure = blank(200, 100)
    write(figure, 20, 50, "one")
    write(figure, 30, 50, "over it")
    write(figure, 190, 20, "outside")
    write(figure, 20, 80, "fine")
    png(figure)
    assert letters.misplaced() == ["outside", ("one", "over it")]


@pytest.mark.parametrize("words", ["mask.ratio", "± 12.3", "图像 $x$", ""])
@pytest.mark.parametrize("bold", [False, True])
def test_the_width_of_words_is_what_is_drawn(words, bold, letters):
    figure = blank(300, 50)
    write(figure, 10, 20, words, 9, weight="bold" if bold else "normal")
    png(figure)
    drawn = [box.width for _, box, _ in letters]
    assert width_of(words, 9, bold=bold) == pytest.approx(drawn[0] if drawn else 0, abs=1.5)


def test_what_is_too_long_loses_its_end_and_no_more():
    words = "model.decoder.depth and more of it"
    assert cut(words, 1000, 9) == words
    shown = cut(words, 100, 9)
    assert shown.endswith("…")
    assert width_of(shown, 9) <= 100 < width_of(words[: len(shown)] + "…", 9)
    assert cut(words, 1, 9) == "m…"


def test_lines_are_broken_between_words_and_none_is_lost():
    words = "Means over seeds, and half of their intervals. ★ best, ≈ not told apart from it."
    lines = filled(words, 200, 8)
    assert " ".join(lines) == words
    assert len(lines) > 2
    assert max(width_of(line, 8) for line in lines) <= 200
    assert filled("one\ntwo", 200, 8) == ["one", "two"]
    assert filled("w" * 200, 100, 8) == [cut("w" * 200, 100, 8)]


def test_axes_stand_in_pixels_from_the_upper_left():
    figure = blank(400, 200, sharpness=2)
    box = axes_in(figure, Box(40, 20, 100, 60)).get_position()
    assert (box.x0 * 400, (1 - box.y1) * 200) == pytest.approx((40, 20))
    assert (box.width * 400, box.height * 200) == pytest.approx((100, 60))
    assert figure.dpi == 2 * DPI
