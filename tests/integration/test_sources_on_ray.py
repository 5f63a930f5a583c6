"""Each kind of source is read in Ray tasks as it is in threads, from a bucket over HTTP too."""

import io
import shutil
import tarfile

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from maskray.config.schema import IngestConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.on_ray.ingest import ray_mapper

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def places(tmp_path):
    """The same images as a folder, a tar, a zip, Parquet and a table."""
    rng, root = np.random.default_rng(0), tmp_path / "places"
    (root / "folder").mkdir(parents=True)
    (root / "parquet").mkdir()
    images = {}
    for number in range(40):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(buffer, "PNG")
        images[f"{number:02d}.png"] = buffer.getvalue()
    for name, data in images.items():
        (root / "folder" / name).write_bytes(data)
    shutil.make_archive(str(root / "packed"), "zip", root / "folder")
    with tarfile.open(root / "packed.tar", "w") as tar:
        for name in images:
            tar.add(root / "folder" / name, name)
    table = pa.table({"key": list(images), "image": list(images.values())})
    pq.write_table(table, root / "parquet/a.parquet", row_group_size=16)
    return root


@pytest.fixture
def address(places, monkeypatch):
    """The same places in a bucket. Its workers have no credentials: the address says all."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host = "{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    client.create_bucket(Bucket="images")
    for path in places.rglob("*.*"):
        client.upload_file(str(path), "images", path.relative_to(places).as_posix(), {"ACL": "public-read"})
    yield lambda name: f"s3://images/{name}?endpoint_override={host}&scheme=http&anonymous=true"
    server.stop()


def test_the_dataset_is_the_same_whatever_it_is_made_from_and_wherever_that_lies(places, address, tmp_path):
    def made(source, mapper, name):
        config = IngestConfig(source=source, destination=str(tmp_path / name), group_rows=8)
        return ingest(config, mapper).splits

    expected = made(str(places / "folder"), thread_mapper(2), "threads")
    assert made(str(places / "packed.tar"), ray_mapper(), "here") == expected
    for kind in ("folder", "packed.tar", "packed.zip", "parquet"):
        assert made(address(kind), ray_mapper(), f"there {kind}") == expected, kind
