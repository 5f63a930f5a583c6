"""Ingest: the same dataset however it is run, bad images set aside, a kill leaves nothing that could be read."""

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskray.config.schema import IngestConfig
from maskray.data import lease
from maskray.data.garbage import find_garbage
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.data.survey import split_of
from maskray.errors import DataError, RunConflictError, StorageError


def keys_of(path, split="train"):
    return [key for group in Dataset.open(str(path)).iter_groups(split) for key in group.keys]


def test_the_result_does_not_depend_on_who_does_the_work(folder, tmp_path):
    def one_by_one(function, items):
        return (function(item) for item in items)

    config = {"source": str(folder), "group_rows": 8, "groups_per_shard": 2, "held_out_fraction": 0.2}
    one = ingest(IngestConfig(destination=str(tmp_path / "one"), **config), one_by_one)
    two = ingest(IngestConfig(destination=str(tmp_path / "two"), **config), thread_mapper(4))
    assert one == two


def test_rows_are_shuffled_by_the_seed_and_split_by_the_key_alone(folder, tmp_path, ingest_here):
    first = ingest_here(folder, tmp_path / "a", seed=0)
    second = ingest_here(folder, tmp_path / "b", seed=1)
    a, b = keys_of(tmp_path / "a"), keys_of(tmp_path / "b")
    assert a != b
    assert a != sorted(a)
    assert sorted(a) == sorted(b)
    held_out = keys_of(tmp_path / "a", "held_out")
    assert sorted(held_out) == sorted(keys_of(tmp_path / "b", "held_out"))
    assert 3 < len(held_out) < 20
    assert all(split_of(key, 0.2) == "held_out" for key in held_out)
    assert first.fingerprint != second.fingerprint


def test_a_key_stays_in_its_split_when_more_is_held_out():
    keys = [f"k{i}" for i in range(2000)]
    small, large = ({k for k in keys if split_of(k, f) == "held_out"} for f in (0.05, 0.2))
    assert small < large
    assert 60 < len(small) < 150
    assert {split_of(k, 0.0) for k in keys} == {"train"}


def test_the_manifest_knows_channels_statistics_and_classes(folder, tmp_path, ingest_here):
    manifest = ingest_here(folder, tmp_path / "shards")
    assert manifest.channels == 3
    assert manifest.class_names == ("cats", "dogs")
    assert manifest.num_quarantined == 0
    digits = ingest_here("digits", tmp_path / "digits", held_out_fraction=0)
    from sklearn.datasets import load_digits

    pixels = (load_digits().images.astype(int) * 255 // 16) / 255
    assert digits.channels == 1
    assert digits.mean == pytest.approx((pixels.mean(),), rel=1e-12)
    assert digits.std == pytest.approx((pixels.std(),), rel=1e-9)
    assert digits.splits["train"].pixels == 1797 * 64
    assert digits.splits["held_out"].rows == 0


def test_bad_images_are_set_aside_one_by_one(folder, tmp_path, ingest_here):
    good = len(list(folder.rglob("*.*")))
    (folder / "cats/empty.png").write_bytes(b"")
    (folder / "cats/text.jpg").write_text("no image")
    whole = (folder / "dogs/000.jpg").read_bytes()
    (folder / "dogs/short.jpg").write_bytes(whole[: len(whole) // 2])
    manifest = ingest_here(folder, tmp_path / "shards", max_bad_fraction=0.1)
    assert manifest.num_quarantined == 3
    assert sum(split.rows for split in manifest.splits.values()) == good
    listed = pq.read_table(tmp_path / "shards/quarantine.parquet").to_pylist()
    assert [row["key"] for row in listed] == ["cats/empty.png", "cats/text.jpg", "dogs/short.jpg"]
    assert listed[0]["reason"] == "the file is empty"
    assert all(row["reason"] for row in listed)


def test_too_many_bad_images_stop_it(folder, tmp_path, ingest_here):
    (folder / "cats/a.png").write_bytes(b"")
    (folder / "cats/b.png").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"max_bad_fraction: too many images .*: 2 of .*cats/a.png \(the file is empty\)"
    ):
        ingest_here(folder, tmp_path / "shards", max_bad_fraction=0.02)
    with pytest.raises(DataError, match=r"no manifest|no such dataset"):
        Dataset.open(str(tmp_path / "shards"))


def test_nothing_left_to_train_on_is_an_error(tmp_path, ingest_here):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"no image is left.*1 set aside"):
        ingest_here(tmp_path / "in", tmp_path / "out", max_bad_fraction=1)


def test_progress_is_told(folder, tmp_path, ingest_here):
    told = []
    ingest_here(folder, tmp_path / "shards", progress=lambda *args: told.append(args))
    assert told[:3] == [(0, 50, "check"), (50, 50, "check"), (0, 50, "write")]
    assert {t[1:] for t in told[2:]} == {(50, "write")}
    assert [t[0] for t in told[2:]] == sorted(t[0] for t in told[2:])
    assert told[-1][0] == 50


# ------------------------------------------------------------------------------------------- what is there already


def test_a_finished_dataset_is_recognised(folder, tmp_path, ingest_here, caplog):
    first = ingest_here(folder, tmp_path / "shards")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").rglob("*") if p.is_file()}
    with caplog.at_level(logging.INFO):
        again = ingest_here(folder, tmp_path / "shards")
    assert again == first
    assert "already there" in caplog.text
    (folder / "dogs/000.jpg").touch()  # another stamp, the same images
    assert ingest_here(folder, tmp_path / "shards") == first
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").rglob("*") if p.is_file()}


def test_another_dataset_is_not_written_over(folder, tmp_path, ingest_here, picture):
    ingest_here(folder, tmp_path / "shards")
    with pytest.raises(DataError, match=r"destination: another dataset is already there.*group_rows 8"):
        ingest_here(folder, tmp_path / "shards", group_rows=4)
    with pytest.raises(DataError, match="another dataset is already there"):
        ingest_here(folder, tmp_path / "shards", seed=3)
    picture(999).save(folder / "cats/new.png")
    with pytest.raises(DataError, match="another dataset is already there"):
        ingest_here(folder, tmp_path / "shards")


@pytest.mark.parametrize("option", [{"deduplicate": True}, {"max_pixels": 560}])
def test_options_that_decide_on_which_images_are_taken_are_not_ignored(folder, tmp_path, ingest_here, option):
    first = ingest_here(folder, tmp_path / "shards")
    (name, value), before = *option.items(), files_of(tmp_path / "shards")
    was = first.origins[0].options[name]
    with pytest.raises(DataError, match=rf"another dataset is already there. Found: .*pictures \(.*{name} {was}"):
        ingest_here(folder, tmp_path / "shards", **option)
    assert files_of(tmp_path / "shards") == before
    ingest_here(folder, tmp_path / "others", max_bad_fraction=1, **option)
    again = ingest_here(folder, tmp_path / "others", max_bad_fraction=1, **option)
    assert again.origins[0].options[name] == value


@pytest.mark.parametrize("copies", [0, 1])
def test_where_options_were_not_noted_the_images_tell(folder, tmp_path, ingest_here, copies):
    for number in range(copies):
        (folder / f"cats/copy{number}.png").write_bytes((folder / "dogs/003.png").read_bytes())
    first = ingest_here(folder, tmp_path / "shards")
    raw = json.loads((tmp_path / "shards/manifest.json").read_bytes())
    del raw["origins"][0]["options"]  # as an older maskray wrote it
    (tmp_path / "shards/manifest.json").write_text(json.dumps(raw | {"schema_version": 2}))
    assert ingest_here(folder, tmp_path / "shards").fingerprint == first.fingerprint
    if copies:
        with pytest.raises(DataError, match=r"another dataset is already there.*options that were not noted"):
            ingest_here(folder, tmp_path / "shards", deduplicate=True)
    else:
        assert ingest_here(folder, tmp_path / "shards", deduplicate=True).fingerprint == first.fingerprint


def files_of(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name", ["notes.txt", "train/00000.parquet", "held_out/a.png", "versions/a", "quarantine.parquet"]
)
def test_a_folder_with_other_things_is_not_written_into(folder, tmp_path, ingest_here, name):
    theirs = tmp_path / "theirs" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    with pytest.raises(DataError, match=rf"destination: the folder holds other things.*Found: {name.split('/')[0]} in"):
        ingest_here(folder, tmp_path / "theirs")
    assert files_of(tmp_path / "theirs") == {name: b"theirs"}


@pytest.mark.parametrize("destination", [".", "cats", "shards/of/them", "..", "../linked"])
def test_a_source_and_a_destination_inside_each_other_are_refused(folder, tmp_path, ingest_here, destination):
    (tmp_path / "linked").symlink_to(folder)
    before = files_of(tmp_path)
    with pytest.raises(DataError, match=r"destination: the source and the destination lie inside each other"):
        ingest_here(folder, folder / destination)
    assert files_of(tmp_path) == before


def test_tables_in_a_folder_named_as_a_split_are_not_taken_for_shards(folder, tmp_path, ingest_here):
    table = pa.table({"image": [{"bytes": path.read_bytes(), "path": path.name} for path in folder.rglob("*.png")]})
    (tmp_path / "hub/train").mkdir(parents=True)
    pq.write_table(table, tmp_path / "hub/train/0000.parquet")
    with pytest.raises(DataError, match="inside each other"):
        ingest_here(tmp_path / "hub/train", tmp_path / "hub")
    with pytest.raises(DataError, match="inside each other"):
        ingest_here(tmp_path / "hub/train/*.parquet", tmp_path / "hub")
    assert [path.name for path in tmp_path.glob("hub/**/*.*")] == ["0000.parquet"]
    ingest_here(tmp_path / "hub/train/*.parquet", tmp_path / "shards")


@pytest.mark.parametrize("add", [True, False])
def test_what_others_put_into_a_dataset_stays_there(folder, tmp_path, ingest_here, picture, add):
    ingest_here(folder, tmp_path / "shards")
    theirs = ("train/0000.parquet", "train/a.png", "versions/notes.txt", "held_out/00000.parquet.bak")
    for name in theirs:
        (tmp_path / "shards" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "shards" / name).write_bytes(b"theirs")
    for name in ("train/77777.parquet", "train/.tmp-1-00000.parquet"):
        (tmp_path / "shards" / name).write_bytes(b"left by a kill")
    if add:
        picture(999).save(folder / "cats/new.png")
    else:
        (tmp_path / "shards/train/00000.parquet").unlink()
    ingest_here(folder, tmp_path / "shards", add=add)
    left = files_of(tmp_path / "shards")
    assert {name for name, data in left.items() if data == b"theirs"} == set(theirs)
    assert b"left by a kill" not in left.values()
    assert not set(theirs) & set(find_garbage(Storage(tmp_path / "shards"), set()).files)


def test_of_two_ingests_into_one_place_the_second_is_refused(folder, tmp_path, ingest_here):
    refused = []

    def meanwhile(done, total, phase):
        with pytest.raises(
            RunConflictError, match=r"destination: the ingest into .*/shards is running already"
        ) as error:
            ingest_here(folder, tmp_path / "shards", group_rows=4)
        refused.append(error)
        with pytest.raises(RunConflictError, match="is running already"):
            find_garbage(Storage(tmp_path / "shards"), set())

    one = ingest_here(folder, tmp_path / "shards", meanwhile)
    assert refused
    assert one == ingest_here(folder, tmp_path / "quiet")
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "quiet")


def test_a_finished_dataset_is_recognised_where_nobody_may_write(folder, tmp_path, ingest_here, monkeypatch):
    first = ingest_here(folder, tmp_path / "shards")
    with lease.hold(Storage(tmp_path / "shards"), "shards", lease.INGEST):
        assert ingest_here(folder, tmp_path / "shards") == first
    monkeypatch.setattr(Storage, "write_bytes", lambda *_: pytest.fail("writes"))
    monkeypatch.setattr(Storage, "create_exclusive", lambda *_: pytest.fail("writes"))
    assert ingest_here(folder, tmp_path / "shards") == first


def test_what_another_ingest_did_meanwhile_is_seen(folder, tmp_path, ingest_here, monkeypatch):
    hold = lease.hold

    def after_another(*arguments):
        monkeypatch.setattr(lease, "hold", hold)
        ingest_here(folder, tmp_path / "shards")
        return hold(*arguments)

    monkeypatch.setattr(lease, "hold", after_another)
    told = []
    manifest = ingest_here(folder, tmp_path / "shards", lambda *now: told.append(now))
    assert manifest == ingest_here(folder, tmp_path / "quiet")
    assert {phase for _, _, phase in told} == {"verify"}


def test_a_damaged_dataset_is_written_anew(folder, tmp_path, ingest_here, caplog):
    first = ingest_here(folder, tmp_path / "shards")
    path = tmp_path / "shards/train/00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert ingest_here(folder, tmp_path / "shards") == first
    assert "damaged" in caplog.text
    assert path.read_bytes() == whole
    path.unlink()
    assert ingest_here(folder, tmp_path / "shards") == first
    assert path.read_bytes() == whole


def test_a_destination_that_cannot_be_written_is_refused(folder, tmp_path, ingest_here):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file/shards.*What to do"):
        ingest_here(folder, tmp_path / "file/shards")


def test_a_source_that_changes_meanwhile_is_an_error(folder, tmp_path, ingest_here):
    def change(done, total, phase):
        if (done, phase) == (50, "check"):
            (folder / "dogs/000.jpg").write_bytes((folder / "dogs/003.png").read_bytes())

    with pytest.raises(DataError, match=r"the source changed while it was read: dogs/000.jpg"):
        ingest_here(folder, tmp_path / "shards", progress=change)


def test_keys_and_images_stay_together(folder, tmp_path, ingest_here):
    ingest_here(folder, tmp_path / "shards")
    table = pq.read_table(tmp_path / "shards/train/00000.parquet")
    assert table.num_rows == 16
    for row in table.to_pylist():
        assert row["image"] == (folder / row["key"]).read_bytes()
        assert row["label"] == ("cats", "dogs").index(row["key"].split("/")[0])
        number = int(Path(row["key"]).stem)
        assert (row["height"], row["width"]) == (20 + number % 5, 24 + number % 7)
