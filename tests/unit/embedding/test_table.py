"""A whole collection to a table: each image once, kept parts kept, others' embeddings refused, nothing lost unsaid."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maskray.config.embedding import EmbedConfig
from maskray.config.load import parse
from maskray.data import embeddings
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.embedding.table import embed_here, prepare
from maskray.errors import DataError, MaskrayError


def no_report(done, total, phase):
    pass


@pytest.fixture
def config(digits, digits_encoder, tmp_path):
    """config(**values) -> EmbedConfig: the digits, in small parts."""

    def build(**values):
        places = {"encoder": str(digits_encoder), "images": str(digits), "destination": str(tmp_path / "out")}
        return parse(EmbedConfig, places | {"batch": 64, "part_rows": 300} | values)

    return build


@pytest.fixture
def pictures(tmp_path):
    """A folder of thirty gray pictures in two classes; two of them are none."""
    for i in range(30):
        path = tmp_path / "pictures" / ("cats", "dogs")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8 + i, 30 - i), dtype=np.uint8)).save(path)
    (tmp_path / "pictures/cats/04.png").write_bytes(b"no image")
    (tmp_path / "pictures/dogs/07.png").write_bytes(b"")
    return tmp_path / "pictures"


def files(place) -> dict[str, bytes]:
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in Path(place).rglob("*") if p.is_file()}


def test_every_image_of_all_splits_is_one_row_of_a_table_that_any_reader_opens(config, digits):
    manifest = embed_here(prepare(config()), no_report)
    table = pq.read_table(config().destination)
    assert manifest["rows"] == len(table) == 1797
    assert len(set(table["key"].to_pylist())) == 1797
    assert [p["name"] for p in manifest["parts"]][:2] == [
        "train-000000000-000000255.parquet",  # 300 rows are four portions of 64
        "train-000000256-000000511.parquet",
    ]
    dataset = Dataset.open(str(digits))
    for split in ("train", "held_out"):
        there = table.filter(np.array(table["split"].to_pylist()) == split)
        assert there["row"].to_pylist() == list(range(dataset.num_rows(split)))
        groups = list(dataset.iter_groups(split))
        assert there["key"].to_pylist() == [key for g in groups for key in g.keys]
        assert there["label"].to_pylist() == np.concatenate([g.labels for g in groups]).tolist()
    assert table.schema.field("embedding").type.list_size == 16
    assert manifest["class_names"] == tuple("0123456789")


def test_what_is_read_back_is_what_was_computed(config):
    from maskray.data import portions
    from maskray.evaluation.blocks import blocks_here
    from maskray.models.encoder import load_encoder

    embed_here(prepare(config()), no_report)
    read = list(embeddings.read_parts(Storage(config().destination)))
    images = portions.of_dataset(Dataset.open(config().images), ("train", "held_out"), 64)
    blocks = list(blocks_here(images, load_encoder(config().encoder), 1))
    assert np.array_equal(np.concatenate([r.embeddings for _, r in read]), np.concatenate([b.features for b in blocks]))
    assert np.array_equal(np.concatenate([r.rows for _, r in read]), np.concatenate([b.rows for b in blocks]))
    assert [key for _, r in read for key in r.keys] == [key for b in blocks for key in b.keys]


def test_a_folder_of_pictures_with_some_that_are_none(config, pictures):
    asked = config(images=str(pictures), max_bad_fraction=0.1, part_rows=20, batch=10)
    manifest = embed_here(prepare(asked), no_report)
    assert (manifest["rows"], manifest["undecodable"]) == (28, 2)
    table = pq.read_table(asked.destination)
    assert "split" not in table.column_names
    assert table["label"].to_pylist() == [0] * 14 + [1] * 14
    listed = pq.read_table(f"{asked.destination}/_undecodable.parquet").to_pylist()
    assert [(bad["key"], bad["row"]) for bad in listed] == [("cats/04.png", 2), ("dogs/07.png", 18)]
    assert [bad["reason"] for bad in listed] == ["no image format that is known begins so", "the file is empty"]
    assert sorted(table["row"].to_pylist() + [bad["row"] for bad in listed]) == list(range(30))


def test_too_many_that_cannot_be_decoded_stop_it_and_what_was_computed_is_kept(config, pictures):
    asked = {"images": str(pictures), "part_rows": 10, "batch": 10}
    with pytest.raises(DataError, match=r"too many images cannot be decoded: 1 of 30.*cats/04\.png.*at most 0\.01"):
        embed_here(prepare(config(**asked)), no_report)
    assert embed_here(prepare(config(**asked, max_bad_fraction=0.1)), no_report)["undecodable"] == 2


def test_parts_that_are_there_are_kept_and_the_end_is_the_same_bytes(config, tmp_path):
    embed_here(prepare(config()), no_report)
    expected = files(tmp_path / "out")
    (tmp_path / "out/_manifest.json").unlink()
    for name in ("train-000000512-000000767.parquet", "held_out-000000256-000000323.parquet"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out/.tmp-dead-writer").write_bytes(b"half")
    kept = (tmp_path / "out/train-000000000-000000255.parquet").stat().st_mtime_ns
    seen = []
    embed_here(prepare(config()), lambda done, total, phase: seen.append(done))
    assert seen[0] == 1797 - 256 - 68, "what was there was computed again"
    assert seen[-1] == 1797
    assert files(tmp_path / "out") == expected
    assert (tmp_path / "out/train-000000000-000000255.parquet").stat().st_mtime_ns == kept
    stamp = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert prepare(config()).is_finished
    embed_here(prepare(config()), no_report)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == stamp


def test_a_finished_table_that_lost_a_part_is_completed(config, tmp_path):
    embed_here(prepare(config()), no_report)
    expected = files(tmp_path / "out")
    part = tmp_path / "out/train-000000512-000000767.parquet"
    part.write_bytes(part.read_bytes()[:1000])
    (tmp_path / "out/train-000000256-000000511.parquet").unlink()
    embed_here(prepare(config()), no_report)
    assert files(tmp_path / "out") == expected


def _another_encoder(config, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(config().encoder, other)
    card = json.loads((other / "encoder.json").read_text()) | {"mean": [0.25]}
    (other / "encoder.json").write_text(json.dumps(card))
    return {"encoder": str(other)}, "the encoder .*encoder.* asked for is the encoder .*other"


def _another_dataset(config, tmp_path):
    return {"images": "digits"}, r"the images .*digits \(c?.*asked for is the images digits"


def _other_options(config, tmp_path):
    return {"batch": 32, "splits": ["train"]}, r"batch 64.*splits \['train', 'held_out'\]; asked for is batch 32"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other", [_another_encoder, _another_dataset, _other_options])
def test_other_embeddings_at_the_destination_are_refused_with_both_named(config, tmp_path, other, finished):
    embed_here(prepare(config()), no_report)
    if not finished:
        (tmp_path / "out/_manifest.json").unlink()
    values, says = other(config, tmp_path)
    with pytest.raises(DataError, match=says):
        prepare(config(**values))


def test_parts_of_another_make_are_not_mixed(config, tmp_path, monkeypatch):
    embed_here(prepare(config()), no_report)
    gpu = config(cluster={"gpus_per_worker": 1})
    assert prepare(gpu).is_finished, "what is finished is taken as it is"
    (tmp_path / "out/_manifest.json").unlink()
    with pytest.raises(DataError, match=r"device CPU; asked for is .*device GPU"):
        prepare(gpu)


def test_a_folder_with_other_things_is_refused(config, digits, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    with pytest.raises(DataError, match=r"holds other things than embeddings.*thesis\.tex"):
        prepare(config())


def test_images_and_embeddings_do_not_lie_inside_each_other(config, digits, pictures):
    for images, destination in ((digits, digits), (digits, digits / "out"), (pictures, pictures / "cats")):
        with pytest.raises(DataError, match="lie inside each other"):
            prepare(config(images=str(images), destination=str(destination)))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"encoder": "nowhere"}, r"no encoder\.json in that folder.*nowhere"),
        ({"images": "nowhere"}, "no such folder or file.*nowhere"),
        ({"version": "0123456789abcdef"}, "version: .* has no such version.*0123456789abcdef"),
        ({"encoder": "models:/digits"}, "models:/name@alias or models:/name/version"),
        ({"encoder": "models:/digits@best", "storage": {"path": "/nowhere"}}, "no MLflow store beside the runs"),
    ],
)
def test_mistakes_are_named(config, values, says):
    with pytest.raises(MaskrayError, match=says):
        prepare(config(**values))


def test_labels_that_are_missing_are_null(config, pictures, tmp_path):
    for path in list(pictures.rglob("*.png")):
        path.rename(tmp_path / "pictures" / path.name)
    asked = config(images=str(pictures), max_bad_fraction=0.1)
    embed_here(prepare(asked), no_report)
    assert "label" not in pq.read_table(asked.destination).column_names


def test_from_a_bucket_to_a_bucket(config, pictures, bucket, tmp_path):
    source, target = Storage(f"{bucket}/pictures"), Storage(f"{bucket}/out")
    for path in pictures.rglob("*.png"):
        source.write_bytes(path.relative_to(pictures).as_posix(), path.read_bytes())
    options = {"max_bad_fraction": 0.1, "part_rows": 10, "batch": 10}
    embed_here(prepare(config(images=source.uri, destination=target.uri, **options)), no_report)
    here = config(images=str(pictures), **options)
    embed_here(prepare(here), no_report)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.parquet"))
    assert [n for n in target.list_names() if n.endswith(".parquet")] == names
    assert all(target.read_bytes(n) == (tmp_path / "out" / n).read_bytes() for n in names)
    target.delete("_manifest.json")
    target.delete(names[-1])
    embed_here(prepare(config(images=source.uri, destination=target.uri, **options)), no_report)
    assert target.read_bytes(names[-1]) == (tmp_path / "out" / names[-1]).read_bytes()
