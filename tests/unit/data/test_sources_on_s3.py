"""The same sources in a bucket, over HTTP: the bytes, keys, labels and mistakes are those of a local folder."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from maskray.data.sources import open_source
from maskray.errors import DataError, StorageError


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch, request):
    """A fresh bucket, reached as the standard variables say."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"b{abs(hash(request.node.name))}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=name)

    def upload(folder, prefix="data"):
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), name, f"{prefix}/{path.relative_to(folder).as_posix()}")
        return f"s3://{name}/{prefix}"

    upload.client, upload.name = client, name
    yield upload
    s3fs.S3FileSystem.clear_instance_cache()


def whole(source):
    source = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        data = list(pool.map(source.read, source.entries))
    return [(e.key, e.label, e.place, d) for e, d in zip(source.entries, data, strict=True)], source.class_names


def test_every_kind_of_source_is_the_same_in_a_bucket(folder, tmp_path, bucket, ingest_here):
    for path in sorted(folder.rglob("*.*"))[::-1][:40]:
        path.unlink()
    (folder / "dogs/1.png").write_bytes(next(folder.rglob("*.*")).read_bytes())
    places = tmp_path / "places"
    shutil.copytree(folder, places / "images")
    shutil.make_archive(str(places / "tar"), "tar", folder)
    shutil.make_archive(str(places / "zip"), "zip", folder)
    for name in ("one", "two"):
        (places / "tars").mkdir(exist_ok=True)
        shutil.copy(places / "tar.tar", places / f"tars/{name}.tar")
    keys = [path.relative_to(places).as_posix() for path in sorted((places / "images").rglob("*.*"))]
    (places / "table.csv").write_text("path,label\n" + "".join(f"{key},{key.split('/')[1]}\n" for key in keys))
    ingest_here(folder, tmp_path / "shards", held_out_fraction=0)
    shutil.copytree(tmp_path / "shards/train", places / "parquet")
    address = bucket(places)
    for name in ("images", "tar.tar", "zip.zip", "tars", "tars/*.tar", "table.csv", "parquet", "images/cats/*.jpg"):
        local, remote = open_source(f"{places}/{name}"), open_source(f"{address}/{name}")
        expected, found = whole(local), whole(remote)
        if name == "table.csv":  # a bucket is not asked for the size of each
            expected = ([(k, n, p._replace(size=0), d) for k, n, p, d in expected[0]], expected[1])
        assert found == expected, name
        assert len(pickle.dumps(remote.read)) < 600
        assert remote.stamp == open_source(f"{address}/{name}").stamp


def test_the_endpoint_may_stand_in_the_address(folder, bucket, server, monkeypatch):
    address = bucket(folder)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = server.removeprefix("http://")
    source = open_source(f"{address}?endpoint_override={host}&scheme=http&region=eu-west-1")
    assert whole(source)[0][0][3] == (folder / source.entries[0].key).read_bytes()
    with pytest.raises(
        DataError, match=r"option of the address is not known. Found: colour. Allowed: endpoint_override"
    ):
        open_source(f"{address}?colour=red")


def test_a_folder_in_a_bucket_is_ingested_as_a_local_one(folder, tmp_path, bucket, ingest_here):
    remote = ingest_here(bucket(folder), tmp_path / "remote")
    assert remote.content == ingest_here(folder, tmp_path / "local").content
    assert ingest_here(f"s3://{bucket.name}/data", tmp_path / "remote") == remote


def test_the_stamp_moves_with_the_objects(folder, bucket):
    address = bucket(folder)
    before = open_source(address).stamp
    bucket.client.put_object(Bucket=bucket.name, Key="data/dogs/000.jpg", Body=b"x")
    assert open_source(address).stamp != before


def test_one_object_that_is_missing_is_its_own_matter(folder, bucket):
    source = open_source(bucket(folder))
    bucket.client.delete_object(Bucket=bucket.name, Key="data/dogs/000.jpg")
    (gone,) = (e for e in source.entries if e.key == "dogs/000.jpg")
    with pytest.raises(FileNotFoundError):
        source.read(gone)


def test_hidden_objects_and_marks_of_folders_are_left_out(folder, bucket):
    address = bucket(folder)
    for key in ("data/", "data/cats/", "data/.cache/1.png", "data/.2.png", "datas/3.png"):
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"")
    assert len(open_source(address).entries) == 50


def test_names_that_are_special_to_urls_and_patterns(tmp_path, bucket, picture, encoded):
    (tmp_path / "in").mkdir()
    for name in ("a b.png", "c#d.png", "e%20f.png", "g[h]*.png", "i?j.png", "猫.png", "+.png"):
        (tmp_path / "in" / name).write_bytes(encoded(picture(len(name))))
    address = bucket(tmp_path / "in")
    assert whole(open_source(address)) == whole(open_source(str(tmp_path / "in")))


def test_what_is_not_there_is_said(bucket, monkeypatch):
    for address in (f"s3://{bucket.name}/nothing", f"s3://{bucket.name}/nothing.tar", "s3://no-such-bucket/x"):
        with pytest.raises((DataError, StorageError), match=r"no such folder or file|there are no images|cannot read"):
            open_source(address)


def test_an_endpoint_that_does_not_answer_is_the_storages_fault(folder, bucket, monkeypatch):
    source = open_source(bucket(folder))
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    for attempt in (lambda: source.read(source.entries[0]), lambda: open_source(f"s3://{bucket.name}/data")):
        with pytest.raises(StorageError, match=r"cannot read s3://.*credentials in the environment"):
            attempt()
