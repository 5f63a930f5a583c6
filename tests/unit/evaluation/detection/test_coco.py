"""COCO's format is read as it is written; what is wrong in it is set aside with why, what is no such data refused."""

import json

import numpy as np
import pytest

from maskray.data.storage import Storage
from maskray.errors import DataError
from maskray.evaluation.detection import coco, outlines

IMAGES = [
    {"id": 7, "file_name": "b.png", "width": 40, "height": 20},
    {"id": 3, "file_name": "below/a.png", "width": 10, "height": 30},
]
CATEGORIES = [{"id": 90, "name": "cat"}, {"id": 4, "name": "dog"}]
NESTED = 100_000 * "[" + 100_000 * "]"
SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


def annotation(number=1, image_id=7, category_id=90, bbox=(2, 2, 6, 6), **others):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), "iscrowd": 0} | others


def written(place, found, images=IMAGES, categories=CATEGORIES, files=("b.png", "below/a.png")):
    """Paths or URIs of annotations and of the folder of images."""
    storage = Storage(place)
    for name in files:
        storage.write_bytes(f"images/{name}", b"an image")
    content = {"images": images, "annotations": found, "categories": categories}
    storage.write_bytes("found.json", json.dumps(content).encode())
    return storage.join("found.json"), storage.join("images")


@pytest.fixture
def read(tmp_path):
    """read(annotations, …) -> CocoSet."""

    def run(found, masks=False, max_images=None, **files):
        places = written(str(tmp_path), found, **files)
        return coco.read(*places, key="data.train", masks=masks, max_images=max_images)

    return run


def test_boxes_are_corners_and_classes_places_in_the_list_by_id(read):
    found = read([annotation(), annotation(2, 3, 4, (1.5, 0, 2.25, 30), area=12.5), annotation(3, iscrowd=1)])
    assert [each.name for each in found.categories] == ["dog", "cat"]
    a, b = found.scenes
    assert (a.id, a.file_name, a.size_HW) == (3, "below/a.png", (30, 10))
    assert a.boxes_N4.tolist() == [[1.5, 0, 3.75, 30]]
    assert (a.classes_N.tolist(), a.areas_N.tolist()) == ([0], [12.5])
    assert (b.classes_N.tolist(), b.areas_N.tolist(), b.crowd_N.tolist()) == ([1, 1], [36, 36], [False, True])
    assert found.num_objects == 2
    assert found.set_aside == ()


def test_a_bucket_is_as_good_as_a_folder(place):
    found = coco.read(*written(place, [annotation()]), key="data.train", masks=False)
    assert found.images.read_bytes(found.scenes[0].file_name) == b"an image"
    with pytest.raises(DataError, match=r"without c/b\.png"):
        coco.read(*written(place, [annotation()], images=[IMAGES[0] | {"file_name": "c/b.png"}]), key="k", masks=False)


def test_an_image_without_objects_stays(read):
    found = read([annotation()])
    assert [len(each.boxes_N4) for each in found.scenes] == [0, 1]
    assert found.scenes[0].boxes_N4.shape == (0, 4)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (annotation(9, bbox=(2, 2, 0, 6)), "no size"),
        (annotation(9, bbox=(2, 2, 6, -1)), "no size"),
        (annotation(9, bbox=(40, 2, 6, 6)), "outside"),
        (annotation(9, bbox=(2, -9, 6, 8)), "outside"),
        (annotation(9, bbox=(2, 2, 6)), "four finite numbers"),
        (annotation(9, bbox=(2, 2, 6, float("nan"))), "four finite numbers"),
        (annotation(9, bbox=(2, 2, 6, "6")), "four finite numbers"),
        ({"id": 9, "image_id": 7, "category_id": 90}, "four finite numbers"),
        (annotation(9, bbox=(2, 2, 6, float("inf"))), "four finite numbers"),
        (annotation(9, bbox=(2, 2, 6, 10**400)), "four finite numbers"),
        (annotation(9, image_id=8), "no such image"),
        (annotation(9, image_id=float("inf")), "no such image"),
        (annotation(9, iscrowd="0"), "neither 0 nor 1"),
        (annotation(9, iscrowd=2), "neither 0 nor 1"),
        (annotation(9, iscrowd=[1]), "neither 0 nor 1"),
        (annotation(9, iscrowd=None), "neither 0 nor 1"),
        (annotation(9, image_id=[7]), "no such image"),
        (annotation(9, category_id=1), "no such category"),
    ],
)
def test_what_cannot_be_used_is_set_aside_and_told(read, wrong, why):
    found = read([annotation(), wrong])
    assert found.num_objects == 1
    ((key, what, reason),) = found.set_aside
    assert (key, what) == ("data.train", "annotation 9")
    assert why in reason


def test_a_crowd_is_said_by_a_number_or_a_truth_value(read):
    others = [annotation(2, iscrowd=True), annotation(3, iscrowd=False), annotation(4, iscrowd=1)]
    missing = {name: value for name, value in annotation(5).items() if name != "iscrowd"}
    (_, scene) = read([annotation(), *others, missing]).scenes
    assert scene.crowd_N.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("area", [0, -1, float("nan"), float("inf"), 10**400, "12", None])
def test_an_area_that_is_none_is_the_outlines_or_the_boxs(read, area):
    found = [annotation(area=area, bbox=(2, 2, 6, 8), segmentation=SQUARE)]
    assert read(found).scenes[1].areas_N.tolist() == [48]
    assert read(found, masks=True).scenes[1].areas_N.tolist() == [36]


def test_an_area_may_be_larger_than_any_coordinate(read):
    assert read([annotation(area=4e6)]).scenes[1].areas_N.tolist() == [4e6]


def test_what_is_no_annotation_at_all_has_its_number(read):
    assert [each.what for each in read([annotation(), 5]).set_aside] == ["annotation number 2"]


def test_a_box_that_reaches_out_is_kept_as_it_is_and_cut_off_for_training(read):
    (_, scene) = read([annotation(bbox=(-3, 5, 50, 15.02))]).scenes
    assert scene.boxes_N4.tolist() == [[-3, 5, 47, 20.02]]
    assert scene.clipped_boxes.tolist() == [[0, 5, 40, 20]]


def test_outlines_are_polygons_or_run_lengths(read):
    mask = np.zeros((20, 40), np.uint8)
    mask[3:9, 5:30] = 1
    letters = outlines.encode(mask)["counts"].decode()
    plain = [5 * 20 + 3, *([6, 14] * 24), 6, 11 + 10 * 20]
    found = read(
        [
            annotation(1, segmentation=SQUARE),
            annotation(2, segmentation={"size": [20, 40], "counts": letters}),
            annotation(3, segmentation={"size": [20, 40], "counts": plain}, iscrowd=1),
        ],
        masks=True,
    )
    square, *rest = (outlines.decode(each) for each in found.scenes[1].outlines)
    assert square.sum() == 36
    assert square[2:8, 2:8].all()
    assert all(np.array_equal(each, mask) for each in rest)


@pytest.mark.parametrize(
    ("segmentation", "why"),
    [
        (None, "no outline"),
        ([], "no outline"),
        ("letters", "no outline"),
        ([[1, 2, 3, 4]], "three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three points"),
        ([[1, 2, 3, 4, 5, 1e9]], "three points"),
        ([[1, 2, 3, 4, 5, float("nan")]], "three points"),
        ([[1, 2, 3, 4, 5, 10**400]], "three points"),
        ([[1, 1, 1, 1, 1, 1]], "no pixel"),
        ({"size": [20, 40], "counts": [10**400]}, "damaged"),
        ({"size": [40, 20], "counts": [800]}, "of an image of [40, 20]"),
        ({"size": [20, 40], "counts": [800]}, "no pixel"),
        ({"size": [20, 40], "counts": [10, 5]}, "damaged"),
        ({"size": [20, 40], "counts": [900, -100]}, "damaged"),
        ({"size": [20, 40], "counts": "PPPPPPPPPPPP"}, "damaged"),
        ({"size": [20, 40], "counts": "0~"}, "damaged"),
        ({"size": [20, 40], "counts": "é"}, "damaged"),
        ({"size": [20, 40], "counts": None}, "damaged"),
        ({"size": [20, 40], "counts": [1.5, "x"]}, "damaged"),
        ({"size": [20, 40]}, "damaged"),
        ({"size": [20, 40], "counts": "000"}, "damaged"),
    ],
)
def test_a_damaged_outline_is_set_aside(read, segmentation, why):
    found = read([annotation(segmentation=SQUARE), annotation(9, segmentation=segmentation)], masks=True)
    ((key, what, reason),) = found.set_aside
    assert (key, what) == ("data.train", "annotation 9")
    assert why in reason
    assert len(found.scenes[1].outlines) == len(found.scenes[1].boxes_N4) == 1


def test_run_lengths_are_read_as_the_library_writes_them():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = tuple(int(each) for each in rng.integers(1, 60, 2))
        mask = (rng.random(size) < rng.random()).astype(np.uint8)
        mask[0, 0] = 1
        assert np.array_equal(outlines.decode(outlines.read(outlines.encode(mask), size)), mask)


def test_the_first_images_by_id_alone(read):
    found = read([annotation(1, 3), annotation(2, 7)], max_images=1, files=("below/a.png",))
    assert [each.id for each in found.scenes] == [3]
    assert found.num_objects == 1
    assert found.set_aside == ()


def test_an_image_that_is_not_there_is_named(read):
    with pytest.raises(DataError, match=r"data\.train: 1 images are not there.*below/a\.png.*What to do"):
        read([annotation()], files=("b.png",))


@pytest.mark.parametrize("found", [[], [annotation(iscrowd=1)], [annotation(bbox=(1, 1, 0, 0))]])
def test_no_object_at_all_is_refused(read, found):
    with pytest.raises(DataError, match=r"data\.train: there is no object"):
        read(found)


def test_why_none_is_left_is_told(read):
    with pytest.raises(DataError, match="2 set aside: its box has no size"):
        read([annotation(bbox=(1, 1, 0, 0)), annotation(2, bbox=(1, 1, 0, 3))])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "no JSON"),
        ("[]", "a list"),
        ("{}", "no list of images"),
        ({"images": IMAGES, "categories": CATEGORIES}, "no list of annotations"),
        ({"images": [{"id": 1}], "annotations": [], "categories": CATEGORIES}, "an image without id, file_name"),
        ({"images": IMAGES * 2, "annotations": [], "categories": CATEGORIES}, "two images of one id"),
        ({"images": [IMAGES[0] | {"width": 0}], "annotations": [], "categories": CATEGORIES}, "without pixels: b.png"),
        (NESTED, "no JSON"),
        (f'{{"images": [], "annotations": {NESTED}, "categories": []}}', "no JSON"),
        (
            {"images": [IMAGES[0] | {"id": float("inf")}], "annotations": [], "categories": CATEGORIES},
            "an image without",
        ),
        (
            {"images": [IMAGES[0] | {"width": 1e999}], "annotations": [], "categories": CATEGORIES},
            "an image without id",
        ),
        ({"images": [IMAGES[0] | {"width": 10**400}], "annotations": [], "categories": CATEGORIES}, "a million.*b.png"),
        ({"images": [IMAGES[0] | {"file_name": None}], "annotations": [], "categories": CATEGORIES}, "None is no text"),
        ({"images": IMAGES, "annotations": [], "categories": [{"id": 1, "name": None}]}, "None is no text"),
        ({"images": IMAGES, "annotations": [], "categories": [{"id": 1e999, "name": "y"}]}, "a category without id"),
        ({"images": IMAGES, "annotations": [], "categories": [*CATEGORIES, {"id": 5, "name": "cat"}]}, "one name: cat"),
        ({"images": IMAGES, "annotations": [], "categories": []}, "no category"),
        ({"images": IMAGES, "annotations": [], "categories": [{"id": "x", "name": "y"}]}, "a category without id"),
        ({"images": IMAGES, "annotations": [], "categories": CATEGORIES * 2}, "two categories of one id"),
    ],
)
def test_what_is_not_cocos_format_is_refused(tmp_path, content, why):
    file = tmp_path / "found.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=f"data.val: the file is not in COCO's format.*{why}"):
        coco.read(str(file), str(tmp_path), key="data.val", masks=False)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no such file of annotations"):
        coco.read(str(tmp_path / "none.json"), str(tmp_path), key="data.val", masks=False)


def test_other_categories_in_validation_are_refused(read):
    train = read([annotation()])
    val = read([annotation()], categories=[CATEGORIES[0], {"id": 4, "name": "horse"}])
    coco.check_alike(train, train, key="data.val")
    with pytest.raises(DataError, match=r"data\.val: .*differ.*4 dog in .* alone and 4 horse in .* alone"):
        coco.check_alike(train, val, key="data.val")
