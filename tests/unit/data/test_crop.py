"""Boxes, flips and sizes."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from maskray import draws
from maskray.config.schema import RandomResizedCrop, WholeImage
from maskray.data.crop import crop_resize, draw_boxes, draw_flips
from maskray.data.decode import decode


@pytest.mark.parametrize("channels", [1, 3])
def test_a_box_of_the_right_size_is_cut_out_exactly(picture, encoded, channels):
    image = decode(encoded(picture(9)), channels)
    assert torch.equal(crop_resize(image, np.array([0, 0, 24, 32]), (24, 32), flip=False), image)
    assert torch.equal(crop_resize(image, np.array([3, 4, 8, 9]), (8, 9), flip=False), image[:, 3:11, 4:13])
    assert torch.equal(crop_resize(image, np.array([3, 4, 8, 9]), (8, 9), flip=True), image[:, 3:11, 4:13].flip(-1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (40, 50)])
def test_resizing_is_bicubic_antialiased_whatever_the_memory_format(picture, encoded, channels, size):
    image = decode(encoded(picture(10), "JPEG"), channels)
    box = np.array([2, 3, 20, 25])
    expected = transforms.resized_crop(
        image.contiguous(), 2, 3, 20, 25, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    last = image[None].contiguous(memory_format=torch.channels_last)[0]
    for layout in (image, image.contiguous(), last):
        out = crop_resize(layout, box, size, flip=False)
        assert out.dtype == torch.uint8
        assert torch.equal(out, expected)


# -------------------------------------------------------------------------------------------------------------- boxes


def reference_box(height, width, scale, aspect, uniform):
    """torchvision's RandomResizedCrop.get_params, one image at a time, with given random numbers."""
    for u_area, u_aspect, u_top, u_left in uniform:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        ratio = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * u_aspect)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w]
    if width / height < aspect[0]:
        w, h = width, round(width / aspect[0])
    elif width / height > aspect[1]:
        w, h = round(height * aspect[1]), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("crop", [RandomResizedCrop(), RandomResizedCrop(scale=(0.9, 1.0), aspect=(0.5, 2.0))])
def test_boxes_are_torchvisions(crop):
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, 400, (400, 2)), [[1, 1], [1, 400], [400, 1], [10, 300], [300, 10]]])
    rows = np.arange(len(sizes))
    boxes = draw_boxes(crop, sizes, seed=3, pass_=2, rows=rows, views=rows * 0 + 1)
    uniform = draws.uniform(seed=3, stream=draws.Stream.CROP, pass_=2, row=rows, view=1, num=40).reshape(-1, 10, 4)
    expected = [
        reference_box(*s, crop.scale, crop.aspect, u) for s, u in zip(sizes.tolist(), uniform.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(boxes, expected)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


def test_a_box_depends_on_its_own_row_view_and_pass_alone():
    sizes, rows = np.full((6, 2), 50), np.array([4, 4, 9, 10**6, 2**33, 5])
    views = np.array([0, 1, 0, 2, 0, 1])
    together = draw_boxes(RandomResizedCrop(), sizes, seed=1, pass_=3, rows=rows, views=views)
    for i in range(6):
        at = slice(i, i + 1)
        alone = draw_boxes(RandomResizedCrop(), sizes[at], seed=1, pass_=3, rows=rows[at], views=views[at])
        np.testing.assert_array_equal(alone, together[at])
    assert len({tuple(b) for b in together.tolist()}) == 6
    later = draw_boxes(RandomResizedCrop(), sizes, seed=1, pass_=4, rows=rows, views=views)
    assert (later != together).any(axis=1).all()


def test_whole_images_have_whole_boxes():
    sizes = np.array([[3, 4], [5, 6]])
    boxes = draw_boxes(WholeImage(), sizes, seed=0, pass_=0, rows=np.arange(2), views=np.zeros(2, int))
    np.testing.assert_array_equal(boxes, [[0, 0, 3, 4], [0, 0, 5, 6]])


def test_flips_have_their_probability():
    rows = np.arange(4000)
    for probability in (0.0, 0.25, 1.0):
        flips = draw_flips(probability, seed=0, pass_=0, rows=rows, views=rows * 0)
        assert flips.dtype == np.bool_
        assert abs(flips.mean() - probability) <= (0.03 if 0 < probability < 1 else 0)
