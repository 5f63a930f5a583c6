"""Average precision equals what is worked out by hand from COCO's definition."""

import dataclasses

import numpy as np
import pytest

from maskray.evaluation.detection import outlines
from maskray.evaluation.detection.average_precision import Detections, average_precision
from maskray.evaluation.detection.coco import Scene

SIZE = (200, 200)
BOX = (10, 10, 110, 110)
FAR = (120, 120, 190, 190)


def rectangle(box):
    left, top, right, bottom = box
    mask = np.zeros(SIZE, np.uint8)
    mask[top:bottom, left:right] = 1
    return outlines.encode(mask)


def scene(*objects, crowds=()):
    """objects: (box, class)."""
    boxes, classes = np.array([box for box, _ in objects], float).reshape(-1, 4), [class_ for _, class_ in objects]
    crowd = np.array([i in crowds for i in range(len(objects))], bool)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return Scene(1, "a.png", SIZE, boxes, np.array(classes, int), crowd, areas, tuple(rectangle(b) for b, _ in objects))


def found(*detections):
    """detections: (box, class, score)."""
    boxes = np.array([box for box, _, _ in detections], float).reshape(-1, 4)
    return Detections(
        boxes,
        np.array([score for _, _, score in detections]),
        np.array([class_ for _, class_, _ in detections], int),
        tuple(rectangle(box) for box, _, _ in detections),
    )


def judged(scenes, detections, of, names=("a",)):
    return average_precision(scenes, detections, names, of)


@pytest.fixture(params=["box", "mask"])
def of(request):
    return request.param


def test_all_found_is_1(of):
    result = judged(
        [scene((BOX, 0)), scene((FAR, 0), (BOX, 0))], [found((BOX, 0, 0.9)), found((BOX, 0, 0.3), (FAR, 0, 0.5))], of
    )
    assert (result.ap, result.ap50, result.ap75) == (1, 1, 1)
    assert (result.ap_small, result.ap_medium, result.ap_large) == (None, 1, 1)


def test_nothing_found_is_0(of):
    assert judged([scene((BOX, 0))], [found()], of).ap == 0


def test_an_overlap_of_6_tenths_is_right_at_3_thresholds_of_10(of):
    # 100 × 100 and the 60 × 100 of it: 6,000 / 10,000. Right at .50, .55 and .60.
    result = judged([scene((BOX, 0))], [found(((10, 10, 70, 110), 0, 0.9))], of)
    assert result.ap == pytest.approx(0.3)
    assert (result.ap50, result.ap75) == (1, 0)


def test_a_false_one_that_is_less_sure_costs_nothing(of):
    assert judged([scene((BOX, 0))], [found((BOX, 0, 0.9), (FAR, 0, 0.8))], of).ap == 1


def test_a_false_one_that_is_surer_halves_the_precision_at_every_recall(of):
    assert judged([scene((BOX, 0))], [found((BOX, 0, 0.8), (FAR, 0, 0.9))], of).ap == pytest.approx(0.5)


def test_one_of_two_objects_found_is_precise_at_51_recalls_of_101(of):
    result = judged([scene((BOX, 0), (FAR, 0))], [found((BOX, 0, 0.9))], of)
    assert result.ap == pytest.approx(51 / 101)  # recalls 0, .01, … .50


def test_right_then_false_then_right(of):
    # Precision 1 up to recall 1/2, then 2/3: (51 · 1 + 50 · 2/3) / 101.
    scenes = [scene((BOX, 0), (FAR, 0))]
    result = judged(scenes, [found((BOX, 0, 0.9), ((10, 120, 60, 190), 0, 0.8), (FAR, 0, 0.7))], of)
    assert result.ap == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_second_one_on_the_same_object_is_false(of):
    scenes = [scene((BOX, 0), (FAR, 0))]
    result = judged(scenes, [found((BOX, 0, 0.9), (BOX, 0, 0.8), (FAR, 0, 0.7))], of)
    assert result.ap == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_classes_count_alike_and_one_without_objects_not_at_all(of):
    # Class 0: found. Class 1: missed, its place being taken for class 2, which no object has.
    result = judged([scene((BOX, 0), (FAR, 1))], [found((BOX, 0, 0.9), (FAR, 2, 0.9))], of, ("a", "b", "c"))
    assert result.ap == pytest.approx(0.5)
    assert result.by_class == {"a": 1, "b": 0, "c": None}


def test_the_class_must_be_right(of):
    assert judged([scene((BOX, 0))], [found((BOX, 1, 0.9))], of, ("a", "b")).ap == 0


def test_detections_on_a_crowd_are_neither_right_nor_wrong(of):
    # Three surer ones on the crowd would bring the precision down to 1/4.
    scenes = [scene((BOX, 0), (FAR, 0), crowds=[1])]
    on_crowd = [((120, 120, 150, 150), 0, 0.99), ((150, 150, 190, 190), 0, 0.98), ((125, 125, 180, 180), 0, 0.97)]
    assert judged(scenes, [found((BOX, 0, 0.5), *on_crowd)], of).ap == 1
    assert judged([scene((BOX, 0))], [found((BOX, 0, 0.5), *on_crowd)], of).ap == pytest.approx(0.25)


def test_a_crowd_that_is_not_found_is_not_missed(of):
    assert judged([scene((BOX, 0), (FAR, 0), crowds=[1])], [found((BOX, 0, 0.5))], of).ap == 1


def test_detections_are_ranked_over_all_images(of):
    # The surest is false, on an image without objects: it counts before the others.
    scenes = [scene((BOX, 0)), scene()]
    assert judged(scenes, [found((BOX, 0, 0.8)), found((FAR, 0, 0.9))], of).ap == pytest.approx(0.5)


def test_sizes_are_those_of_objects():
    small, large = (10, 10, 40, 40), (60, 60, 190, 190)  # 900 and 16,900 pixels
    result = judged([scene((small, 0), (large, 0))], [found((large, 0, 0.9))], "box")
    assert (result.ap_small, result.ap_medium, result.ap_large) == (0, None, 1)


def test_masks_are_compared_by_their_pixels_and_not_by_their_boxes():
    # A trapezoid of (100 + 15) / 2 × 100 pixels, found as its whole box: 0.575, right at .50 and .55.
    trapezoid = outlines.read([[10, 10, 110, 10, 25, 110, 10, 110]], SIZE)
    truth = dataclasses.replace(scene((BOX, 0)), outlines=(trapezoid,))
    assert judged([truth], [found((BOX, 0, 0.9))], "mask").ap == pytest.approx(0.2)
    assert judged([truth], [found((BOX, 0, 0.9))], "box").ap == 1
