"""Shards and manifest: what is written comes back, and damage is named, not read."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from maskray.data.decode import decode
from maskray.data.manifest import MANIFEST, Manifest, PixelSums, grid_of
from maskray.data.shards import Dataset, Row, decoded_bytes, write_shard
from maskray.data.storage import Storage
from maskray.errors import DataError


@pytest.fixture
def dataset(folder, tmp_path, ingest_here):
    ingest_here(folder, tmp_path / "shards")
    return Dataset.open(str(tmp_path / "shards"))


@pytest.fixture
def placed(folder, place, ingest_here):
    """A dataset at each kind of place."""
    ingest_here(folder, f"{place}/shards")
    return Dataset.open(f"{place}/shards")


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x01
    path.write_bytes(content)


def test_rows_come_back_by_group_and_in_order(placed, folder):
    dataset = placed
    for split in ("train", "held_out"):
        groups = list(dataset.iter_groups(split))
        np.testing.assert_array_equal(np.concatenate([g.rows for g in groups]), np.arange(dataset.num_rows(split)))
        assert [len(g.rows) for g in groups[:-1]] == [8] * (len(groups) - 1)
        for number, group in enumerate(groups):
            alone = dataset.read_group(number, split)
            assert alone.keys == group.keys
            assert alone.images == [(folder / key).read_bytes() for key in alone.keys]
            assert alone.labels.tolist() == [("cats", "dogs").index(key.split("/")[0]) for key in alone.keys]
    assert dataset.num_rows("train") + dataset.num_rows("held_out") == 50
    assert dataset.num_row_groups("train") == dataset.num_rows("train") // 8


def test_row_groups_have_exactly_g_rows_and_no_compression(dataset):
    for number, shard in enumerate(dataset.manifest.splits["train"].shards):
        metadata = pq.read_metadata(dataset.storage.join(shard.name))
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert sum(sizes) == shard.rows
        last = number == len(dataset.manifest.splits["train"].shards) - 1
        assert sizes[:-1] == [8] * (len(sizes) - 1)
        assert sizes[-1] == 8 or last
        assert metadata.row_group(0).column(1).compression == "UNCOMPRESSED"
        assert metadata.schema.names == ["key", "image", "label", "width", "height", "channels", "sha256"]


def test_facts_are_those_of_the_training_split(dataset):
    facts = dataset.facts()
    assert facts.fingerprint == dataset.manifest.fingerprint
    assert (facts.group_rows, facts.num_rows) == (8, dataset.num_rows("train"))
    assert facts.num_row_groups == dataset.num_rows("train") // 8
    decoded = [decode(data, 3).numel() for group in dataset.iter_groups() for data in group.images]
    assert decoded_bytes(dataset, 3) == sum(decoded)


def test_it_travels_and_is_read_by_many_threads(placed):
    expected = [g.keys for g in placed.iter_groups()]
    travelled = pickle.loads(pickle.dumps(placed))
    with ThreadPoolExecutor(8) as pool:
        numbers = list(range(len(expected))) * 20
        for number, group in zip(numbers, pool.map(travelled.read_group, numbers), strict=True):
            assert group.keys == expected[number]


def test_a_dataset_without_labels_has_none(folder, tmp_path, ingest_here):
    ingest_here(folder / "cats", tmp_path / "shards")
    assert Dataset.open(str(tmp_path / "shards")).read_group(0).labels is None


def test_a_shard_that_fails_half_way_leaves_nothing(tmp_path):
    def rows():
        yield from (Row(str(i), b"x" * 1000, None, 1, 1, 3, bytes(32)) for i in range(100))
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_shard(Storage(tmp_path), "train/00000.parquet", rows(), 8)
    assert list((tmp_path / "train").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_a_missing_folder_and_a_half_written_one_are_told_apart(tmp_path):
    with pytest.raises(DataError, match=r"no such dataset.*Found: .*nothing.*maskray ingest"):
        Dataset.open(str(tmp_path / "nothing"))
    (tmp_path / "half/train").mkdir(parents=True)
    (tmp_path / "half/train/00000.parquet").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"no manifest\.json.*did not finish.*Found: .*half\. .*ingest again"):
        Dataset.open(str(tmp_path / "half"))


def test_another_schema_version_is_refused(dataset):
    raw = json.loads(dataset.storage.read_bytes(MANIFEST))
    dataset.storage.write_bytes(MANIFEST, json.dumps(raw | {"schema_version": 99}).encode())
    with pytest.raises(DataError, match=r"another schema version. Found: 99. Allowed: 2 or 3"):
        Dataset.open(dataset.storage.uri)


def test_a_manifest_of_schema_version_2_is_read_and_keeps_its_fingerprint(dataset):
    raw = json.loads(dataset.storage.read_bytes(MANIFEST))
    for origin in raw["origins"]:
        del origin["options"]
    dataset.storage.write_bytes(MANIFEST, json.dumps(raw | {"schema_version": 2}).encode())
    again = Dataset.open(dataset.storage.uri).manifest
    assert [origin.options for origin in again.origins] == [{}]
    assert (again.schema_version, again.fingerprint) == (3, dataset.manifest.fingerprint)
    assert again.splits == dataset.manifest.splits


@pytest.mark.parametrize(
    "change",
    [{"num_duplicates": 1}, {"class_names": ["a", "b"]}, {"group_rows": 4}, {"fingerprint": "0" * 16}],
)
def test_a_manifest_that_was_changed_is_refused(dataset, change):
    raw = json.loads(dataset.storage.read_bytes(MANIFEST))
    dataset.storage.write_bytes(MANIFEST, json.dumps(raw | change).encode())
    with pytest.raises(DataError, match=r"was changed after it was written.*ingest again"):
        Dataset.open(dataset.storage.uri)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 2}', b'{"schema_version": 3, "x": 2}'])
def test_a_manifest_that_is_none_is_refused(dataset, content):
    dataset.storage.write_bytes(MANIFEST, content)
    with pytest.raises(DataError, match=r"manifest of .*ingest again"):
        Dataset.open(dataset.storage.uri)


def test_missing_and_short_shards_are_refused_at_once(dataset):
    name = dataset.manifest.splits["train"].shards[1].name
    path = Path(dataset.storage.join(name))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{name} has another size. Found: {len(content) - 1} bytes.*ingest again"):
        Dataset.open(dataset.storage.uri)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing.*ingest again"):
        Dataset.open(dataset.storage.uri)


@pytest.mark.parametrize("column", ["key", "image", "label"])
def test_one_changed_bit_is_caught_when_its_row_group_is_read(dataset, column):
    shard = dataset.manifest.splits["train"].shards[0]
    path = Path(dataset.storage.join(shard.name))
    metadata = pq.read_metadata(path)
    chunk = metadata.row_group(1).column(["key", "image", "label"].index(column))
    flip_byte(path, chunk.data_page_offset + chunk.total_compressed_size - 3)
    damaged = Dataset.open(dataset.storage.uri)
    damaged.read_group(0)
    with pytest.raises(DataError, match=rf"row group 1 of {shard.name} cannot be read.*CRC.*ingest again"):
        damaged.read_group(1)
    with pytest.raises(DataError, match=rf"the checksum of {shard.name} is wrong.*ingest again"):
        damaged.check()


def test_a_damaged_footer_is_an_error_too(dataset):
    shard = dataset.manifest.splits["train"].shards[0]
    flip_byte(Path(dataset.storage.join(shard.name)), -5)
    with pytest.raises(DataError, match=r"row group 0 of .* cannot be read"):
        Dataset.open(dataset.storage.uri).read_group(0)


def test_a_shard_that_disappears_while_it_is_used_is_named(dataset):
    Path(dataset.storage.join("train/00000.parquet")).unlink()
    with pytest.raises(DataError, match=r"row group 0 of train/00000.parquet cannot be read"):
        dataset.read_group(0)


def test_a_shard_that_disappears_from_a_bucket_is_named(folder, bucket, ingest_here):
    ingest_here(folder, f"{bucket}/shards")
    dataset = Dataset.open(f"{bucket}/shards")
    dataset.read_group(0)
    dataset.storage.delete("train/00000.parquet")
    with pytest.raises(DataError, match=r"row group 0 of train/00000.parquet cannot be read.*data.unreadable"):
        dataset.read_group(0)
    with pytest.raises(DataError, match=r"train/00000.parquet is missing"):
        Dataset.open(dataset.storage.uri)


def test_check_stops_at_its_limit(placed):
    dataset = placed
    sizes = [s.size for split in ("train", "held_out") for s in dataset.manifest.splits[split].shards]
    assert dataset.check() == sum(sizes)
    assert dataset.check(max_bytes=sizes[0] + 1) == sizes[0]
    assert dataset.check(max_bytes=0) == sizes[0], "one in any case"


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_sums_are_exact_and_do_not_depend_on_order(channels):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (channels, rng.integers(5, 64), 40), dtype=np.uint8) for _ in range(20)]
    each = [PixelSums.of(grid_of(image)) for image in images]
    columns = [np.array(column) for column in zip(*((s.pixels, s.values, s.squares) for s in each), strict=True)]
    total = PixelSums.total(*columns)
    assert total == PixelSums.total(*(column[::-1] for column in columns))
    assert total == PixelSums.total(*(c[:7] for c in columns)) + PixelSums.total(*(c[7:] for c in columns))
    pixels_CP = np.concatenate([image.reshape(channels, -1) for image in images], axis=1) / 255
    for channel, values in enumerate(pixels_CP):
        assert total.mean_std(channel, 255) == pytest.approx((values.mean(), values.std()), rel=1e-9)
    if channels == 3:
        gray = np.array((0.299, 0.587, 0.114)) @ pixels_CP
        assert total.mean_std(3, 255_000) == pytest.approx((gray.mean(), gray.std()), rel=1e-9)


def test_large_images_are_summed_over_a_grid():
    image = np.random.default_rng(1).integers(0, 256, (3, 130, 300), dtype=np.uint8)
    assert PixelSums.of(grid_of(image)) == PixelSums.of(image[:, ::2, ::4].reshape(3, -1))
    assert PixelSums.of(grid_of(image)).pixels == 65 * 75
    assert grid_of(image[:, :127, :64]).shape[1] == 127 * 64


def test_sums_of_a_billion_images_do_not_overflow():
    white = PixelSums.of(np.full((3, 127 * 127), 255, dtype=np.uint8))
    many = PixelSums.total(*(np.array([column] * 1000) for column in (white.pixels, white.values, white.squares)))
    assert many.squares[3] == 1000 * 127 * 127 * 255_000**2
    assert many.mean_std(3, 255_000) == (1.0, 0.0)


def test_the_fingerprint_says_what_is_there_and_not_where(dataset):
    manifest = dataset.manifest
    (origin,) = manifest.origins
    moved = replace(manifest, origins=(replace(origin, source="/elsewhere", stamp="x"),), fingerprint="")
    other = replace(manifest, origins=(replace(origin, content="0"),), fingerprint="")
    assert moved.fingerprint == manifest.fingerprint
    assert other.fingerprint != manifest.fingerprint
    assert Manifest.load(manifest.dump(), "here") == manifest


def test_no_std_is_zero(dataset):
    black = PixelSums(10, (0, 20, 30, 40), (0, 40, 90, 160))
    flat = replace(dataset.manifest, sums=black, fingerprint="")
    assert flat.statistics(1)[1] == (1 / 255,)
    assert flat.statistics(3)[1] == (1 / 255,) * 3


def test_images_of_other_channels_have_only_their_own_statistics(dataset):
    sums = PixelSums(2, (2, 4, 6, 8, 10), (4, 16, 36, 64, 100))
    spectral = replace(dataset.manifest, channels=5, sums=sums, fingerprint="")
    assert spectral.mean == tuple(v / 2 / 255 for v in sums.values)
    assert spectral.std == spectral.mean
    with pytest.raises(DataError, match=r"data.channels: .*Found: 3. Allowed: 5"):
        spectral.statistics(3)
    with pytest.raises(DataError, match=r"data\.channels: .*Found: 5\. Allowed: 1 or 3"):
        dataset.manifest.statistics(5)
