import io

import numpy as np
import pytest
from PIL import Image

from maskray.figures import charts

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
