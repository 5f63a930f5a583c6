import io

import numpy as np
import pytest
from PIL import Image

from maskray.figures.canvas import SHARP, Ramp
from maskray.figures.heat_map import Cell, Side, heat_map

LONG = "[0.25, 0.5, 0.75, 0.9, 0.95, 0.99]"


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def drawn(num_rows, num_columns, long=False, **options):
    rng = np.random.default_rng(0)
    lines = lambda value: [f"{value:.1f}", "± 12.3", "2 of 3 seeds"]  # noqa: E731
    cells = [[Cell(v, lines(v)) for v in row] for row in rng.normal(80, 3, (num_rows, num_columns)).tolist()]
    cells[-1][0] = Cell(None, ["stopped early"])
    cells[0][1] = cells[0][1]._replace(is_best=True)
    cells[-1][-1] = cells[-1][-1]._replace(is_close=True)
    name = "a very long value, " * 5 if long else ""
    return heat_map(
        cells,
        title="Accuracy by one key and another" * (3 if long else 1),
        across=Side("model.decoder.width" * (3 if long else 1), [f"{name}{n}" for n in range(num_columns)]),
        down=Side("mask.ratio" * (9 if long else 1), [f"{name}{LONG if long else n}" for n in range(num_rows)]),
        say=lambda value: f"{value:.1f}",
        note="Means over seeds. " * 9,
        **options,
    )


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("size", [(12, 12), (2, 12), (12, 2), (1, 3)])
def test_no_letter_is_clipped_or_lies_over_another(size, long, letters):
    image = pixels(drawn(*size, long=long))
    assert image.shape[1] / SHARP < 1700
    assert letters.misplaced() == []
    assert letters.words().count("2 of 3 seeds") == size[0] * size[1] - 1
    assert letters.words().count("★") == letters.words().count("≈") == 1


def test_the_best_is_dark_the_worst_is_light_in_gray_too():
    for sign in (1, -1):
        ramp = Ramp([sign * 1.0, sign * 2.0, sign * 3.0], less_is_better=sign < 0)
        gray = [np.dot(ramp.color(sign * value)[:3], [0.299, 0.587, 0.114]) for value in np.linspace(1, 3, 50)]
        assert (np.diff(gray) < 0).all()
        assert gray[0] - gray[-1] > 0.5
        assert ramp.ends == (sign * 1.0, sign * 3.0)


def test_one_bad_value_does_not_make_all_others_one_colour():
    good = [80.0, 80.5, 81.0, 81.5, 82.0]
    ramp = Ramp([10.0, *good])
    assert ramp.is_cut
    assert ramp.ends[0] > 70
    assert len({ramp.color(value) for value in good}) == 5
    assert ramp.color(10.0) == ramp.color(ramp.ends[0])
    assert not Ramp(good).is_cut


def test_letters_can_be_read_on_every_colour():
    ramp = Ramp([0.0, 1.0])
    for value in np.linspace(0, 1, 101):
        parts = [float(part) ** 2.2 for part in ramp.color(value)[:3]]
        here = np.dot(parts, [0.2126, 0.7152, 0.0722])
        ink = 1.0 if ramp.ink(value) == "white" else 0.0
        assert (max(here, ink) + 0.05) / (min(here, ink) + 0.05) > 4.5


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0, 5.0]])
def test_equal_values_have_one_colour_and_one_end(values, letters):
    cells = [[Cell(value, [f"{value:.2f}"]) for value in values]]
    side = Side("x", [str(n) for n in range(len(values))])
    heat_map(cells, title="t", across=side, down=Side("y", ["0"]), say=lambda value: f"end {value}")
    assert letters.words().count("end 5.0") == 1
    assert letters.misplaced() == []


def test_what_has_no_value_is_hatched_and_said(letters):
    cells = [[Cell(1.0, ["1.0"]), Cell(None, ["not run"])]]
    image = pixels(heat_map(cells, title="t", across=Side("x", ["a", "b"]), down=Side("y", ["c"]), say=str))
    assert "not run" in letters.words()
    (box,) = (box for words, box, _ in letters if words == "not run")
    row = image[image.shape[0] - int(box.y0) + 2 * SHARP, int(box.x0) - 40 : int(box.x0) - 6]
    assert len({tuple(pixel) for pixel in row.tolist()}) > 2  # lines on a pale ground
