import io

import numpy as np
import pytest
from PIL import Image

from maskray.figures.canvas import SHARP
from maskray.figures.paintings import Painted, paintings
from maskray.figures.pictures import HIDDEN_COLOR, MARGIN

RNG = np.random.default_rng(0)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def painted(channels=1, size_HW=(8, 8), grid_HW=(4, 4), **options):
    image, other = RNG.integers(0, 256, (2, channels, *size_HW), dtype=np.uint8)
    return Painted(image, RNG.random(grid_HW) < 0.5, other, **options)


@pytest.mark.parametrize("names", [["1"], ["a long name of a value, longer than a tile", "[0.5, 0.75]"]])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (1, 12), (12, 12), (2, 3)])
def test_no_letter_is_clipped_or_lies_over_another(num_rows, num_columns, names, letters):
    one = painted(is_best=True)
    table = [[one] * num_columns for _ in range(num_rows)]
    table[-1][-1] = None if num_rows * num_columns > 1 else one
    image = pixels(
        paintings(
            table,
            title="One image, as each point sees and paints it",
            across=("mask.ratio", [names[n % len(names)] for n in range(num_columns)]),
            down=("model.decoder.depth", [names[n % len(names)] for n in range(num_rows)]) if num_rows > 1 else None,
            note="words " * 40,
        )
    )
    assert letters.misplaced() == []
    assert image.shape[1] / SHARP < 1450
    assert letters.words().count("input") == 1
    assert letters.words().count("seen") == num_columns


@pytest.mark.parametrize(("channels", "size_HW"), [(1, (8, 8)), (3, (32, 16)), (3, (224, 224)), (5, (8, 8))])
def test_pictures_of_any_size_are_shown_whole(channels, size_HW):
    grid_HW = tuple(side // (size_HW[0] // 4) for side in size_HW)
    image = pixels(paintings([[painted(channels, size_HW, grid_HW)]], title="t", across=("", [""])))
    assert image.shape[0] / SHARP < 300


def test_what_is_hidden_is_gray_and_then_painted_and_what_is_seen_stays():
    visible = np.zeros((2, 2), bool)
    visible[0, 0] = True
    one = Painted(np.full((1, 8, 8), 255, np.uint8), visible, np.zeros((1, 8, 8), np.uint8))
    image = pixels(paintings([[one]], title="", across=("", [""])))
    tile = 96 * SHARP
    hidden = (image == HIDDEN_COLOR).all(2)
    rows, columns = (np.flatnonzero(hidden.any(axis)) for axis in (1, 0))
    top, left = rows[0], columns[0]
    assert hidden.sum() == pytest.approx(0.75 * tile**2, rel=0.02)
    assert columns[0] > (MARGIN + 96) * SHARP  # right of the input
    seen, filled = (image[top : top + tile, left + n * (tile + 2 * SHARP) :][:, :tile] for n in (0, 1))
    quarter = tile // 2 - 4
    assert (seen[4:quarter, 4:quarter] == 255).all()
    assert (filled[4:quarter, 4:quarter] == 255).all()
    assert (filled[-quarter:-4, 4:quarter] == 0).all()


def test_borrowed_statistics_are_starred(letters):
    paintings([[painted(), painted(uses_target_statistics=True)]], title="t", across=("x", ["1", "2"]))
    assert letters.words().count("painted *") == 2
