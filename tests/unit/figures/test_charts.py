import io

import numpy as np
import pytest
from PIL import Image

from maskray.figures import charts
from maskray.figures.axis import Line

RNG = np.random.default_rng(0)


def pixels(png):
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("num_classes", [0, 1, 10, 37])
def test_a_map_shows_each_class_in_a_colour_or_mark_of_its_own(num_classes):
    points = RNG.normal(size=(400, 2)).astype(np.float32)
    labels = RNG.integers(0, max(1, num_classes), 400)
    classes = [(f"class $ {n}", labels == n) for n in range(num_classes)]
    image = pixels(charts.scatter(points, classes, title="t", axis_names=("x", "y"), note="n"))
    assert image.shape == (720, 960, 3)
    colours = {tuple(c) for c in image.reshape(-1, 3).tolist() if max(c) - min(c) > 60}
    assert len(colours) >= min(num_classes, 20)


def reached(num):
    costs, values = np.sort(RNG.uniform(0.3, 3, num)), RNG.normal(80, 3, num)
    best = int(values.argmax())
    return [
        charts.Reached(
            cost, value, 2.0, f"ratio {cost:.2f} · decoder.depth 4 · " + "long " * 20, f"{value:.1f} ± 2.0 %, 1 TFLOP",
            is_on_front=value >= values[: number + 1].max(), is_partial=number % 3 == 0, is_best=number == best,
        )
        for number, (cost, value) in enumerate(zip(costs.tolist(), values.tolist(), strict=True))
    ]  # fmt: skip


def traded(points, **options):
    names = ("training TFLOP a trial", "accuracy, %")
    return charts.trade_off(points, **{"title": "t", "axis_names": names} | options)


@pytest.mark.parametrize("num", [1, 2, 12, 200])
@pytest.mark.parametrize("stopped", [[], [(0.1, 50.0), (0.001, 20.0)]])
def test_of_a_trade_off_no_letter_is_clipped_or_lies_over_another(num, stopped, letters):
    points = reached(num)
    traded(points, stopped=stopped, note="words " * 50)
    assert letters.misplaced() == []
    assert ("a trial, stopped early" in letters.words()) == bool(stopped)


def test_a_front_of_many_is_numbered_where_there_is_room_and_named_as_far_as_there_is(letters):
    points = [charts.Reached(1 + n / 1000, 80 + n / 1000, name=f"point {n}", is_on_front=True) for n in range(40)]
    traded(points)
    assert letters.misplaced() == []
    named = [words for words in letters.words() if words.startswith("point")]
    assert named == [f"point {n}" for n in range(39, 30, -1)]
    assert "and 31 more" in letters.words()
    numbers = [int(words) for words in letters.words() if words.isdigit()]
    assert 1 in numbers


def test_the_best_is_a_star_of_its_own_colour():
    plain = pixels(traded([charts.Reached(1.0, 80.0), charts.Reached(2.0, 81.0)])).astype(int)
    starred = pixels(traded([charts.Reached(1.0, 80.0), charts.Reached(2.0, 81.0, is_best=True)])).astype(int)

    def yellow(image):
        return int(((image[..., 0] > 240) & (image[..., 2] < 120)).sum())

    assert yellow(plain) == 0 < yellow(starred)


@pytest.mark.parametrize("num", [1, 2, 200])
@pytest.mark.parametrize("names", [[], ["a name", "another long name of a value", "c"]])
def test_of_coloured_points_no_letter_is_clipped_or_lies_over_another(num, names, letters):
    xs = (np.arange(num) % 3).tolist() if names else np.geomspace(1e-5, 1e-1, num).tolist()
    ys = RNG.uniform(0.1, 0.9, num).tolist()
    charts.coloured(
        [charts.Placed(x, y, y, is_best=n == 0) for n, (x, y) in enumerate(zip(xs, ys, strict=True))],
        title="t",
        lines=(Line(xs, names, logarithmic=not names), Line(ys)),
        axis_names=("mask.kind", "mask.ratio"),
        say=lambda value: f"{value:.2f} %",
    )
    assert letters.misplaced() == []
    assert {"best", "mask.kind", "mask.ratio"} <= set(letters.words())
