"""The first pass: pictures are re-encoded once, copies are found, and what was looked at is not looked at again."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maskray.data import survey as room
from maskray.data.decode import decode
from maskray.data.garbage import find_garbage
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import DataError


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(room, "CHUNK_IMAGES", 8)


@pytest.fixture
def looked_at(monkeypatch):
    """Pictures that were looked at, whichever thread did it."""
    calls, look = [], room._look

    def counted(data, known, job):
        calls.append(data)
        return look(data, known, job)

    monkeypatch.setattr(room, "_look", counted)
    return calls


def rows_of(path):
    return [row for shard in sorted(path.glob("*/*.parquet")) for row in pq.read_table(shard).to_pylist()]


# ------------------------------------------------------------------------------------------------------------- resizing


@pytest.mark.usefixtures("small_chunks")
def test_larger_pictures_are_re_encoded_once_and_smaller_ones_keep_their_bytes(tmp_path, ingest_here, picture):
    (tmp_path / "in").mkdir()
    sizes = {f"{i:02d}.png": (20 + 4 * i, 90 - 2 * i) for i in range(30)}
    for name, (height, width) in sizes.items():
        picture(height, height, width).save(tmp_path / "in" / name)
    manifest = ingest_here(tmp_path / "in", tmp_path / "out", resize_short=40, quality=95)
    rows = rows_of(tmp_path / "out")
    assert sorted(row["key"] for row in rows) == sorted(sizes)
    for row in rows:
        original, (height, width) = (tmp_path / "in" / row["key"]).read_bytes(), sizes[row["key"]]
        if min(height, width) <= 40:
            assert row["image"] == original
        else:
            assert row["image"].startswith(b"\xff\xd8")
            scale = 40 / min(height, width)
            height, width = round(height * scale), round(width * scale)
            difference = decode(row["image"], 3).float() - room.shortened(decode(original, 3), 40).float()
            assert difference.abs().mean() < 3
        assert (row["height"], row["width"]) == (height, width) == decode(row["image"], 3).shape[1:]
    assert sum(split.pixels for split in manifest.splits.values()) == sum(r["height"] * r["width"] for r in rows)


def test_a_picture_is_upright_before_it_is_resized_and_gray_stays_gray(tmp_path, ingest_here, picture):
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(8):
        picture(i, 60, 120).convert("L").save(tmp_path / "in" / f"{i}.jpg", exif=exif)
    manifest = ingest_here(tmp_path / "in", tmp_path / "out", resize_short=30, group_rows=1)
    assert manifest.channels == 1
    for row in rows_of(tmp_path / "out"):
        assert (row["height"], row["width"]) == (60, 30)
        with Image.open(io.BytesIO(row["image"])) as image:
            assert (image.size, image.mode) == ((30, 60), "L")
            assert 0x0112 not in image.getexif()


@pytest.mark.usefixtures("small_chunks")
def test_each_picture_is_decoded_once(folder, tmp_path, ingest_here, monkeypatch):
    decoded, real = [], room.decode.decode
    monkeypatch.setattr(room.decode, "decode", lambda data, channels: decoded.append(data) or real(data, channels))
    ingest_here(folder, tmp_path / "out", resize_short=16)
    assert len(decoded) == 50


def test_a_picture_that_cannot_be_re_encoded_is_set_aside_alone(tmp_path, ingest_here, picture):
    (tmp_path / "in").mkdir()
    for i in range(10):
        picture(i).save(tmp_path / f"in/{i}.png")
    Image.new("RGB", (90_000, 10)).save(tmp_path / "in/long.png")  # 72,000 pixels wide where it is 8 high
    manifest = ingest_here(tmp_path / "in", tmp_path / "out", resize_short=8, max_bad_fraction=0.1)
    assert sum(split.rows for split in manifest.splits.values()) == 10
    (row,) = pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    assert row["key"] == "long.png"
    assert row["reason"] == "72000 x 8 pixels do not fit into a JPEG, which has 65500 at most"


# ----------------------------------------------------------------------------------------------------------- duplicates


def test_of_copies_the_first_by_key_stays_and_they_are_not_bad(folder, tmp_path, ingest_here):
    copied = (folder / "dogs/003.png").read_bytes()
    for name in ("cats/zzz.png", "dogs/001.png", "dogs/zzz.png"):
        (folder / name).write_bytes(copied)
    manifest = ingest_here(folder, tmp_path / "out", deduplicate=True, max_bad_fraction=0)
    keys = {row["key"] for row in rows_of(tmp_path / "out")}
    assert "cats/zzz.png" in keys
    assert not keys & {"dogs/001.png", "dogs/003.png", "dogs/zzz.png"}
    assert (manifest.num_duplicates, manifest.num_quarantined) == (3, 0)
    listed = pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    assert listed[0] == {
        "key": "dogs/001.png",
        "reason": "duplicate of cats/zzz.png",
        "kind": "duplicate",
        "source": "dogs/001.png",
        "at": 0,
    }
    kept = ingest_here(folder, tmp_path / "all")
    assert kept.num_duplicates == 0
    assert kept.fingerprint != manifest.fingerprint


def test_copies_are_not_in_the_statistics(folder, tmp_path, ingest_here):
    before = ingest_here(folder, tmp_path / "before", held_out_fraction=0)
    for i in range(5):
        (folder / f"dogs/zzz{i}.png").write_bytes((folder / "dogs/003.png").read_bytes())
    assert ingest_here(folder, tmp_path / "after", held_out_fraction=0, deduplicate=True).sums == before.sums


# ------------------------------------------------------------------------------------------------------------ channels


def test_colour_in_one_pixel_is_seen(tmp_path, ingest_here, picture):
    (tmp_path / "in").mkdir()
    for i in range(10):
        picture(i, 200, 200).convert("L").convert("RGB").save(tmp_path / "in" / f"{i}.png")
    assert ingest_here(tmp_path / "in", tmp_path / "gray", held_out_fraction=0).channels == 1
    pixels = np.asarray(picture(3, 200, 200).convert("L").convert("RGB")).copy()
    pixels[151, 7, 2] ^= 1  # off the grid of the statistics
    Image.fromarray(pixels).save(tmp_path / "in/3.png")
    assert ingest_here(tmp_path / "in", tmp_path / "colour", held_out_fraction=0).channels == 3


def test_images_of_other_bands_than_most_are_set_aside(tmp_path, ingest_here, picture):
    (tmp_path / "in").mkdir()
    for i in range(20):
        np.save(tmp_path / f"in/{i:02d}.npy", np.random.default_rng(i).integers(0, 256, (9, 8, 5), dtype=np.uint8))
    picture(1).save(tmp_path / "in/colour.png")
    manifest = ingest_here(tmp_path / "in", tmp_path / "out", max_bad_fraction=0.1)
    assert (manifest.channels, len(manifest.mean), manifest.num_quarantined) == (5, 5, 1)
    (row,) = pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    assert (row["key"], row["kind"]) == ("colour.png", "bad")
    assert row["reason"] == "3 channels, where the dataset's images have 5"


# --------------------------------------------------------------------------------------------------------------- parts


class StoppedError(Exception):
    """As a kill comes, but in this process."""


def stop_at(phase, share):
    def progress(done, total, now):
        if now == phase and done >= share * total:
            raise StoppedError

    return progress


@pytest.mark.usefixtures("small_chunks")
def test_what_was_looked_at_is_not_looked_at_again(folder, tmp_path, ingest_here, looked_at):
    with pytest.raises(StoppedError):
        ingest_here(folder, tmp_path / "out", stop_at("write", 0.5))
    assert len(looked_at) == 50
    told = []
    ingest_here(folder, tmp_path / "out", lambda *args: told.append(args))
    assert len(looked_at) == 50
    assert told[0] == (50, 50, "check")
    begun = next(done for done, _, phase in told if phase == "write")
    assert 25 <= begun <= 50
    assert not (tmp_path / "out/.ingest").exists()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("change", [{"resize_short": 16}, {"seed": 5}, {"max_pixels": 10_000}])
def test_parts_of_other_options_are_not_taken(folder, tmp_path, ingest_here, looked_at, change):
    with pytest.raises(StoppedError):
        ingest_here(folder, tmp_path / "out", stop_at("write", 0.5))
    looked_at.clear()
    assert ingest_here(folder, tmp_path / "out", **change) == ingest_here(folder, tmp_path / "other", **change)
    assert len(looked_at) == 100


@pytest.mark.usefixtures("small_chunks")
def test_more_bad_images_may_be_allowed_without_a_second_look(folder, tmp_path, ingest_here, looked_at):
    (folder / "dogs/bad.png").write_bytes(b"x")
    with pytest.raises(DataError, match="max_bad_fraction"):
        ingest_here(folder, tmp_path / "out", max_bad_fraction=0)
    seen = len(looked_at)
    ingest_here(folder, tmp_path / "out", max_bad_fraction=0.1)
    assert len(looked_at) < seen + 51 - 8


def test_a_source_that_has_grown_is_refused_before_its_images_are_looked_at(
    folder, tmp_path, ingest_here, looked_at, picture
):
    (folder / "cats/bad.png").write_bytes(b"x")
    ingest_here(folder, tmp_path / "out", max_bad_fraction=0.1)
    looked_at.clear()
    whole = (folder / "cats/001.png").read_bytes()
    for i in range(5):
        picture(900 + i).save(folder / f"cats/new{i}.png")
    with pytest.raises(DataError, match=r"already there.*the source has 5 images more \(cats/new0.png, .*…\).*--add"):
        ingest_here(folder, tmp_path / "out", max_bad_fraction=0.1)
    for path in [*folder.glob("cats/new*"), folder / "cats/001.png"]:
        path.unlink()
    with pytest.raises(DataError, match=r"already there.*the source has 49 images of that"):
        ingest_here(folder, tmp_path / "out", max_bad_fraction=0.1)
    assert not looked_at
    (folder / "cats/001.png").write_bytes(whole)
    ingest_here(folder, tmp_path / "out", max_bad_fraction=0.1)  # touched, and the same
    assert len(looked_at) == 51


@pytest.mark.parametrize("damage", [False, True])
def test_a_refusal_leaves_no_parts_in_a_finished_dataset(folder, tmp_path, ingest_here, looked_at, picture, damage):
    ingest_here(folder, tmp_path / "out", resize_short=16)
    picture(999).save(folder / "cats/001.png")
    if damage:  # its keys are not known then
        (tmp_path / "out/train/00000.parquet").write_bytes(b"x")
    looked_at.clear()
    with pytest.raises(DataError, match="another dataset is already there"):
        ingest_here(folder, tmp_path / "out", resize_short=16)
    assert len(looked_at) == 50
    assert not (tmp_path / "out/.ingest").exists()
    assert find_garbage(Storage(tmp_path / "out"), set()).files == {}


@pytest.mark.usefixtures("small_chunks")
def test_a_damaged_part_is_made_again(folder, tmp_path, ingest_here, caplog):
    expected = ingest_here(folder, tmp_path / "quiet", resize_short=16)
    with pytest.raises(StoppedError):
        ingest_here(folder, tmp_path / "out", stop_at("write", 0.2), resize_short=16)
    (part,) = (tmp_path / "out").glob(".ingest/*/survey/00002.parquet")
    part.write_bytes(part.read_bytes()[:100])
    (tmp_path / "out/train/00000.parquet").write_bytes(b"cut short")
    assert ingest_here(folder, tmp_path / "out", resize_short=16) == expected
    assert "part 2 of the survey cannot be read" in caplog.text
    assert Dataset.open(str(tmp_path / "out")).check() == Dataset.open(str(tmp_path / "quiet")).check()


@pytest.mark.usefixtures("small_chunks")
def test_a_damaged_staging_file_is_not_taken_for_a_picture(folder, tmp_path, ingest_here):
    with pytest.raises(StoppedError):
        ingest_here(folder, tmp_path / "out", stop_at("write", 0), resize_short=16)
    for staged in (tmp_path / "out").glob(".ingest/*/staging/*.bin"):
        staged.write_bytes(bytes(staged.stat().st_size))
    with pytest.raises(DataError, match=r"a part of this ingest in .*\.ingest/\w+ is damaged.*delete"):
        ingest_here(folder, tmp_path / "out", resize_short=16)
