"""Detection as an evaluation of a model: from the config to the table, MLflow and figures; and what is refused."""

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import cutouts
from maskray import cli
from maskray.appraisal import appraise_here, prepare
from maskray.config.evaluation import EvaluateConfig
from maskray.config.load import dump, merge, parse
from maskray.config.schema import RunConfig
from maskray.errors import CheckpointError, ConfigError, DataError
from maskray.evaluation.detection.course import Detection
from maskray.evaluation.detection.outcome import check_images, open_sets
from maskray.models.build import build_model
from maskray.models.encoder import save_encoder
from maskray.models.normalize import Normalize

from .conftest import SIDE, encoder_of

RUN = {
    "name": "cutouts",
    "data": {"path": "unset", "image_size": SIDE, "channels": 3},
    "optim": {"global_batch": 64, "steps": 1},
    "model": {"patch": 8, "width": 32, "depth": 1, "heads": 2, "decoder": {"width": 16, "depth": 1, "heads": 2}},
}


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    run = parse(RunConfig, RUN)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(run.model, (SIDE, SIDE), 3)
        with torch.no_grad():  # another than the one that `untrained` begins with
            model.patch_embed.proj.weight.mul_(2)
    save_encoder(folder, model, Normalize([0.4] * 3, [0.25] * 3), run)
    return folder


def written(folder, num, seed, sides=(SIDE, SIDE)):
    """`train` and `val`, as a config says them, of files of the same names."""
    for part, (name, side) in enumerate(zip(("train", "val"), sides, strict=True)):
        cutouts.write(folder / name, num, seed=seed, side=side, part=part)
    return {
        name: {"annotations": str(folder / name / "annotations.json"), "images": str(folder / name / "images")}
        for name in ("train", "val")
    }


@pytest.fixture
def config(small, encoder_folder, tmp_path):
    """config(detection, **values) -> EvaluateConfig of detection alone."""

    def build(detection=None, **values):
        evaluation = small(epochs=0.8, **(detection or {})).model_dump(mode="json")
        plain = {
            "name": "found",
            "model": str(encoder_folder),
            "evaluations": [evaluation],
            "storage": {"path": str(tmp_path / "runs")},
        }
        return parse(EvaluateConfig, merge(plain, values))

    return build


def test_a_model_and_the_same_from_scratch_without_any_other_data(config):
    found = appraise_here(prepare(config({"masks": True, "figure_images": 4})))
    assert [(each.features, each.precision.of) for each in found.detections] == [
        ("model", "box"),
        ("model", "mask"),
        ("untrained", "box"),
        ("untrained", "mask"),
    ]
    assert {(each.num_images, each.num_steps) for each in found.detections} == {(7, 2)}
    names = {name for name in found.metrics() if name.endswith(("/ap", "/ap50", "/ap75", "untrained"))}
    assert names >= {
        f"evaluation/found/detection/{of}/{name}{whose}"
        for of in ("box", "mask")
        for name in ("ap", "ap50", "ap75")
        for whose in ("", "/untrained")
    }
    assert set(found.figures) == {"detection_model", "detection_untrained"}
    assert Image.open(BytesIO(found.figures["detection_model"])).size[0] > 3 * 256
    assert (found.dataset, found.num_test) == (None, 0)
    assert "| mask, untrained |" in found.markdown()
    assert found.markdown().startswith("Average precision in % on 7 images")
    assert json.loads(found.dump())["detections"][0]["precision"]["of"] == "box"


def test_what_was_trained_before_is_not_trained_again(config, monkeypatch):
    first = appraise_here(prepare(config()))
    monkeypatch.setattr(
        "maskray.evaluation.detection.course.DetectionCourse.step", lambda *_: pytest.fail("it was trained again")
    )
    assert appraise_here(prepare(config())).detections == first.detections
    widths = []
    for num in (1, 2, 4):  # nothing is learned by it, and more are drawn than the first time
        again = appraise_here(prepare(config({"figure_images": num})))
        assert again.detections == first.detections
        widths.append(Image.open(BytesIO(again.figures["detection_model"])).size[0])
    assert widths[0] < widths[1] < widths[2]


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("changed", ["annotations", "an image"])
def test_data_that_changed_are_trained_on_anew(small, tmp_path, name, changed):
    data = written(tmp_path, num=3, seed=4)
    file, image = tmp_path / name / "annotations.json", tmp_path / name / "images" / "00002.png"

    def fingerprint():
        evaluation = small(**data)
        return Detection(evaluation, *open_sets(evaluation), {"model": encoder_of("vit")}, 0).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    if changed == "annotations":
        content = json.loads(file.read_text())
        content["annotations"].pop()
        file.write_text(json.dumps(content))
    else:
        image.write_bytes((tmp_path / name / "images" / "00001.png").read_bytes())
    assert fingerprint() != before


def test_the_command_shows_it_and_writes_it(config, tmp_path, capsys):
    path = tmp_path / "evaluate.yaml"
    path.write_text(dump(config({"masks": True})))
    out = tmp_path / "out"
    assert cli.main(["evaluate", "--config", str(path), "--launcher", "torch", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Average precision in % on 7 images" in printed
    assert "box: AP50" in printed
    assert "mask: AP75" in printed
    assert (out / "detection_model.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "found.json").read_text())["detections"]


def test_what_is_set_aside_is_counted_and_listed(config, tmp_path, capsys):
    """Training and validation have files and numbers of the same names, and a number may stand there twice."""
    from maskray.cli.evaluate import show

    data = written(tmp_path, num=4, seed=2)
    for name in data:
        file = tmp_path / name / "annotations.json"
        content = json.loads(file.read_text())
        damaged = content["annotations"][0] | {"bbox": [0, 0, 0, 5]}
        content["annotations"] += [damaged, damaged] if name == "train" else [damaged]
        file.write_text(json.dumps(content))
        (tmp_path / name / "images" / "00002.png").write_bytes(b"no image")
    found = appraise_here(prepare(config(data)))  # two detectors, that see the same images
    assert [(each.key, each.what) for each in found.set_aside] == [
        ("evaluations.train", "annotation 1"),
        ("evaluations.train", "annotation 1"),
        ("evaluations.train", "image 00002.png"),
        ("evaluations.val", "annotation 1"),
        ("evaluations.val", "image 00002.png"),
    ]
    show(found)
    assert "detection: 3 annotations or images set aside: its box has no size" in capsys.readouterr().out
    assert [each["key"] for each in json.loads(found.dump())["set_aside"]] == [each.key for each in found.set_aside]


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"image_size": 60}, ConfigError, r"evaluations\.image_size.*60.*multiples of 32"),
        ({"train": {"annotations": "none.json", "images": "."}}, DataError, r"evaluations\.train: there is no such"),
        ({"val": {"annotations": "none.json", "images": "."}}, DataError, r"evaluations\.val: there is no such"),
    ],
)
def test_mistakes_are_said_before_anything_starts(config, values, error, match):
    with pytest.raises(error, match=match):
        prepare(config(values))


def test_what_is_cheap_to_see_is_said_before_annotations_are_read(config, monkeypatch):
    monkeypatch.setattr("maskray.evaluation.detection.outcome.read", lambda *_, **__: pytest.fail("they were read"))
    with pytest.raises(ConfigError, match="image_size"):
        prepare(config({"image_size": 60}))
    with pytest.raises(CheckpointError, match="nowhere"):
        prepare(config(model="nowhere"))


@pytest.mark.parametrize("name", ["train", "val"])
def test_images_that_are_not_those_of_the_annotations_are_refused(config, tmp_path, name):
    data = written(tmp_path, num=12, seed=4)
    cutouts.write(tmp_path / "thumbnails", 12, seed=4, side=60)
    match = rf"evaluations\.{name}: none of 8 images.*00001\.png: it has 60 × 60 pixels.*for 64 × 64.*What to do"
    wrong = data | {name: data[name] | {"images": str(tmp_path / "thumbnails" / "images")}}
    with pytest.raises(DataError, match=match):
        prepare(config(wrong))
    for file in sorted((tmp_path / name / "images").iterdir())[1:]:  # one that is right will do
        file.write_bytes(b"no image")
    prepare(config(data))


def test_images_of_other_bands_than_the_encoder_takes_are_refused(read, small):
    with pytest.raises(DataError, match=r"evaluations\.train: none of 8 images.* 3 bands, 4 are asked for"):
        check_images(read(small())[0], channels=4)


def test_other_categories_in_validation_are_refused(config, tmp_path):
    data = written(tmp_path, num=3, seed=4)
    file = tmp_path / "val" / "annotations.json"
    file.write_text(file.read_text().replace("digit 4", "digit 5"))
    with pytest.raises(DataError, match=r"evaluations\.val: the categories.*14 digit 4 in .* and 14 digit 5 in"):
        prepare(config(data))


def test_images_that_are_learned_from_do_not_judge(config, small, tmp_path):
    data = written(tmp_path, num=4, seed=4)
    with pytest.raises(DataError, match=r"evaluations\.val: 4 images are for training and for val.*00001\.png.*What"):
        prepare(config(data | {"val": data["train"]}))
    file = tmp_path / "some.json"
    content = json.loads((tmp_path / "train" / "annotations.json").read_text())
    file.write_text(json.dumps(content | {"images": content["images"][3:]}))
    some = {"annotations": str(file), "images": str(tmp_path / "train" / ".." / "train" / "images")}
    with pytest.raises(DataError, match="1 images are for training and for validation"):
        open_sets(small(**data | {"val": some}))
    open_sets(small(train=data["train"] | {"max_images": 3}, val=some))


def test_other_evaluations_want_their_data(config):
    plain = config().model_dump(mode="json")
    plain["evaluations"].append({"kind": "knn"})
    with pytest.raises(ConfigError, match="data must be given: knn"):
        parse(EvaluateConfig, plain)


def test_without_the_extra_it_is_said_what_to_install(config, monkeypatch):
    monkeypatch.setattr("maskray.evaluation.detection.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"an extra.*faster_coco_eval.*pip install 'maskray\[detection\]'"):
        prepare(config())


def test_classes_that_cannot_be_learned_are_a_warning(small, tmp_path, caplog):
    data = written(tmp_path, num=6, seed=3)
    file = tmp_path / "train" / "annotations.json"
    content = json.loads(file.read_text())
    judged = json.loads((tmp_path / "val" / "annotations.json").read_text())["annotations"][0]["category_id"]
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] != judged]
    file.write_text(json.dumps(content))
    open_sets(small(**data))
    assert f"1 classes have objects to find and none to learn from: digit {judged - 10}" in caplog.text


def test_figures_show_boxes_where_they_are(config):
    from maskray.evaluation.detection.outcome import _boxed

    prepared = prepare(config())
    val = prepared.coco[1]
    scene = val.scenes[0]
    drawn = {"row": 0, "boxes": scene.boxes_N4.tolist(), "scores": [0.9] * len(scene.boxes_N4)}
    boxed = _boxed(val, 3, drawn | {"classes": scene.classes_N.tolist()})
    assert boxed.image_HWC.shape == (256, 256, 3)
    np.testing.assert_allclose([box for box, _ in boxed.true], 4 * scene.boxes_N4)
    np.testing.assert_allclose([box for box, _, _ in boxed.found], 4 * scene.boxes_N4)
    unsure = _boxed(val, 3, drawn | {"classes": scene.classes_N.tolist(), "scores": [0.4] * len(scene.boxes_N4)})
    assert unsure.found == []
