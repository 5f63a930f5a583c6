"""Many boxes at once come out as torch's own resize makes each alone."""

import numpy as np
import pytest
import torch

from maskray.data.crop import crop_resize
from maskray.data.resize import resize

EDGES = [((1, 1), (8, 8)), ((1, 40), (16, 5)), ((40, 1), (5, 16)), ((7, 9), (1, 5)), ((16, 24), (16, 24))]


def pictures(rng, kind, shape):
    """Noise, black and white alone (where the cubic overshoots most), or slopes."""
    if kind == "noise":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if kind == "extremes":
        return rng.integers(0, 2, shape).astype(np.uint8) * 255
    return np.clip(rng.integers(-9, 10, shape).cumsum(-1) + 128, 0, 255).astype(np.uint8)


def differences(images_BCYX, heights, widths, flips, size):
    """|ours - torch's| for each value of the result, (B, C, H, W) int."""
    boxes_BYCX = torch.from_numpy(images_BCYX).permute(0, 2, 1, 3)
    sides = (torch.from_numpy(v) for v in (heights, widths, flips))
    ours = resize(boxes_BYCX, *sides, size)
    assert (ours.dtype, ours.is_contiguous()) == (torch.uint8, True)
    theirs = [
        crop_resize(torch.from_numpy(image), np.array([0, 0, h, w]), size, flip=bool(flip))
        for image, h, w, flip in zip(images_BCYX, heights, widths, flips, strict=True)
    ]
    return (ours.int() - torch.stack(theirs).int()).abs()


def random_boxes(rng, largest, kind, channels, num=6):
    size = tuple(int(v) for v in rng.integers(2, 65, 2))  # torch itself fails at 1 × 1: an assertion of its own
    heights, widths = rng.integers(1, largest(size[0]), num), rng.integers(1, largest(size[1]), num)
    images = pictures(rng, kind, (num, channels, heights.max(), widths.max()))
    return differences(images, heights, widths, rng.random(num) < 0.5, size)


@pytest.mark.parametrize("kind", ["noise", "extremes", "slopes"])
@pytest.mark.parametrize("channels", [1, 3, 5])  # of five, torch takes another way than of up to four
def test_boxes_up_to_half_as_large_again_are_equal(kind, channels):
    rng = np.random.default_rng(channels)
    for _ in range(40):
        assert random_boxes(rng, lambda side: 3 * side // 2 + 1, kind, channels).max() == 0


@pytest.mark.parametrize("kind", ["noise", "extremes", "slopes"])
def test_larger_boxes_are_off_by_one_in_one_value_of_a_hundred_thousand(kind):
    rng = np.random.default_rng(7)
    off = torch.cat([random_boxes(rng, lambda _: 400, kind, 3).flatten() for _ in range(60)])
    assert off.max() <= 1
    assert (off > 0).double().mean() <= 2e-5


@pytest.mark.parametrize(("box", "size"), EDGES)
def test_edges(box, size):
    images = pictures(np.random.default_rng(0), "noise", (2, 3, *box))
    heights, widths = np.array([box[0]] * 2), np.array([box[1]] * 2)
    assert differences(images, heights, widths, np.array([False, True]), size).max() == 0


def test_what_stands_behind_a_box_does_not_matter():
    rng = np.random.default_rng(1)
    boxes = torch.from_numpy(pictures(rng, "noise", (2, 9, 3, 11)))
    changed = boxes.clone()
    changed[0, 5:], changed[0, :, :, 4:] = 255, 0
    heights, widths, flips = torch.tensor([5, 9]), torch.tensor([4, 11]), torch.tensor([False, True])
    assert torch.equal(resize(boxes, heights, widths, flips, (8, 8)), resize(changed, heights, widths, flips, (8, 8)))
