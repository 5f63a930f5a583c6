"""A detector's training: the same images on any number of workers, the same bits however often it is left."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import cutouts
from maskray.config.evaluation import DetectionEvaluation
from maskray.data.storage import Storage
from maskray.errors import DataError, NonFiniteError, StorageError
from maskray.evaluation.detection.course import MOST_DRAWN, Detection, step_rows
from maskray.training.context import LocalWorkerContext
from maskray.training.courses import run_all

from .conftest import data_of, encoder_of


@pytest.fixture
def course(small, read, tmp_path):
    """course(kind, …) -> DetectionCourse, one of `world_size` workers."""

    def build(kind="vit", seed=0, rank=0, world_size=1, sets=None, **values):
        config = small(**values)
        asked = Detection(config, *(sets or read(config)), {"model": encoder_of(kind)}, seed)
        context = LocalWorkerContext(tmp_path / "run", rank=rank, world_size=world_size)
        return asked("model", context)

    return build


def weights(course):
    return {name: each.clone() for name, each in course.detector.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_pass_has_each_image_once_in_an_order_of_its_own():
    taken = [step_rows(10, 4, number, seed=0) for number in range(10)]
    rows, passes = (np.concatenate(each) for each in zip(*taken, strict=True))
    orders = [rows[passes == each].tolist() for each in range(4)]
    assert [sorted(order) for order in orders] == [list(range(10))] * 4
    assert len({tuple(order) for order in orders}) == 4
    assert step_rows(10, 4, 3, seed=1)[0].tolist() != taken[3][0].tolist()


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_workers_share_the_images_of_a_step(course, world_size):
    alone = course(flip_probability=0.5)
    workers = [course(flip_probability=0.5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for number in range(4):
        asked = alone._share(number)
        shared = [each for worker in workers for each in worker._share(number)]
        assert sorted(map(repr, shared)) == sorted(map(repr, asked))
    assert {each.flip for number in range(4) for each in alone._share(number)} == {False, True}


def test_a_step_of_more_images_than_there_are_has_them_twice(course, monkeypatch):
    each = course(batch=25, epochs=5)
    seen = []
    monkeypatch.setattr(each, "_backward", lambda taught: seen.append(len(taught)))
    each.step(0)
    assert seen == [25]


def test_a_duration_in_epochs_is_one_in_steps(course):
    assert course(epochs=3).total_steps == 8  # 30 images of 4 a step
    assert course(epochs=0.01).total_steps == 1


@pytest.mark.parametrize("kind", ["vit", "ResNet"])
def test_left_in_the_middle_and_taken_up_again_it_ends_with_the_same_bits(course, tmp_path, kind):
    whole = course(kind, masks=kind == "vit")
    for number in range(4):
        whole.step(number)
    first = course(kind, masks=kind == "vit")
    for number in range(2):
        first.step(number)
    torch.save(first.state(), tmp_path / "state.pt")
    again = course(kind, masks=kind == "vit")
    again.load(torch.load(tmp_path / "state.pt", weights_only=True))
    for number in range(2, 4):
        again.step(number)
    assert same(weights(whole), weights(again))
    assert not same(weights(whole), weights(first))
    assert whole.result() == again.result()


def test_it_is_the_same_each_time_and_another_with_another_seed(course):
    ends = []
    for seed in (0, 0, 1):
        each = course(seed=seed)
        each.step(0)
        each.step(1)
        ends.append(weights(each))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_nobodys_generator_is_touched(course):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002  (the global one is what must not be touched)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    each = course(masks=True)
    each.step(0)
    each.result()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("kind", ["vit", "conv", "ResNet"])
def test_layers_learn_the_slower_the_nearer_they_are_to_the_pixels(course, kind):
    each = course(kind, layer_decay=0.5, warmup_fraction=0)
    each.step(0)
    rates = sorted({group["lr"] for group in each.optimizer.param_groups})
    assert rates[-1] == pytest.approx(3e-2 * 4 / 256)
    assert [b / a for a, b in pairwise(rates)] == pytest.approx([2] * (len(rates) - 1))
    assert len(rates) >= 3
    grouped = sorted(id(p) for group in each.optimizer.param_groups for p in group["params"] if p.requires_grad)
    assert grouped == sorted(id(p) for p in each.detector.parameters() if p.requires_grad)
    rate_of = {id(p): group["lr"] for group in each.optimizer.param_groups for p in group["params"]}
    assert {rate_of[id(p)] for p in each.detector.roi_heads.parameters()} == {rates[-1]}
    assert rate_of[id(next(each.detector.backbone.encoder.parameters()))] < rates[-1]


def test_running_statistics_of_batch_normalisation_follow(course):
    each = course("ResNet")
    before = weights(each)
    each.step(0)
    moved = [n for n, v in weights(each).items() if n.endswith("running_mean") and not torch.equal(v, before[n])]
    assert len(moved) == len([name for name in before if name.endswith("running_mean")])


def test_a_result_has_all_that_is_reported(course):
    found = course(masks=True).result()
    assert [each["of"] for each in found["precisions"]] == ["box", "mask"]
    assert set(found["precisions"][0]["by_class"]) == {f"digit {digit}" for digit in cutouts.DIGITS}
    assert found["num_images"] == 7
    assert [each["row"] for each in found["drawn"]] == list(range(7))
    assert found["set_aside"] == {"evaluations.train": {}, "evaluations.val": {}}


def test_no_outline_is_drawn_for_images_that_judge(course, monkeypatch):
    each = course(masks=True)
    monkeypatch.setattr("maskray.evaluation.detection.fitting._draw", lambda *_: pytest.fail("nobody reads it"))
    assert each.result()["num_images"] == 7


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_each_validation_image_is_looked_at_by_one_worker(course, world_size):
    alone = course(masks=True)._found()
    shares = [course(masks=True, rank=rank, world_size=world_size)._found() for rank in range(world_size)]
    assert sorted(row for share in shares for row in share) == sorted(alone) == list(range(7))
    for share in shares:
        for row, found in share.items():
            np.testing.assert_allclose(found.scores_N, alone[row].scores_N, atol=1e-5)
            assert len(found.outlines) == len(found.boxes_N4)


def test_an_image_that_cannot_be_used_is_set_aside_and_the_rest_goes_on(small, read, course, tmp_path):
    for name, num in (("train", 3), ("val", 3)):
        cutouts.write(tmp_path / name, num, seed=1, side=64)
        (tmp_path / name / "images" / "00002.png").write_bytes(b"no image")
    whole = (tmp_path / "val" / "images" / "00001.png").read_bytes()
    cutouts.write(tmp_path / "larger", 1, seed=1, side=96)
    (tmp_path / "val" / "images" / "00001.png").write_bytes((tmp_path / "larger/images/00001.png").read_bytes())
    config = {"train": data_of(tmp_path / "train"), "val": data_of(tmp_path / "val"), "batch": 3}
    sets = read(small(**config))
    each = course(sets=sets, **config)
    each.step(0)
    again = course(sets=sets, **config)
    again.load(each.state())
    found = again.result()
    assert found["num_images"] == 1
    assert found["set_aside"].keys() == {"evaluations.train", "evaluations.val"}
    assert list(found["set_aside"]["evaluations.train"]) == [1]
    assert found["set_aside"]["evaluations.val"].keys() == {0, 1}
    assert "64 × 64" in found["set_aside"]["evaluations.val"][0]
    (tmp_path / "val" / "images" / "00001.png").write_bytes(whole)
    (tmp_path / "val" / "images" / "00003.png").write_bytes(b"")
    assert course(sets=sets, **config).result()["num_images"] == 1
    (tmp_path / "val" / "images" / "00001.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"evaluations\.val: no validation image with an object.*00001\.png: "):
        course(sets=sets, **config).result()


def test_a_pass_from_which_nothing_can_be_learned_is_the_last(read, small, course, tmp_path):
    """Thumbnails, say: with annotations for what they were made of."""
    sets = read(small())
    cutouts.write(tmp_path / "thumbnails", len(sets[0].scenes), seed=0, side=60)
    thumbnails = replace(sets[0], images=Storage(tmp_path / "thumbnails" / "images"))
    match = r"evaluations\.train: no training image with an object.*0000\d\.png: it has 60 × 60 pixels.*What to do"
    left = course(sets=[thumbnails, sets[1]])
    left.step(0)
    with pytest.raises(DataError, match=match):
        left.step(2)  # 10 images of 4 a step
    with pytest.raises(DataError, match=match):
        course(sets=[thumbnails, sets[1]], epochs=0.1).step(0)  # the run is over before
    empty = [replace(each, crowd_N=np.ones_like(each.crowd_N)) for each in sets[0].scenes]
    with pytest.raises(DataError, match="images without objects alone"):
        course(sets=[replace(sets[0], scenes=tuple(empty)), sets[1]], epochs=0.1).step(0)


def test_what_was_learned_from_before_it_was_left_counts(read, small, course, tmp_path):
    sets = read(small())
    (tmp_path / "damaged").mkdir()
    for scene in sets[0].scenes:
        (tmp_path / "damaged" / scene.file_name).write_bytes(b"no image")
    damaged = [replace(sets[0], images=Storage(tmp_path / "damaged")), sets[1]]
    first = course(sets=sets)
    first.step(0)
    again = course(sets=damaged)
    again.load(first.state())
    again.step(2)
    assert len(again.state()["set_aside"]["evaluations.train"]) == 4


def test_a_step_of_images_that_cannot_be_decoded_moves_nothing_but_by_its_decay(read, small, course, tmp_path):
    sets = read(small())
    for scene in sets[0].scenes:
        (tmp_path / scene.file_name).write_bytes(b"no image")
    each = course(sets=[replace(sets[0], images=Storage(tmp_path)), sets[1]], weight_decay=0)
    before = weights(each)
    each.step(0)
    each.step(1)
    assert same(before, weights(each))


def test_an_image_that_has_gone_stops_it(read, small, course, tmp_path):
    sets = read(small())
    (tmp_path / "empty").mkdir()
    each = course(sets=[replace(sets[0], images=Storage(tmp_path / "empty")), sets[1]])
    with pytest.raises(StorageError, match=r"an image has gone.*png"):
        each.step(0)


def test_what_is_not_finite_stops_before_the_update(course):
    each = course()
    before = weights(each)
    with torch.no_grad():
        each.detector.backbone.encoder.pos_embed[0, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"detection, model: in step 0 .* nan.*lower base_lr.*fp32"):
        each.step(0)
    after = weights(each)
    del before["backbone.encoder.pos_embed"], after["backbone.encoder.pos_embed"]
    assert same(before, after)


def test_bf16_computes_something_like_fp32(course):
    rates = {"warmup_fraction": 0, "clip_norm": 1e9, "base_lr": 1e-3, "drop_path": 0}
    ends = []
    for precision in ("fp32", "bf16"):
        each = course(precision=precision, **rates)
        each.step(0)
        ends.append({n: p.grad.clone() for n, p in each.detector.named_parameters() if p.grad is not None})
        assert each.result()["num_images"] == 7
    name = "backbone.pyramid.levels.0.0.weight"
    a, b = (each[name].flatten() for each in ends)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.5  # not all boxes that are looked at are the same


def test_a_list_of_courses_goes_on_from_its_checkpoint(small, read, tmp_path):
    config = small(epochs=1.2)  # 3 steps
    encoders = {"model": encoder_of("vit"), "untrained": encoder_of("vit, learnable positions")}
    asked = Detection(config, *read(config), encoders, 0)
    context = LocalWorkerContext(tmp_path / "run")
    options = {"fingerprint": "f", "checkpoint_steps": 2}

    def stop(number: int, step: int, total: int) -> None:
        if (number, step) == (1, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(asked, list(encoders), context, tell=stop, **options)
    seen = []
    found = run_all(asked, list(encoders), context, tell=lambda *told: seen.append(told), **options)
    assert seen == [(1, 3, 3)]
    quiet = run_all(asked, list(encoders), LocalWorkerContext(tmp_path / "other"), **options)
    assert found == quiet


def test_the_set_of_cut_outs_is_what_it_says(read, small):
    (train, val) = read(small(masks=True))
    assert train.set_aside == val.set_aside == ()
    from maskray.evaluation.detection import outlines

    for scene in (*train.scenes, *val.scenes):
        for box, rle in zip(scene.boxes_N4, scene.outlines, strict=True):
            rows, columns = outlines.decode(rle).nonzero()
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert Path(train.name).parent != Path(val.name).parent


def test_as_many_are_kept_as_may_be_drawn():
    limits = {type(each).__name__: each for each in DetectionEvaluation.model_fields["figure_images"].metadata}
    assert limits["Le"].le == MOST_DRAWN


def test_eight_images_are_learned_by_heart(small, read, tmp_path):
    """Then all of it is wired right: boxes, classes and outlines, there and back."""
    cutouts.write(tmp_path / "train", 8, seed=0, side=64)
    data = data_of(tmp_path / "train")
    sizes = {"pyramid_width": 32, "head_width": 64, "proposals": 64, "sampled_boxes": 32, "masks": True}
    recipe = {"epochs": 60, "base_lr": 0.3, "layer_decay": 1, "weight_decay": 0, "flip_probability": 0, "drop_path": 0}
    config = small(train=data, val=data, **sizes, **recipe)
    asked = Detection(config, *read(config), {"model": encoder_of("vit")}, seed=3)
    (found,) = run_all(asked, ["model"], LocalWorkerContext(tmp_path), fingerprint="f", checkpoint_steps=1000)
    boxes, masks = found["precisions"]
    assert boxes["ap"] > 0.6
    assert masks["ap"] > 0.5
