"""Images added later: a new version whose old rows stay where they are, and an old version that stays readable."""

import logging
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from maskray.data.check import check
from maskray.data.garbage import delete_garbage, find_garbage
from maskray.data.manifest import MANIFEST, PixelSums, grid_of, versions
from maskray.data.mapper import thread_mapper
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.errors import DataError


@pytest.fixture
def more(tmp_path, picture):
    """more(first, last): thirty-odd pictures of another class."""

    def make(first, last, name="birds"):
        folder = tmp_path / "more" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(first, last):
            picture(i).save(folder / f"{i}.png")
        return tmp_path / "more"

    return make


def groups_of(path, version=None, split="train"):
    return [(g.keys, g.images, g.labels.tolist()) for g in Dataset.open(str(path), version).iter_groups(split)]


def files_of(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("group_rows", [8, 7, 64])  # the training split ends with a full one, a short one, has only one
def test_old_row_groups_stay_and_only_the_last_is_short(folder, tmp_path, ingest_here, more, group_rows):
    first = ingest_here(folder, tmp_path / "shards", group_rows=group_rows)
    before = {split: groups_of(tmp_path / "shards", None, split) for split in ("train", "held_out")}
    second = ingest_here(more(100, 133), tmp_path / "shards", group_rows=group_rows, add=True)
    assert second.class_names == ("cats", "dogs", "birds")
    for split, old in before.items():
        full = first.splits[split].rows // group_rows
        new = groups_of(tmp_path / "shards", None, split)
        assert new[:full] == old[:full]
        assert [len(keys) for keys, _, _ in new[:-1]] == [group_rows] * (len(new) - 1)
        keys = [key for group in new for key in group[0]]
        assert keys[: first.splits[split].rows] == [key for group in old for key in group[0]]
        assert len(set(keys)) == len(keys) == second.splits[split].rows
        for group_keys, _, labels in new:
            assert labels == [second.class_names.index(key.split("/")[0]) for key in group_keys]
        assert groups_of(tmp_path / "shards", first.fingerprint, split) == old
    assert sum(split.rows for split in second.splits.values()) == 50 + 33
    assert list(versions(Storage(tmp_path / "shards"))) == [first.fingerprint, second.fingerprint]
    assert [(o.rows, o.skipped) for o in second.origins] == [(50, 0), (33, 0)]


def test_a_grown_source_adds_what_is_new(folder, tmp_path, ingest_here, picture, caplog):
    first = ingest_here(folder, tmp_path / "shards", group_rows=4, seed=3)
    with caplog.at_level(logging.WARNING):
        (folder / "cats/001.png").touch()
        assert ingest_here(folder, tmp_path / "shards", group_rows=4, seed=3, add=True) == first
    assert "nothing to add, all 50 images are there already" in caplog.text
    for i in range(200, 205):
        picture(i).save(folder / "cats" / f"{i}.png")
    second = ingest_here(folder, tmp_path / "shards", group_rows=4, seed=3, add=True)
    assert (second.origins[-1].rows, second.origins[-1].skipped) == (5, 50)
    again = ingest_here(folder, tmp_path / "shards", group_rows=4, seed=3)
    assert again == second, "what was added is recognised without --add too"
    assert ingest_here(folder, tmp_path / "shards", group_rows=4, seed=3, add=True) == second


def test_what_cannot_be_added_is_named_where_nothing_is_added(folder, tmp_path, ingest_here, caplog):
    first = ingest_here(folder, tmp_path / "shards", held_out_fraction=0)
    for name in ("bad.png", "worse.png"):
        (folder / "cats" / name).write_bytes(b"x")
    assert ingest_here(folder, tmp_path / "shards", held_out_fraction=0, add=True, max_bad_fraction=1) == first
    assert "nothing to add: 50 images are there already, and 2 were set aside: cats/bad.png (" in caplog.text
    assert "; cats/worse.png (" in caplog.text


def test_the_result_is_that_of_the_same_steps_elsewhere(folder, tmp_path, ingest_here, more):
    for place in ("a", "b"):
        ingest_here(folder, tmp_path / place)
    shutil.rmtree(tmp_path / "b/versions")  # as a kill right after the first manifest leaves it
    source = more(1, 20)
    assert ingest_here(source, tmp_path / "a", add=True) == ingest_here(source, tmp_path / "b", add=True)
    assert files_of(tmp_path / "a").keys() == files_of(tmp_path / "b").keys()


def test_the_order_of_rows_does_not_hang_on_which_versions_were_kept(folder, tmp_path, ingest_here, picture):
    fingerprints = []
    for place in (tmp_path / "all", tmp_path / "cleaned"):
        ingest_here(folder, place)
        for number, (first, last) in enumerate([(100, 110), (120, 160)]):
            for i in range(first, last):
                (tmp_path / f"{number}/birds").mkdir(parents=True, exist_ok=True)
                picture(i).save(tmp_path / f"{number}/birds/{i}.png")
            manifest = ingest_here(tmp_path / str(number), place, add=True)
            if place.name == "cleaned":
                delete_garbage(Storage(place), find_garbage(Storage(place), set()))
        fingerprints.append(manifest.fingerprint)
    assert len(set(fingerprints)) == 1
    assert list(versions(Storage(tmp_path / "cleaned"))) == fingerprints[:1]
    assert groups_of(tmp_path / "cleaned") == groups_of(tmp_path / "all")


def test_statistics_are_those_of_all_images(folder, tmp_path, ingest_here, more):
    ingest_here(folder, tmp_path / "shards")
    second = ingest_here(more(100, 133), tmp_path / "shards", add=True)
    from maskray.data.decode import decode

    groups = groups_of(tmp_path / "shards")
    sums = [PixelSums.of(grid_of(decode(data, 3).numpy())) for _, images, _ in groups for data in images]
    assert second.sums == sum(sums[1:], sums[0])
    assert second.splits["train"].pixels == sum(s.pixels for s in sums)


def test_a_key_with_other_bytes_is_refused_by_name(folder, tmp_path, ingest_here, picture):
    first = ingest_here(folder, tmp_path / "shards")
    picture(999).save(folder / "dogs/003.png")
    with pytest.raises(DataError, match=r"source: 1 images have other bytes.*dogs/003.png"):
        ingest_here(folder, tmp_path / "shards", add=True)
    assert Dataset.open(str(tmp_path / "shards")).manifest == first


def test_added_images_come_under_the_options_of_the_dataset(folder, tmp_path, ingest_here, more):
    from maskray.config.schema import IngestConfig
    from maskray.data.ingest import ingest

    first = ingest_here(folder, tmp_path / "shards", resize_short=16)
    config = IngestConfig(source=str(more(100, 110)), destination=str(tmp_path / "shards"), add=True)
    second = ingest(config, thread_mapper(2))
    assert (second.group_rows, second.layout) == (first.group_rows, first.layout)
    assert second.layout["resize_short"] == 16
    with pytest.raises(DataError, match=r"resize_short: .*another value.*Found: 20. Allowed: 16"):
        ingest(config.model_copy(update={"resize_short": 20}), thread_mapper(2))


def test_added_images_are_taken_under_the_options_of_the_last_ingest_unless_told(folder, tmp_path, ingest_here, more):
    (folder / "cats/copy.png").write_bytes((folder / "dogs/003.png").read_bytes())
    first = ingest_here(folder, tmp_path / "shards", deduplicate=True)
    more(100, 110)
    for i in (100, 101):
        (tmp_path / f"more/birds/copy{i}.png").write_bytes((tmp_path / f"more/birds/{i}.png").read_bytes())
    second = ingest_here(tmp_path / "more", tmp_path / "shards", add=True)
    assert second.origins[-1].options == first.origins[0].options
    assert (second.num_duplicates, second.origins[-1].rows) == (3, 10)
    third = ingest_here(tmp_path / "more", tmp_path / "shards", add=True, deduplicate=False)
    assert (third.num_duplicates, third.origins[-1].rows, third.origins[-1].skipped) == (1, 2, 10)


def test_mistakes_of_adding(folder, tmp_path, ingest_here, more):
    with pytest.raises(DataError, match=r"destination: there is no dataset to add to"):
        ingest_here(folder, tmp_path / "shards", add=True)
    ingest_here(folder, tmp_path / "shards")
    with pytest.raises(DataError, match=r"source: the dataset has classes, and the source has none"):
        ingest_here(more(1, 5) / "birds", tmp_path / "shards", add=True)


def test_copies_of_images_that_are_there_are_set_aside(folder, tmp_path, ingest_here, more):
    ingest_here(folder, tmp_path / "shards")
    (more(100, 110) / "birds/copy.png").write_bytes((folder / "dogs/003.png").read_bytes())
    second = ingest_here(more(100, 100), tmp_path / "shards", add=True, deduplicate=True)
    assert (second.num_duplicates, second.origins[-1].rows) == (1, 10)
    (row,) = pq.read_table(tmp_path / "shards/quarantine.parquet").to_pylist()
    assert (row["key"], row["reason"], row["kind"]) == ("birds/copy.png", "duplicate of dogs/003.png", "duplicate")


def test_what_was_set_aside_before_stays_listed(folder, tmp_path, ingest_here, more, picture):
    (folder / "cats/bad.png").write_bytes(b"x")
    (folder / "cats/mended.png").write_bytes(b"x")
    ingest_here(folder, tmp_path / "shards", max_bad_fraction=0.1)
    (more(100, 110) / "birds/worse.png").write_bytes(b"x")
    second = ingest_here(more(100, 100), tmp_path / "shards", add=True, max_bad_fraction=0.1)
    assert second.num_quarantined == 3
    picture(7).save(folder / "cats/mended.png")
    third = ingest_here(folder, tmp_path / "shards", add=True, max_bad_fraction=0.1)
    assert third.num_quarantined == 2
    listed = pq.read_table(tmp_path / "shards/quarantine.parquet")
    assert listed["key"].to_pylist() == ["birds/worse.png", "cats/bad.png"]


def test_an_addition_that_was_killed_and_given_up_leaves_no_trace(
    folder, tmp_path, ingest_here, more, picture, monkeypatch
):
    write = Storage.write_bytes

    def killed(storage, name, content):
        if name == MANIFEST:
            raise KeyboardInterrupt
        write(storage, name, content)

    ingest_here(folder, tmp_path / "shards")
    shutil.copytree(tmp_path / "shards", tmp_path / "quiet")
    (more(100, 110) / "birds/bad.png").write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            ingest_here(tmp_path / "more", tmp_path / "shards", add=True, max_bad_fraction=0.2)
    assert pq.read_table(tmp_path / "shards/quarantine.parquet").num_rows == 0
    (tmp_path / "other/fish").mkdir(parents=True)
    picture(200).save(tmp_path / "other/fish/200.png")
    second = ingest_here(tmp_path / "other", tmp_path / "shards", add=True)
    assert second == ingest_here(tmp_path / "other", tmp_path / "quiet", add=True)
    assert second.num_quarantined == 0
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "quiet")


def test_the_list_of_the_newest_is_laid_out_after_a_kill_before_that(folder, tmp_path, ingest_here):
    (folder / "cats/bad.png").write_bytes(b"x")
    ingest_here(folder, tmp_path / "shards", max_bad_fraction=0.1)
    before = files_of(tmp_path / "shards")
    (tmp_path / "shards/quarantine.parquet").unlink()
    ingest_here(folder, tmp_path / "shards", max_bad_fraction=0.1)
    assert files_of(tmp_path / "shards") == before


def test_a_dataset_with_one_list_for_all_versions_is_added_to(folder, tmp_path, ingest_here, more):
    """As an older maskray left it."""
    (folder / "cats/bad.png").write_bytes(b"x")
    for place in ("new", "old"):
        ingest_here(folder, tmp_path / place, max_bad_fraction=0.1)
    for path in (tmp_path / "old").glob("versions/*.quarantine"):
        path.unlink()
    (more(100, 110) / "birds/worse.png").write_bytes(b"x")
    for place in ("new", "old"):
        ingest_here(tmp_path / "more", tmp_path / place, add=True, max_bad_fraction=0.1)
    assert files_of(tmp_path / "old") == files_of(tmp_path / "new")


def test_a_damaged_dataset_of_two_sources_cannot_be_mended_from_one(folder, tmp_path, ingest_here, more):
    ingest_here(folder, tmp_path / "shards")
    ingest_here(more(100, 110), tmp_path / "shards", add=True)
    (tmp_path / "shards/train/00000.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"damaged.*2 sources. Found: train/00000.parquet.*copy"):
        ingest_here(folder, tmp_path / "shards")


def test_another_version_is_asked_for_by_name(folder, tmp_path, ingest_here):
    first = ingest_here(folder, tmp_path / "shards")
    with pytest.raises(DataError, match=rf"data.version: .*no such version. Found: 0123. Allowed: {first.fingerprint}"):
        Dataset.open(str(tmp_path / "shards"), "0123")


# ------------------------------------------------------------------------------------------------------------- garbage


@pytest.fixture
def three_versions(folder, tmp_path, ingest_here, more):
    """A dataset to which images were added twice; its versions, oldest first."""
    ingest_here(folder, tmp_path / "shards")
    ingest_here(more(100, 110), tmp_path / "shards", add=True)
    shutil.rmtree(tmp_path / "more")
    ingest_here(more(120, 133), tmp_path / "shards", add=True)
    return tmp_path / "shards", list(versions(Storage(tmp_path / "shards")).values())


def test_nothing_goes_while_all_versions_are_in_use(three_versions):
    path, manifests = three_versions
    garbage = find_garbage(Storage(path), {m.fingerprint for m in manifests})
    assert (garbage.files, garbage.versions) == ({}, [])


@pytest.mark.parametrize("used", [0, 1, None])
def test_what_no_version_in_use_needs_goes_and_nothing_else(three_versions, used):
    path, manifests = three_versions
    kept = [m for number, m in enumerate(manifests) if number in (used, 2)]
    before = {m.fingerprint: groups_of(path, m.fingerprint) for m in kept}
    (path / "train/.tmp-1-00000.parquet").write_bytes(b"left by a kill")
    garbage = find_garbage(Storage(path), {m.fingerprint for m in kept} | {"another dataset's"})
    sizes = {p.relative_to(path).as_posix(): p.stat().st_size for p in path.rglob("*") if p.is_file()}
    assert garbage.files.items() <= sizes.items()
    assert garbage.kept == [m.fingerprint for m in kept]
    delete_garbage(Storage(path), garbage)
    left = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert left == {
        *("manifest.json", "quarantine.parquet"),
        *(f"versions/{m.fingerprint}{end}" for m in kept for end in (".json", ".quarantine")),
        *(shard.name for m in kept for shard in m.shards),
    }
    assert {m.fingerprint: groups_of(path, m.fingerprint) for m in kept} == before
    assert check(str(path), thread_mapper(2), lambda *told: None)


def test_nothing_goes_while_an_ingest_is_under_way(three_versions):
    path, _ = three_versions
    garbage = find_garbage(Storage(path), set())
    (path / ".ingest/0123/survey").mkdir(parents=True)
    (path / ".ingest/0123/survey/00000.parquet").write_bytes(b"")
    for action in (lambda: find_garbage(Storage(path), set()), lambda: delete_garbage(Storage(path), garbage)):
        with pytest.raises(DataError, match=r"an ingest into .* is under way.*\.ingest"):
            action()


def test_what_came_into_use_meanwhile_does_not_go(three_versions, ingest_here, more):
    path, _ = three_versions
    garbage = find_garbage(Storage(path), set())
    shutil.rmtree(path.parent / "more")
    ingest_here(more(140, 150), path, add=True)
    with pytest.raises(DataError, match="has changed since"):
        delete_garbage(Storage(path), garbage)


def test_no_dataset_no_garbage(tmp_path):
    with pytest.raises(DataError, match="no such dataset"):
        find_garbage(Storage(tmp_path / "nothing"), set())


# --------------------------------------------------------------------------------------------------------------- check


def test_every_damaged_shard_of_every_version_is_named(three_versions):
    path, (first, *_) = three_versions
    old = [s.name for s in first.shards if s.name.startswith("train/")][-1]
    content = bytearray((path / old).read_bytes())
    content[len(content) // 2] ^= 1
    (path / old).write_bytes(content)
    (path / "held_out/00000.parquet").unlink()
    with pytest.raises(DataError, match=rf"2 of the \d+ shards .*{old}, held_out/00000.parquet"):
        check(str(path), thread_mapper(2), lambda *told: None)


def test_a_stream_reads_the_version_it_began_with(folder, tmp_path, ingest_here, more, tiny, runs):
    from maskray.data.spec import StreamSpec
    from maskray.data.stream import load_unit
    from maskray.preparing import prepare

    first = ingest_here(folder, tmp_path / "shards")
    data = {"path": str(tmp_path / "shards"), "image_size": 8, "channels": 3}
    prepared = prepare(tiny(data=data, optim={"global_batch": 16}))
    assert prepared.config.data.version == first.fingerprint
    spec = StreamSpec.of(prepared.config, prepared.plan, prepared.dataset)
    before = load_unit(spec, spec.open_dataset(), 0)
    ingest_here(more(100, 133), tmp_path / "shards", add=True)
    np.testing.assert_array_equal(load_unit(spec, spec.open_dataset(), 0).images_NCHW, before.images_NCHW)
    assert spec.open_dataset().manifest == first
