"""What is said of a dataset is what is in it."""

from pathlib import Path

import numpy as np
import pytest

from maskray.data.mapper import thread_mapper
from maskray.data.overview import overview, samples
from maskray.data.shards import Dataset


@pytest.fixture
def dataset(folder, tmp_path, ingest_here, picture, encoded):
    (folder / "cats/alpha.png").write_bytes(encoded(picture(77, 70, 300).convert("RGBA")))
    (folder / "cats/gray.png").write_bytes(encoded(picture(78, 9, 12).convert("L")))
    (folder / "cats/again.jpg").write_bytes((folder / "dogs/000.jpg").read_bytes())
    for name in ("a", "b"):
        (folder / f"dogs/{name}.png").write_bytes(b"")
    ingest_here(folder, tmp_path / "shards", deduplicate=True, max_bad_fraction=0.1)
    return Dataset.open(str(tmp_path / "shards"))


def test_counts_are_those_of_the_images(dataset):
    found = overview(dataset, thread_mapper(2), lambda *told: None)
    train, held_out = (sum(counts[split] for counts in found.classes.values()) for split in ("train", "held_out"))
    assert (train, held_out) == (dataset.num_rows("train"), dataset.num_rows("held_out"))
    assert {name: sum(counts.values()) for name, counts in found.classes.items()} == {"cats": 36, "dogs": 16}
    assert found.short_sides == {8: 1, 16: 50, 64: 1}
    assert found.channels == {1: 1, 3: 50, 4: 1}
    assert found.reasons == {"the file is empty": 2, "duplicate": 1}
    assert [m.fingerprint for m in found.versions] == [dataset.manifest.fingerprint]


def test_each_version_has_its_own_reasons(dataset, folder, ingest_here, picture, caplog):
    (folder / "dogs/a.png").unlink()
    (folder / "dogs/c.png").write_bytes(b"x")
    picture(99).save(folder / "cats/new.png")
    path = Path(dataset.storage.uri)
    second = ingest_here(folder, path, add=True, deduplicate=True, max_bad_fraction=0.1)

    def reasons(version):
        return overview(Dataset.open(str(path), version), thread_mapper(2), lambda *told: None).reasons

    first = dataset.manifest
    assert sum(reasons(second.fingerprint).values()) == second.num_quarantined + second.num_duplicates == 4
    assert reasons(first.fingerprint) == {"the file is empty": 2, "duplicate": 1}
    (path / f"versions/{first.fingerprint}.quarantine").unlink()  # an older maskray had one list for all
    assert reasons(first.fingerprint) == {}
    assert f"what version {first.fingerprint} of {path} set aside is not known" in caplog.text


def test_samples_are_of_all_the_dataset_and_small(dataset):
    found = samples(dataset, 12, 32)
    assert len({sample.key for sample in found}) == 12
    assert {sample.label for sample in found} == {"cats", "dogs"}
    assert all(sample.label == sample.key.split("/")[0] for sample in found)
    assert all(max(sample.image_HWC.shape[:2]) <= 32 for sample in found)
    assert all(sample.image_HWC.dtype == np.uint8 and sample.image_HWC.shape[2] == 3 for sample in found)
    assert len(samples(dataset, 1000, 32)) == dataset.num_rows()
