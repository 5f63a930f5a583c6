"""The stream's contract: one order and one set of bits, whatever the workers, threads, cache and starting step."""

import io
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from maskray import masking
from maskray.config.models import BlockMask, ObjectiveConfig, RandomMask
from maskray.config.resolve import resolve
from maskray.config.schema import DataConfig, IngestConfig, RandomResizedCrop, RunConfig, WholeImage
from maskray.data import device, row_groups
from maskray.data.cache import open_cache
from maskray.data.device import device_units
from maskray.data.ingest import ingest
from maskray.data.local import LocalStream, open_units
from maskray.data.mapper import thread_mapper
from maskray.data.plan import Plan, share
from maskray.data.shards import MANIFEST, Dataset, Row, write_shard
from maskray.data.spec import StreamSpec
from maskray.data.stream import decode_group, load_unit, steps, walk
from maskray.errors import ConfigError, DataError, StorageError, StreamError

GROUP, TOTAL_STEPS = 4, 9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Seventy JPEG and PNG images, no two alike, of sizes around 24 pixels."""
    place = tmp_path_factory.mktemp("stream")
    for i in range(70):
        coarse = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((20 + i % 9, 22 + i % 5), Image.Resampling.BICUBIC)
        path = place / "in" / f"class{i % 3}" / f"{i:02d}.{('png', 'jpg')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    config = IngestConfig(
        source=str(place / "in"), destination=str(place / "out"), group_rows=GROUP, groups_per_shard=5
    )
    ingest(config, thread_mapper(2))
    return Dataset.open(str(place / "out"))


@pytest.fixture(scope="module")
def spec(dataset):
    config = RunConfig.model_validate(
        {
            "name": "stream",
            "seed": 11,
            "data": {"path": dataset.storage.uri, "image_size": [16, 24], "views_per_image": 2},
            "model": {"patch": 8, "width": 64, "heads": 4},
            "optim": {"global_batch": 4 * GROUP * 2, "steps": TOTAL_STEPS},
        }
    )
    return StreamSpec.of(config, resolve(config, dataset.facts()), dataset)


def whole_images(spec):
    return replace(spec, crop=WholeImage(), views_per_image=1, channels=1, flip_probability=0.0)


def local(spec, dataset, **options):
    with LocalStream(spec, dataset, **options) as stream:
        return list(stream)


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.position, a.keys) == (b.position, b.keys)
        for name in ("images_NCHW", "visible_NHW", "weights_N"):
            one_array, other_array = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
            np.testing.assert_array_equal(one_array, other_array)
            assert one_array.dtype == other_array.dtype


@pytest.fixture(scope="module")
def reference(spec, dataset):
    return [load_unit(spec, dataset, position) for position in range(TOTAL_STEPS * spec.groups_per_step)]


# -------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_workers_together_walk_the_plan(spec, dataset, reference, world_size):
    shares = [local(spec, dataset, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert_same(sorted((u for s in shares for u in s), key=lambda u: u.position), reference)
    for rank, units in enumerate(shares):
        wanted = [p for t in range(TOTAL_STEPS) for p in share(t, spec.groups_per_step, rank, world_size)]
        assert [u.position for u in units] == wanted


def test_the_keys_are_those_of_the_plans_row_groups(spec, dataset, reference):
    plan = Plan(spec.seed, dataset.num_row_groups())
    for unit in reference:
        group = dataset.read_group(plan.locate(unit.position)[1])
        assert unit.keys == [key for key in group.keys for _ in range(2)]


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 4, "prefetch_groups": 1}, {"prefetch_groups": 99}])
def test_threads_and_look_ahead_change_nothing(spec, dataset, reference, options):
    assert_same(local(spec, dataset, **options), reference)


@pytest.mark.parametrize("start_step", [1, 5, TOTAL_STEPS])
def test_a_stream_can_start_anywhere(spec, dataset, reference, start_step):
    assert_same(local(spec, dataset, start_step=start_step), reference[start_step * spec.groups_per_step :])


def test_spec_and_dataset_travel(spec, dataset, reference):
    spec, dataset = pickle.loads(pickle.dumps((spec, dataset)))
    assert_same(local(spec, None), reference)
    assert_same([load_unit(spec, dataset, 7)], [reference[7]])


@pytest.mark.parametrize(
    "options",
    [
        {"crop": WholeImage()},
        {"channels": 1},
        {"flip_probability": 0.0},
        {"flip_probability": 1.0},
        {"views_per_image": 1},
        {"views_per_image": 3},
        {"mask": RandomMask(ratio=0.5)},
        {"mask": RandomMask(ratio=[0.25, 0.5, 0.75])},
        {"mask": BlockMask(ratio=0.5, sides=(1, 2), roll=True)},
        {"mask": RandomMask(ratio=0.5), "objective": ObjectiveConfig(predict_fraction=0.5)},
        {"crop": RandomResizedCrop(scale=(0.9, 1.0))},
        {"image_size": (8, 8), "grid_HW": (4, 4)},
    ],
)
def test_every_option_keeps_the_contract(spec, dataset, cache_folder, options):
    spec = replace(spec, **options, total_steps=2)
    expected = [load_unit(spec, dataset, position) for position in range(2 * spec.groups_per_step)]
    n = GROUP * spec.views_per_image
    for unit in expected:
        assert unit.images_NCHW.shape == (n, spec.channels, *spec.image_size)
        assert unit.images_NCHW.dtype == np.uint8
        assert unit.visible_NHW.shape == (n, *spec.grid_HW)
        assert unit.visible_NHW.dtype == np.bool_
        step = spec.step_of(unit.position)
        assert (unit.visible_NHW.sum((1, 2)) == spec.num_visible(step)).all()
        if unit.target_NHW is not None:
            assert (unit.target_NHW.sum((1, 2)) == spec.num_target(step)).all()
            assert not (unit.target_NHW & unit.visible_NHW).any()
        assert unit.weights_N.tolist() == [1.0] * n
        assert len(unit.keys) == n
    whole = open_cache(dataset, spec.channels, cache_folder)
    assert_same(local(spec, dataset, images=whole), expected)
    assert_same(list(device_units(spec, whole, spec.positions(0, 1, 0))), expected)


def test_views_differ_and_so_do_passes(spec, dataset):
    passes = spec.num_row_groups
    first = load_unit(spec, dataset, 0)
    again = next(u for p in range(passes, 2 * passes) if (u := load_unit(spec, dataset, p)).keys == first.keys)
    one, other = first.images_NCHW[0::2], first.images_NCHW[1::2]
    assert all((a != b).any() for a, b in zip(one, other, strict=True))
    assert (first.images_NCHW != again.images_NCHW).any((1, 2, 3)).all()
    assert (first.visible_NHW != again.visible_NHW).any()


def test_rows_are_numbered_over_the_whole_split(spec, dataset, reference):
    plan = Plan(spec.seed, dataset.num_row_groups())
    for unit in reference[:: spec.groups_per_step]:
        pass_, number = plan.locate(unit.position)
        rows = np.repeat(np.arange(number * GROUP, (number + 1) * GROUP), 2)
        views = np.tile([0, 1], GROUP)
        (num,) = spec.visible_counts
        expected = masking.draw(spec.mask, spec.grid_HW, num, seed=spec.seed, pass_=pass_, rows=rows, view=views)
        np.testing.assert_array_equal(unit.visible_NHW, expected)


def test_a_whole_image_of_the_right_size_is_not_touched(digits):
    digits = Dataset.open(str(digits))
    config = RunConfig.model_validate(
        {
            "name": "digits",
            "data": {
                "path": digits.storage.uri,
                "image_size": 8,
                "channels": 1,
                "crop": {"kind": "whole"},
                "flip_probability": 0,
            },
            "model": {"patch": 2, "width": 64, "heads": 4},
            "optim": {"global_batch": 16, "steps": 1},
        }
    )
    spec = StreamSpec.of(config, resolve(config, digits.facts()), digits)
    unit = load_unit(spec, digits, 0)
    group = digits.read_group(spec.plan.locate(0)[1])
    for image, data in zip(unit.images_NCHW, group.images, strict=True):
        np.testing.assert_array_equal(image[0], np.asarray(Image.open(io.BytesIO(data))))
    flipped = load_unit(replace(spec, flip_probability=1.0), digits, 0)
    np.testing.assert_array_equal(flipped.images_NCHW, unit.images_NCHW[..., ::-1])


# ------------------------------------------------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def cached(kind, spec, dataset, folder, **place):
    """The units of a worker under `cache: host` or `device`, opened as training opens them."""
    data = DataConfig(path="unset", channels=spec.channels, stream="local", cache=kind, cache_folder=str(folder))
    place = {"rank": 0, "world_size": 1, "start_step": 0} | place
    with open_units(replace(spec, path=dataset.storage.uri), data, torch.device("cpu"), **place) as units:
        return list(units)


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("start_step", [0, 3])
def test_caches_keep_order_and_bits(spec, dataset, cache_folder, kind, views, world_size, start_step):
    spec = replace(spec, views_per_image=views, total_steps=start_step + 2)
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "start_step": start_step}
        expected = local(spec, dataset, **place)
        units = cached(kind, spec, dataset, cache_folder, **place)
        assert_same(units, expected)  # on these images the device's pixels are equal too: see unit/data/test_resize


@pytest.mark.parametrize("kind", ["host", "device"])
def test_an_image_that_could_not_be_decoded_has_no_weight_in_a_cache(spec, dataset, tmp_path, kind, caplog):
    broken, key = with_broken_image(dataset, tmp_path / "data")
    assert_same(cached(kind, spec, broken, tmp_path / "cache"), local(spec, broken))
    assert key in caplog.text
    caplog.clear()
    cached(kind, spec, broken, tmp_path / "cache")
    assert caplog.messages == ["1 images cannot be decoded: they count for nothing"]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()].count("") == 1
    cached(kind, spec, dataset, tmp_path / "cache")  # of the sound files another is made, though the images are equal
    assert [path.suffix for path in (tmp_path / "cache").iterdir()].count("") == 2


def test_where_no_cache_can_be_written_auto_goes_without(spec, dataset, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert_same(cached("auto", spec, dataset, tmp_path / "file" / "cache"), local(spec, dataset))
    assert "decoded again in each pass" in caplog.text
    with pytest.raises(StorageError, match=r"^data.cache_folder: cannot keep decoded images"):
        cached("host", spec, dataset, tmp_path / "file" / "cache")


def test_the_device_is_left_the_room_it_needs(spec, dataset, tmp_path):
    data = DataConfig(path="unset", cache="device", local_bytes=1000, cache_folder=str(tmp_path / "cache"))
    place = {"rank": 0, "world_size": 1, "start_step": 0}
    with (
        pytest.raises(
            ConfigError, match=r"^data.cache: the decoded training split does not fit.*local_bytes"
        ) as caught,
        open_units(spec, data, torch.device("cpu"), **place),
    ):
        pass
    assert "take data.cache: host" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_pixels_on_a_device_are_off_by_one_at_most_and_all_else_is_equal(spec, dataset, cache_folder):
    spec = replace(spec, image_size=(3, 5), grid_HW=(3, 5), crop=RandomResizedCrop(scale=(0.8, 1.0)))
    for unit, expected in zip(cached("device", spec, dataset, cache_folder), local(spec, dataset), strict=True):
        assert np.abs(np.asarray(unit.images_NCHW).astype(int) - expected.images_NCHW).max() <= 1
        assert_same([unit._replace(images_NCHW=expected.images_NCHW)], [expected])


def test_boxes_are_resized_in_as_many_parts_as_memory_asks_for(spec, dataset, cache_folder, reference, monkeypatch):
    for pixels in (1, 1500):
        monkeypatch.setattr(device, "_SCRATCH_PIXELS", pixels)
        assert_same(cached("device", spec, dataset, cache_folder), reference)


def test_products_of_less_than_float32_are_told(spec, dataset, cache_folder, caplog):
    torch.set_float32_matmul_precision("high")
    try:
        cached("device", replace(spec, total_steps=1), dataset, cache_folder)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "computed with less (high)" in caplog.text


def test_steps_take_units_that_lie_on_a_device(spec, dataset, cache_folder, reference):
    units = cached("device", spec, dataset, cache_folder)
    for micro_batch in (None, 4, 16):
        got, wanted = (all_steps(spec, us, micro_batch=micro_batch) for us in (units, reference))
        for step, expected in zip(got, wanted, strict=True):
            for one, other in zip(joined(step), joined(expected), strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_the_host_reads_nothing_from_the_device(spec, dataset, cache_folder):
    # Tensors on `meta` have no values: whatever would wait for one fails.
    whole = open_cache(dataset, spec.channels, cache_folder).to(torch.device("meta"))
    unit = next(device_units(spec, whole, spec.positions(0, 1, 0)))
    assert (unit.images_NCHW.device.type, unit.visible_NHW.device.type) == ("meta", "meta")
    assert unit.images_NCHW.shape == (2 * GROUP, 3, *spec.image_size)
    assert unit.visible_NHW.shape == (2 * GROUP, *spec.grid_HW)


# ------------------------------------------------------------------------------------------------------------- damage


def with_broken_image(dataset, place):
    """The dataset with the third image of shard 0 replaced by bytes that are no image."""
    shard = dataset.manifest.splits["train"].shards[0]
    rows = [Row(**row) for row in pq.read_table(dataset.storage.join(shard.name)).to_pylist()]
    rows[2] = rows[2]._replace(image=b"no image any more")
    copy = Dataset(type(dataset.storage)(place), dataset.manifest).storage
    for split in dataset.manifest.splits.values():
        for other in split.shards:
            copy.write_bytes(other.name, dataset.storage.read_bytes(other.name))
    split = dataset.manifest.splits["train"]
    split = replace(split, shards=(write_shard(copy, shard.name, rows, GROUP), *split.shards[1:]))
    splits = dataset.manifest.splits | {"train": split}
    copy.write_bytes(MANIFEST, replace(dataset.manifest, splits=splits, fingerprint="").dump())
    return Dataset.open(copy.uri), rows[2].key


def test_an_image_that_cannot_be_decoded_later_keeps_its_slot(spec, dataset, tmp_path):
    broken, key = with_broken_image(dataset, tmp_path)
    position = next(p for p in range(spec.num_row_groups) if spec.plan.locate(p)[1] == 0)
    sound, unit = load_unit(spec, dataset, position), load_unit(spec, broken, position)
    assert unit.keys == sound.keys
    assert unit.weights_N.tolist() == [1, 1, 1, 1, 0, 0, 1, 1]
    assert (unit.images_NCHW[4:6] == 0).all()
    others = [0, 1, 2, 3, 6, 7]
    np.testing.assert_array_equal(unit.images_NCHW[others], sound.images_NCHW[others])
    np.testing.assert_array_equal(unit.visible_NHW, sound.visible_NHW)
    (said,) = unit.warnings
    assert said.startswith(f"image {key} cannot be decoded any more (no image format")
    assert key not in [k for group in walk(broken, "train", (8, 8), 3) for k in group.keys]


def flip_a_bit(dataset, shard, group):
    """Of an image of a row group of a shard."""
    path = Path(dataset.storage.join(shard.name))
    chunk = pq.read_metadata(path).row_group(group).column(1)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 1
    path.write_bytes(content)


def test_errors_come_in_order_and_leave_no_thread(spec, dataset, tmp_path):
    copy, _ = with_broken_image(dataset, tmp_path)
    shard = copy.manifest.splits["train"].shards[1]
    flip_a_bit(copy, shard, 2)
    bad = next(p for p in range(spec.num_row_groups) if spec.plan.locate(p)[1] == 7)
    stream, seen = LocalStream(spec, copy, threads=4), []
    with pytest.raises(DataError, match=rf"row group 2 of {shard.name} cannot be read.*ingest again"):
        seen.extend(unit.position for unit in stream)
    assert seen == list(range(bad))
    assert next(stream, None) is None
    assert not [t for t in threading.enumerate() if t.name.startswith("maskray-decode")]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("kind", ["none", "host"])
def test_what_cannot_be_read_keeps_its_slots_if_told(spec, dataset, tmp_path, monkeypatch, caplog, damage, kind):
    copy, _ = with_broken_image(dataset, tmp_path)
    spec = replace(spec, path=copy.storage.uri)
    shard, path = copy.manifest.splits["train"].shards[1], tmp_path / "train/00001.parquet"
    sound, whole = local(spec, copy), path.read_bytes()
    monkeypatch.setattr(row_groups, "FOOTERS", row_groups.Footers(2**20))  # as in a new process
    if damage == "flipped":
        flip_a_bit(copy, shard, 2)
    elif damage == "cut":
        path.write_bytes(whole[:-1])
    else:
        path.unlink()
    with pytest.raises(DataError, match=shard.name):
        local(spec, spec.open_dataset())
    lost = {5 + 2} if damage == "flipped" else set(range(5, 10))

    spec = replace(spec, unreadable="skip")
    again = cached(kind, spec, copy, tmp_path / "cache")
    caplog.clear()
    all_steps(spec, again)
    assert caplog.messages == [message for unit in again for message in unit.warnings]
    assert not list((tmp_path / "cache").glob("*/*.bin"))  # a gap is not kept
    assert [u.position for u in again] == [u.position for u in sound]
    for unit, expected in zip(again, sound, strict=True):
        number = spec.plan.locate(unit.position)[1]
        np.testing.assert_array_equal(unit.visible_NHW, expected.visible_NHW)
        if number not in lost:
            assert_same([unit], [expected])
            continue
        assert not unit.weights_N.any()
        assert not unit.images_NCHW.any()
        assert f"row group {number - 5} of {shard.name} cannot be read" in unit.warnings[0]
        first = (number - 5) * GROUP
        assert unit.keys == [f"{shard.name}#{first + row}" for row in range(GROUP) for _ in range(2)]

    stream = LocalStream(spec, copy, prefetch_groups=1, threads=1)
    with stream:
        passed = [next(stream) for _ in range(spec.num_row_groups)]
        path.write_bytes(whole)  # it is restored while the run goes on
        later = list(stream)
    assert_same(later, sound[len(passed) :])


def test_a_walk_stops_at_what_cannot_be_read(dataset, tmp_path):
    with_broken_image(dataset, tmp_path)
    (tmp_path / "train/00001.parquet").unlink()
    with pytest.raises(DataError, match=r"row group 0 of train/00001.parquet cannot be read"):
        list(walk(Dataset.open(str(tmp_path), unreadable="skip"), "train", (8, 8), 3))


def test_closing_early_leaves_no_thread_and_looking_ahead_is_bounded(spec, dataset):
    loaded = []

    class Watched(Dataset):
        def read_group(self, group, split="train"):
            loaded.append(group)
            return super().read_group(group, split)

    with LocalStream(spec, Watched(dataset.storage, dataset.manifest), threads=2, prefetch_groups=3) as stream:
        next(stream)
        next(stream)
    assert len(loaded) <= 4
    assert not [t for t in threading.enumerate() if t.name.startswith("maskray-decode")]
    stream.close()


def test_a_dataset_of_another_shape_is_refused(spec):
    with pytest.raises(DataError, match=r"is not the dataset that this run was planned on"):
        replace(spec, num_row_groups=3).open_dataset()


# -------------------------------------------------------------------------------------------------------------- steps


def all_steps(spec, units, rank=0, world_size=1, start_step=0, micro_batch=None):
    return list(steps(iter(units), spec, rank, world_size, start_step, micro_batch))


def joined(step):
    images = torch.cat([b.images_BCHW for b in step.batches])
    visible = torch.cat([b.visible_BHW for b in step.batches])
    weights = torch.cat([b.weights_B for b in step.batches])
    return images, visible, weights, [k for b in step.batches for k in b.keys]


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 4, 8, 16, 24, 32])
def test_micro_batches_only_cut(spec, reference, micro_batch):
    size = micro_batch or 32
    whole, cut = all_steps(spec, reference), all_steps(spec, reference, micro_batch=micro_batch)
    assert [s.number for s in cut] == list(range(TOTAL_STEPS))
    for step, expected in zip(cut, whole, strict=True):
        assert [len(b.keys) for b in step.batches] == [min(size, 32 - at) for at in range(0, 32, size)]
        for got, wanted in zip(joined(step), joined(expected), strict=True):
            assert torch.equal(got, wanted) if isinstance(got, torch.Tensor) else got == wanted
        for batch in step.batches:
            assert batch.num_visible == spec.num_visible(step.number)
            assert (batch.visible_BHW.sum((1, 2)) == batch.num_visible).all()
            assert (batch.target_BHW.sum((1, 2)) == batch.num_target).all()
            assert (batch.images_BCHW.dtype, batch.weights_B.dtype) == (torch.uint8, torch.float32)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("start_step", [0, 2])
def test_the_workers_share_a_step(spec, dataset, reference, world_size, start_step):
    ranks = []
    for rank in range(world_size):
        units = local(spec, dataset, rank=rank, world_size=world_size, start_step=start_step)
        ranks.append(all_steps(spec, units, rank, world_size, start_step, micro_batch=8))
    for number in range(start_step, TOTAL_STEPS):
        mine = [r[number - start_step] for r in ranks]
        assert len({len(step.batches) for step in mine}) == 1
        assert sorted(p for step in mine for p in step.positions) == [4 * number + i for i in range(4)]
        counted = sorted(k for s in mine for b in s.batches for k, w in zip(b.keys, b.weights_B, strict=True) if w)
        assert counted == sorted(k for u in reference[4 * number : 4 * number + 4] for k in u.keys)
        assert sum(float(b.weights_B.sum()) for s in mine for b in s.batches) == 4 * spec.views_per_group


def test_a_worker_without_its_last_group_repeats_its_first_for_nothing(spec, dataset):
    for rank in range(3):
        for step in all_steps(spec, local(spec, dataset, rank=rank, world_size=3), rank, 3, micro_batch=8):
            lacking = len(step.positions) == 1
            assert [bool(b.weights_B.any()) for b in step.batches] == [True, not lacking]
            if lacking:
                assert torch.equal(step.batches[1].images_BCHW, step.batches[0].images_BCHW)
                assert step.batches[1].keys == step.batches[0].keys


def test_units_that_may_not_be_written_are_copied(spec, reference):
    frozen = [u._replace(images_NCHW=u.images_NCHW.copy()) for u in reference[:4]]
    for unit in frozen:
        unit.images_NCHW.flags.writeable = False
    one = replace(spec, total_steps=1)
    for micro_batch in (None, 2):
        step = all_steps(one, frozen, micro_batch=micro_batch)[0]
        assert torch.equal(joined(step)[0], torch.from_numpy(np.concatenate([u.images_NCHW for u in reference[:4]])))


def test_another_unit_than_the_plans_is_refused(spec, reference):
    swapped = [*reference[:5], reference[6], reference[5], *reference[7:]]
    with pytest.raises(StreamError, match=r"step 1, rank 0: the plan asks for position 5, the stream gave position 6"):
        all_steps(spec, swapped)
    with pytest.raises(StreamError, match=r"asks for position 7, the stream gave the end of the stream"):
        all_steps(spec, reference[:7])
    with pytest.raises(StreamError, match=r"asks for position 8, the stream gave position 0"):
        all_steps(spec, reference, start_step=2)


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_walk_sees_each_row_once(dataset, split, channels):
    groups = list(walk(dataset, split, (16, 24), channels))
    rows = np.concatenate([g.rows for g in groups])
    np.testing.assert_array_equal(rows, np.arange(dataset.num_rows(split)))
    assert len({k for g in groups for k in g.keys}) == len(rows)
    for group in groups:
        assert group.images_BCHW.shape == (len(group.rows), channels, 16, 24)
        assert group.images_BCHW.dtype == torch.uint8
        assert group.labels.tolist() == [int(k[5]) for k in group.keys]


@pytest.mark.parametrize("max_rows", [0, 1, GROUP, GROUP + 1, 10**6])
def test_the_walk_stops_at_its_limit(dataset, max_rows):
    rows = [row for g in walk(dataset, "train", (8, 8), 3, max_rows) for row in g.rows]
    assert rows == list(range(min(max_rows, dataset.num_rows("train"))))


def test_the_walk_gives_what_the_stream_sees_of_whole_images(spec, dataset):
    spec = whole_images(spec)
    seen = {
        k: i for g in walk(dataset, "train", spec.image_size, 1) for k, i in zip(g.keys, g.images_BCHW, strict=True)
    }
    unit = load_unit(spec, dataset, 3)
    for key, image in zip(unit.keys, unit.images_NCHW, strict=True):
        np.testing.assert_array_equal(image, seen[key].numpy())


def test_decoded_groups_are_whole_images(dataset):
    images = decode_group(dataset.read_group(0), 3)
    assert all(image is not None and image.shape[0] == 3 for image in images)
