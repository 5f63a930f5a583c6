"""Boxes and outlines that go into the square and come back are those that the file has."""

import tracemalloc

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from maskray.evaluation.detection import fitting, outlines
from maskray.evaluation.detection.coco import Scene

SIZES = [(480, 640), (640, 480), (100, 100), (33, 517), (1, 64), (3000, 17)]


def scene_of(size, boxes, crowd=(), masks=()):
    boxes = np.array(boxes, float).reshape(-1, 4)
    num = len(boxes)
    return Scene(
        id=1,
        file_name="a.png",
        size_HW=size,
        boxes_N4=boxes,
        classes_N=np.arange(num) % 3,
        crowd_N=np.array(crowd or [False] * num, bool),
        areas_N=np.ones(num),
        outlines=tuple(masks),
    )


def image(size):
    return torch.zeros(3, *size, dtype=torch.uint8)


def as_found(target):
    """As if a detector had found exactly what it was taught."""
    num = len(target.labels_N)
    return {"boxes": target.boxes_N4, "labels": target.labels_N, "scores": torch.ones(num)}


def random_boxes(size, num, seed=0):
    corners = np.random.default_rng(seed).random((num, 2, 2)) * (size[1], size[0])
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


@pytest.mark.parametrize("side", [64, 512, 1000])
@pytest.mark.parametrize("size", SIZES)
def test_boxes_come_back_as_they_were(size, side):
    scene = scene_of(size, random_boxes(size, 50))
    fitted = fitting.fit(image(size), side)
    back = fitting.restored(as_found(fitting.target_of(scene, fitted, masks=False)), fitted)
    np.testing.assert_allclose(back.boxes_N4, scene.boxes_N4, atol=1e-6 * max(size))
    assert back.classes_N.tolist() == scene.classes_N.tolist()


def test_boxes_are_divided_by_scales_as_exact_as_they_are():
    fitted = fitting.fit(image((300, 400)), 640)
    found = {"boxes": torch.tensor([[320.0, 160, 640, 480]]).bfloat16(), "scores": torch.tensor([0.5]).bfloat16()}
    back = fitting.restored(found | {"labels": torch.tensor([1])}, fitted)
    assert back.boxes_N4.tolist() == [[200, 100, 400, 300]]
    assert (back.boxes_N4.dtype, back.scores_N.dtype) == (np.float64, np.float64)


@pytest.mark.parametrize("size", SIZES)
def test_the_longer_side_fills_the_square(size):
    fitted = fitting.fit(image(size), 256)
    assert max(fitted.bytes_Chw.shape[1:]) == 256
    assert fitted.bytes_Chw.dtype == torch.uint8
    assert fitted.stored_HW == size


def test_boxes_inside_the_square_are_where_their_pixels_are():
    pixels = image((200, 400))
    pixels[:, 40:120, 100:300] = 255
    fitted = fitting.fit(pixels, 100)
    target = fitting.target_of(scene_of((200, 400), [[100, 40, 300, 120]]), fitted, masks=False)
    assert target.boxes_N4.tolist() == [[25, 10, 75, 30]]
    bright = fitted.bytes_Chw[0] > 127
    assert bright[10:30, 25:75].all()
    assert bright.sum() == 20 * 50


def test_crowds_are_not_learned_from():
    scene = scene_of((50, 50), [[0, 0, 10, 10], [20, 20, 40, 40]], crowd=[True, False])
    target = fitting.target_of(scene, fitting.fit(image((50, 50)), 50), masks=False)
    assert target.boxes_N4.tolist() == [[20, 20, 40, 40]]
    assert target.labels_N.tolist() == [2]


@pytest.mark.parametrize("masks", [False, True])
def test_an_image_without_objects_teaches_that_there_are_none(masks):
    fitted = fitting.fit(image((30, 60)), 64)
    target = fitting.target_of(scene_of((30, 60), []), fitted, masks=masks)
    plain = target.to(torch.device("cpu"))
    assert plain["boxes"].shape == (0, 4)
    assert plain["labels"].dtype == torch.int64
    assert set(plain) == {"boxes", "labels"} | ({"masks"} if masks else set())
    back = fitting.restored(as_found(target), fitted)
    assert back.boxes_N4.shape == (0, 4)


def test_what_reaches_out_is_cut_off_where_the_image_ends():
    scene = scene_of((50, 100), [[-5, 10, 110, 60]])
    target = fitting.target_of(scene, fitting.fit(image((50, 100)), 200), masks=False)
    assert target.boxes_N4.tolist() == [[0, 20, 200, 100]]


def test_flipped_twice_is_as_it_was():
    mask = np.zeros((40, 80), np.uint8)
    mask[5:20, 10:25] = 1
    pixels = torch.randint(0, 256, (3, 40, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scene = scene_of((40, 80), [[10, 5, 25, 20]], masks=[outlines.encode(mask)])
    fitted = fitting.fit(pixels, 80)
    target = fitting.target_of(scene, fitted, masks=True)
    other, mirrored = fitting.flipped(fitted, target)
    assert mirrored.boxes_N4.tolist() == [[55, 5, 70, 20]]
    assert (mirrored.masks_Nhw[0, 6:20, 56:70] == 1).all()
    assert mirrored.masks_Nhw.sum() == 15 * 15
    assert torch.equal(mirrored.masks_Nhw, fitting.target_of(mirror_of(scene), other, masks=True).masks_Nhw)
    assert torch.equal(other.bytes_Chw[:, :, 55:70], pixels[:, :, 10:25].flip(2))
    again, same = fitting.flipped(other, mirrored)
    assert torch.equal(again.bytes_Chw, fitted.bytes_Chw)
    assert torch.equal(same.boxes_N4, target.boxes_N4)
    assert torch.equal(same.masks_Nhw, target.masks_Nhw)


def mirror_of(scene):
    masks = [outlines.encode(np.ascontiguousarray(outlines.decode(each)[:, ::-1])) for each in scene.outlines]
    return scene_of(scene.size_HW, scene.boxes_N4, masks=masks)


def disc(size, centre, radius):
    """A mask, and its box."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    mask = ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2).astype(np.uint8)
    down, across = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return mask, [across[0], down[0], across[-1] + 1, down[-1] + 1]


def iou(a, b):
    a, b = a.astype(bool), b.astype(bool)
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(("size", "side"), [((60, 80), 80), ((60, 80), 200), ((300, 400), 100), ((333, 222), 97)])
@pytest.mark.parametrize("diameter", [10, 16, 24])
def test_what_a_faultless_mask_head_finds_is_where_the_object_is(size, side, diameter):
    """It gives what torchvision teaches it. The diameter is in pixels of the square."""
    shared = []
    for number in range(12):
        scale = max(size) / side
        rng = np.random.default_rng(number)
        mask, box = disc(size, rng.uniform(0.3, 0.7, 2) * size, diameter * scale / 2)
        fitted = fitting.fit(image(size), side)
        target = fitting.target_of(scene_of(size, [box], masks=[outlines.encode(mask)]), fitted, masks=True)
        taught = project_masks_on_boxes(target.masks_Nhw, target.boxes_N4, torch.zeros(1, dtype=torch.int64), 28)
        (back,) = fitting.restored(as_found(target) | {"masks": taught[:, None]}, fitted).outlines
        shared.append(iou(outlines.decode(back), mask))
    assert np.mean(shared) > {10: 0.95, 16: 0.97, 24: 0.98}[diameter]


def test_masks_are_the_objects_share_of_the_pixel_around_each_corner():
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = tuple(int(each) for each in rng.integers(1, 13, 2))
        mask = (rng.random(size) < 0.5).astype(np.uint8)
        mask[rng.integers(size[0]), rng.integers(size[1])] = 1
        height, width = (int(each) for each in rng.integers(1, 17, 2))
        fitted = fitting.Fitted(image((height, width)), size)
        scene = scene_of(size, [[0, 0, size[1], size[0]]], masks=[outlines.encode(mask)])
        (found,) = fitting.target_of(scene, fitted, masks=True).masks_Nhw.numpy()
        assert found.shape == (height + 1, width + 1)
        parts = mask.repeat(2 * height, 0).repeat(2 * width, 1)  # half a pixel of the square: as many as stored ones
        for row, column in np.ndindex(found.shape):
            around = [
                slice(max(0, (2 * at - 1) * of), (2 * at + 1) * of) for at, of in ((row, size[0]), (column, size[1]))
            ]
            assert found[row, column] == pytest.approx(parts[tuple(around)].mean(), abs=1e-3)


def test_masks_of_a_large_image_are_made_one_by_one():
    size, num = (2000, 3000), 8
    mask, box = disc(size, (1000, 1500), 400)
    scene = scene_of(size, [box] * num, masks=[outlines.encode(mask)] * num)
    fitted = fitting.fit(image(size), 300)
    tracemalloc.start()
    try:
        target = fitting.target_of(scene, fitted, masks=True)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 4 * mask.nbytes
    shares = target.masks_Nhw[0].float()
    assert shares.sum().item() == pytest.approx(mask.sum() / 100, rel=1e-3)
    assert shares.max() == 1


def test_masks_come_back_to_within_a_pixel_of_their_outline():
    rows, columns = np.mgrid[:240, :320]
    mask = ((rows - 100) ** 2 + (columns - 150) ** 2 < 70**2).astype(np.uint8)
    scene = scene_of((240, 320), [[80, 30, 220, 170]], masks=[outlines.encode(mask)])
    fitted = fitting.fit(image((240, 320)), 640)
    target = fitting.target_of(scene, fitted, masks=True)
    assert target.masks_Nhw.shape == (1, 481, 641)
    # What a mask head gives: the object's box as a square of 28 × 28 places.
    box = torch.from_numpy(mask[30:170, 80:220]).float()
    places = torch.nn.functional.interpolate(box[None, None], size=(28, 28), mode="bilinear", antialias=True)
    (back,) = fitting.restored(as_found(target) | {"masks": places}, fitted).outlines
    assert iou(outlines.decode(back), mask) > 0.98
