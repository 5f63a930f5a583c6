"""Tables of paths, and Parquet with images in it."""

import json
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskray.data.shards import Dataset
from maskray.data.sources import open_source, tables
from maskray.errors import DataError


def hugging_face(table, features):
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.fixture
def images(picture, encoded):
    return [encoded(picture(i)) for i in range(12)]


@pytest.fixture
def files(tmp_path, images):
    (tmp_path / "pictures").mkdir()
    for i, data in enumerate(images):
        (tmp_path / f"pictures/{i}.png").write_bytes(data)
    return tmp_path


# ------------------------------------------------------------------------------------------------------ tables of paths


def test_a_csv_of_paths_and_numbers(files, images):
    outside = files / "elsewhere.png"
    outside.write_bytes(images[11])
    (files / "t.csv").write_text(
        f'id,path,label\n7,pictures/0.png,2\n8,{outside},0\n9,"pictures/./1.png",1\n10,file://{outside}.gone,1\n'
    )
    source = pickle.loads(pickle.dumps(open_source(str(files / "t.csv"))))
    assert source.class_names == ("0", "1", "2")
    assert [e.label for e in source.entries] == [2, 0, 1, 1]
    assert [source.read(e) for e in source.entries[:3]] == [images[0], images[11], images[1]]
    with pytest.raises(FileNotFoundError):
        source.read(source.entries[3])


def test_a_path_that_no_file_can_have_is_its_own_matter(files, images):
    (files / "t.csv").write_text(f"path\npictures/0.png\n{'n' * 300}.png\nzero\0byte.png\npictures\npictures/1.png\n")
    source = open_source(str(files / "t.csv"))
    good, *bad, last = source.entries
    assert [source.read(good), source.read(last)] == images[:2]
    for entry in bad:
        with pytest.raises(OSError, match=r"too long|no file can have this name|no regular file"):
            source.read(entry)


def test_a_tsv_with_names_in_any_case(files, images):
    (files / "t.tsv").write_text("Class\tFile_Name\nowl\tpictures/0.png\nape\tpictures/1.png\nowl\tpictures/2.png\n")
    source = open_source(str(files / "t.tsv"))
    assert source.class_names == ("ape", "owl")
    assert [e.label for e in source.entries] == [1, 0, 1]
    assert source.read(source.entries[2]) == images[2]


def test_a_csv_without_labels_or_with_some(files, caplog):
    (files / "t.csv").write_text("path\npictures/0.png\npictures/1.png\n")
    assert open_source(str(files / "t.csv")).class_names == ()
    assert caplog.text == ""
    (files / "t.csv").write_text("path,label\npictures/0.png,1\npictures/1.png,\n")
    assert [e.label for e in open_source(str(files / "t.csv")).entries] == [None, None]
    assert "1 of 2 images have no label" in caplog.text


def test_labels_that_are_identifiers_become_names(files):
    (files / "t.csv").write_text("path,label\npictures/0.png,123456789\npictures/1.png,007\n")
    source = open_source(str(files / "t.csv"))
    assert source.class_names == ("007", "123456789")
    assert [e.label for e in source.entries] == [1, 0]


def test_a_parquet_table_of_paths(files, images):
    table = pa.table({"image_path": ["pictures/0.png", "pictures/1.png"], "label": pa.array([1, 0], pa.int8())})
    pq.write_table(hugging_face(table, {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}}), files / "t.parquet")
    source = open_source(str(files / "t.parquet"))
    assert source.class_names == ("no", "yes")
    assert [source.read(e) for e in source.entries] == images[:2]


def test_the_stamp_of_a_table_moves_with_its_images(files):
    (files / "t.csv").write_text("path\npictures/0.png\n")
    before = open_source(str(files / "t.csv")).stamp
    assert open_source(str(files / "t.csv")).stamp == before
    (files / "pictures/0.png").write_bytes(b"another")
    assert open_source(str(files / "t.csv")).stamp != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pictures/0.png\npictures/1.png\n", r"no column of paths.*the columns pictures/0.png.*named one of path"),
        ("path,label\npictures/0.png,1\npictures/0.png,1\n", r"two images have the same key. Found: pictures/0.png"),
        ("path,label\na.png,1,2\n", "cannot be read.*Expected 2 columns"),
        ("", "cannot be read.*Empty CSV"),
        ("path\n\n", "there are no images in it"),
        ("path,label\n,1\n", "a row of .* has no path. Found: row 1"),
        ("path\nhttps://x.org/a.png\n", r"address cannot be read. Found: https://x.org/a.png.*download them"),
    ],
)
def test_tables_that_cannot_be_used_say_why(files, content, message):
    (files / "t.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        open_source(str(files / "t.csv"))


def test_only_one_table_of_paths(files):
    for name in ("a", "b"):
        (files / f"{name}.csv").write_text("path\npictures/0.png\n")
    with pytest.raises(DataError, match="only one table"):
        open_source(str(files / "*.csv"))


# ----------------------------------------------------------------------------------------------------- Parquet of bytes


def write_hugging_face(path, images, first=0, names=("a", "b", "c"), group=4):
    table = pa.table(
        {
            "image": [{"bytes": data, "path": f"{first + i}.png"} for i, data in enumerate(images)],
            "label": pa.array([(first + i) % 3 for i in range(len(images))], pa.int64()),
        }
    )
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
    pq.write_table(hugging_face(table, features), path, row_group_size=group)


def test_the_hugging_face_layout_over_many_files(tmp_path, images):
    (tmp_path / "data").mkdir()
    write_hugging_face(tmp_path / "data/train-00000.parquet", images[:7])
    write_hugging_face(tmp_path / "data/train-00001.parquet", images[7:], first=7)
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path))))
    assert len(pickle.dumps(source.read)) < 600
    assert source.class_names == ("a", "b", "c")
    assert [e.label for e in source.entries] == [i % 3 for i in range(12)]
    assert [source.read(e) for e in source.entries] == images
    assert source.entries[7].key == "data/train-00001.parquet/00000000"
    shuffled = random.Random(0).sample(list(zip(source.entries, images, strict=True)) * 4, 48)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, [e for e, _ in shuffled])) == [data for _, data in shuffled]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_plain_column_of_bytes_and_keys(tmp_path, images, kind):
    table = pa.table({"key": [f"k{i}" for i in range(12)], "jpg": pa.array(images, kind), "other": [b"x"] * 12})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    source = open_source(str(tmp_path / "a.parquet"))
    assert [e.key for e in source.entries] == [f"k{i}" for i in range(12)]
    assert [source.read(e) for e in source.entries] == images
    assert source.class_names == ()


def test_a_dataset_of_ours_can_be_a_source(folder, tmp_path, ingest_here):
    ingest_here(folder, tmp_path / "first", held_out_fraction=0)
    source = open_source(str(tmp_path / "first/train"))
    assert {e.key: source.read(e) for e in source.entries} == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")
    }
    assert len(source.class_names) == 2


def test_rows_without_bytes_are_their_own_matter(tmp_path, images):
    rows = [{"bytes": images[0], "path": None}, {"bytes": None, "path": "far/away.png"}, None]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.read(source.entries[0]) == images[0]
    with pytest.raises(OSError, match=r"only the path far/away\.png"):
        source.read(source.entries[1])
    with pytest.raises(OSError, match="the row is empty"):
        source.read(source.entries[2])


def test_what_was_written_since_is_read_anew(tmp_path, images):
    write_hugging_face(tmp_path / "a.parquet", images)
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.read(source.entries[0]) == images[0]
    write_hugging_face(tmp_path / "a.parquet", images[::-1])
    again = open_source(str(tmp_path / "a.parquet"))
    assert again.stamp != source.stamp
    assert again.read(again.entries[0]) == images[-1]


def test_parquet_that_cannot_be_used_says_why(tmp_path, images, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DataError, match=r"the table .*a.parquet cannot be read"):
        open_source(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column of paths.*the columns text"):
        open_source(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"no column of image bytes.*the columns text"):
        open_source(str(tmp_path))
    write_hugging_face(tmp_path / "a.parquet", images)
    with pytest.raises(DataError, match=r"b.parquet has no column of image bytes"):
        open_source(str(tmp_path))
    write_hugging_face(tmp_path / "a.parquet", images, names=("only one",))
    with pytest.raises(DataError, match=r"a label has no name. Found: 2. Allowed: 0 to 0"):
        open_source(str(tmp_path / "a.parquet"))
    monkeypatch.setattr("maskray.data.sources.tables._MAX_GROUP_BYTES", 1000)
    with pytest.raises(DataError, match=r"a row group of a.parquet is too large.*smaller row groups"):
        open_source(str(tmp_path / "a.parquet"))


def test_threads_that_read_ahead_read_a_row_group_once(tmp_path, images, monkeypatch):
    write_hugging_face(tmp_path / "a.parquet", images, group=4)
    source = open_source(str(tmp_path / "a.parquet"))
    read, reader = [], type(source.read)
    read_group = reader.read_group
    monkeypatch.setattr(
        reader, "read_group", lambda self, name, group: read.append(group) or read_group(self, name, group)
    )
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(source.read, source.entries)) == images
    assert sorted(read) == [0, 1, 2]


def test_no_more_row_groups_are_kept_than_fit(tmp_path, images, monkeypatch):
    monkeypatch.setattr("maskray.data.sources.tables._GROUPS", tables._Groups(max_bytes=1))
    write_hugging_face(tmp_path / "a.parquet", images, group=4)
    source = open_source(str(tmp_path / "a.parquet"))
    assert [source.read(e) for e in source.entries] == images
    assert len(tables._GROUPS._kept) == 1


def test_a_row_group_that_could_not_be_read_is_tried_again():
    groups = tables._Groups(max_bytes=1)
    with pytest.raises(OSError, match="not now"):
        groups.get("a", lambda: (_ for _ in ()).throw(OSError("not now")))
    assert groups.get("a", lambda: pa.chunked_array([["x"]])).to_pylist() == ["x"]


def test_rows_of_parquet_are_not_read_a_second_time_by_ingest(tmp_path, images, monkeypatch, ingest_here):
    write_hugging_face(tmp_path / "a.parquet", images)
    source = open_source(str(tmp_path / "a.parquet"))
    asked, reader = [], type(source.read)
    call = reader.__call__
    monkeypatch.setattr(reader, "__call__", lambda self, entry: asked.append(entry.key) or call(self, entry))
    ingest_here(tmp_path / "a.parquet", tmp_path / "shards", held_out_fraction=0)
    assert sorted(asked) == [e.key for e in source.entries]
    rows = {
        k: d
        for g in Dataset.open(str(tmp_path / "shards")).iter_groups()
        for k, d in zip(g.keys, g.images, strict=True)
    }
    assert [rows[e.key] for e in source.entries] == images


def test_images_of_a_damaged_row_group_are_their_own_matter(tmp_path, images):
    path, rng = tmp_path / "t.parquet", random.Random(0)
    pq.write_table(pa.table({"image": [{"bytes": data, "path": None} for data in images]}), path, row_group_size=4)
    chunk, whole, failed = pq.read_metadata(path).row_group(1).column(0), path.read_bytes(), 0
    for number in range(150):
        content = bytearray(whole)
        for _ in range(3):
            content[chunk.dictionary_page_offset + rng.randrange(100)] = rng.randrange(256)
        path.write_bytes(content)
        os.utime(path, ns=(number, number))
        source = open_source(str(path))
        assert [source.read(e) for e in source.entries[:4]] == images[:4]
        try:
            source.read(source.entries[4])
        except OSError:  # and nothing else
            failed += 1
    assert failed > 10
