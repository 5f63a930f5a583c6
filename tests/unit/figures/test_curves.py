import io

import numpy as np
import pytest
from PIL import Image

from maskray.figures.curves import OURS, THEIRS, Across, Beside, Measured, Up, curves

PAPER = Beside(
    "The MAE paper, Fig. 5",
    "ViT-L/16, 800 epochs of ImageNet-1K",
    "accuracy on ImageNet-1K, %",
    {"fine-tuning": [(0.1, 83.0), (0.5, 84.9), (0.9, 83.0)], "linear probe": [(0.1, 54.6), (0.5, 70.0), (0.9, 66.0)]},
)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def measured(xs, half=1.5):
    rng = np.random.default_rng(0)
    means = rng.normal(80, 3, len(xs)).tolist()
    return [
        Measured(x, mean, half, [mean - 1, mean + 1], is_best=mean == max(means))
        for x, mean in zip(xs, means, strict=True)
    ]


def drawn(points, across, **options):
    options = {"title": "Accuracy by ratio", "up": Up("accuracy, %", band=(78.0, 82.0), band_name="noise")} | options
    return curves(points, across=across, **options)


NUMBERS = {
    "two": [0.25, 0.75],
    "twelve": [round(0.3 + 0.05 * n, 2) for n in range(12)],
    "close": [0.5, 0.501, 0.502, 0.9],
    "powers": [1, 2, 4, 8, 16, 32, 64, 1024],
    "tiny": [1e-6, 3e-6, 1e-5, 3e-5, 1e-4],
    "one": [0.75],
    "many": np.geomspace(1e-5, 1e-1, 200).tolist(),
}


@pytest.mark.parametrize("beside", [None, PAPER], ids=["alone", "beside"])
@pytest.mark.parametrize("xs", NUMBERS.values(), ids=NUMBERS)
def test_no_letter_is_clipped_or_lies_over_another(xs, beside, letters):
    drawn(measured(xs), Across("mask.ratio"), beside=beside, about="vit, images of 8 × 8", note="words " * 60)
    assert letters.misplaced() == []
    if len(xs) <= 12:  # ends and best are written, however little room there is
        assert {f"{xs[0]:g}", f"{xs[-1]:g}"} & set(letters.words())


@pytest.mark.parametrize("beside", [None, PAPER], ids=["alone", "beside"])
@pytest.mark.parametrize("names", [["a", "b"], [f"a long name, the {n}th of twelve of them" for n in range(12)]])
def test_names_find_room_however_long_they_are(names, beside, letters):
    drawn(measured(range(len(names))), Across("mask.kind", names=names), beside=beside)
    assert letters.misplaced() == []
    assert sum(words[:6] in {name[:6] for name in names} for words in letters.words()) == len(names)


def test_the_paper_s_curve_stands_apart_with_its_own_scale_and_the_same_piece_of_the_axis(letters):
    image = pixels(drawn(measured([0.25, 0.75]), Across("mask.ratio"), beside=PAPER, about="digits")).astype(int)
    assert {"This sweep", "digits", PAPER.title, PAPER.about, PAPER.scale, "accuracy, %"} <= set(letters.words())

    def columns(colour):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        return (np.abs(image - rgb).sum(axis=2) < 30).any(axis=0).nonzero()[0]

    assert columns(OURS).max() < columns(THEIRS[1]).min()
    where = {words: box for words, box, _ in letters if words in ("0.25", "0.75", "0.1", "0.9")}
    # 0.25 and 0.75 lie a quarter and three quarters into ours, between where 0.1 and 0.9 would be
    ours = (where["0.75"].x0 - where["0.25"].x0) / 0.5
    theirs = (where["0.9"].x0 - where["0.1"].x0) / 0.8
    assert ours / theirs == pytest.approx(440 / 300, rel=0.05)


def test_our_panel_does_not_reach_to_the_paper_s_values(letters):
    drawn([Measured(0.25, 0.1), Measured(0.75, 0.2)], Across("mask.ratio"), up=Up("loss"), beside=PAPER)
    assert "0.10" in letters.words()
    assert "85" in letters.words()


def test_an_interval_that_would_flatten_all_points_is_cut_and_that_is_said(letters):
    points = [Measured(0.5, 80.0, 500.0), Measured(0.75, 81.0, 0.5)]
    drawn(points, Across("mask.ratio"))
    assert "Intervals that leave the panel are longer than is shown." in letters.words()
    ticks = [float(words) for words in letters.words() if words.replace(".", "").replace("−", "").isdigit()]
    assert max(ticks) < 100


def test_a_number_without_a_value_is_on_the_axis_all_the_same(letters):
    drawn(measured([0.5, 0.75]), Across("mask.ratio", empty=[0.25]))
    assert "0.25" in letters.words()


def test_of_a_crowd_no_intervals_are_drawn(letters):
    drawn(measured(np.linspace(0.1, 0.9, 200).tolist(), half=40.0), Across("mask.ratio", is_joined=False))
    assert "one seed" not in letters.words()
    assert "mean" in letters.words()
