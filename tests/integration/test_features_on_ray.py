"""Features over a cluster: the bits of one process, in order, on any number of workers that come and go."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import ray

from maskray import appraisal
from maskray.config.evaluation import EvaluateConfig
from maskray.config.load import parse
from maskray.config.schema import ClusterConfig
from maskray.data import portions
from maskray.data.shards import Dataset
from maskray.errors import ClusterError, DataError
from maskray.evaluation.blocks import blocks_here
from maskray.models.encoder import load_encoder
from maskray.on_ray import evaluate, features
from maskray.on_ray.features import blocks_on_ray, feature_blocks

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def equal(one, other):
    return len(one) == len(other) and all(
        a.keys == b.keys
        and all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("rows", "labels", "features"))
        and a.undecodable == b.undecodable
        for a, b in zip(one, other, strict=True)
    )


def test_workers_give_the_bits_of_one_process_in_order(digits, digits_encoder):
    dataset = Dataset.open(str(digits))
    found = list(feature_blocks(dataset, "train", digits_encoder, ClusterConfig(workers=2)))
    images = portions.of_split(dataset, "train", features.BATCH)
    assert equal(found, list(blocks_here(images, load_encoder(digits_encoder), threads=1)))
    assert sum(len(block.rows) for block in found) == dataset.num_rows()


class _Slow:
    """Images that say which process reads them, each some time."""

    def __init__(self, read, folder):
        self.read, self.folder = read, folder

    def __call__(self, portion):
        (self.folder / f"{os.getpid()}-{portion.first}").touch()
        time.sleep(0.1)
        return self.read(portion)


def test_a_worker_that_is_killed_loses_nothing(digits, digits_encoder, tmp_path):
    images = portions.of_split(Dataset.open(str(digits)), "train", 64)
    encoder = load_encoder(digits_encoder)
    slow = replace(images, read=_Slow(images.read, tmp_path))
    found, killed = [], set()
    for block in blocks_on_ray(slow, encoder, ClusterConfig(workers=2)):
        found.append(block)
        if len(found) in (3, 9):
            pid = next(int(p.name.split("-")[0]) for p in tmp_path.iterdir() if int(p.name.split("-")[0]) not in killed)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    assert equal(found, list(blocks_here(images, encoder, threads=1)))
    readers = {int(p.name.split("-")[0]) for p in tmp_path.iterdir()}
    assert len(readers) == 4, "no worker took the place of a killed one"
    # Each worker reads many portions: it is not started, nor the encoder loaded, for each of them.
    assert len(list(tmp_path.iterdir())) >= images.num_rows // 64


class _Deadly:
    def __init__(self, read):
        self.read = read

    def __call__(self, portion):
        if portion.first == 128:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.read(portion)


def test_rows_that_end_every_process_are_named(digits, digits_encoder):
    images = portions.of_split(Dataset.open(str(digits)), "train", 64)
    deadly = replace(images, read=_Deadly(images.read))
    cluster = ClusterConfig(workers=1, max_failures=0)
    with pytest.raises(ClusterError, match="that have rows 128 to 191 are lost each time"):
        list(blocks_on_ray(deadly, load_encoder(digits_encoder), cluster))


def test_a_damaged_shard_is_named_and_workers_are_let_go(digits, digits_encoder, tmp_path):
    import shutil

    shutil.copytree(digits, tmp_path / "digits")
    dataset = Dataset.open(str(tmp_path / "digits"))
    (tmp_path / "digits/train/00000.parquet").unlink()
    with pytest.raises(DataError, match=r"train/00000\.parquet cannot be read"):
        list(feature_blocks(dataset, "train", digits_encoder, ClusterConfig(workers=1)))
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 6


def test_a_folder_of_pictures_is_embedded_to_the_bytes_of_threads(digits_encoder, tmp_path):
    from PIL import Image

    from maskray.config.embedding import EmbedConfig
    from maskray.config.load import parse
    from maskray.embedding.table import embed_here, prepare
    from maskray.on_ray.embed import embed

    (tmp_path / "in").mkdir()
    for i in range(40):
        picture = np.random.default_rng(i).integers(0, 256, (8 + i, 50 - i, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"in/{i:02d}.png")
    (tmp_path / "in/11.png").write_bytes(b"no picture")
    results = []
    for name, run in (("ray", embed), ("threads", embed_here)):
        asked = {"encoder": str(digits_encoder), "images": str(tmp_path / "in"), "destination": str(tmp_path / name)}
        options = {"batch": 7, "part_rows": 15, "max_bad_fraction": 0.1, "cluster": {"workers": 2}}
        manifest = run(prepare(parse(EmbedConfig, asked | options)), lambda done, total, phase: None)
        assert (manifest["rows"], manifest["undecodable"]) == (39, 1)
        results.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert results[0] == results[1]


def test_more_than_the_cluster_has_is_refused_before_anything_starts(digits, digits_encoder, tmp_path):
    from maskray.config.embedding import EmbedConfig
    from maskray.config.load import parse
    from maskray.embedding.table import prepare
    from maskray.on_ray.embed import embed

    asked = {"encoder": str(digits_encoder), "images": str(digits), "destination": str(tmp_path / "out")}
    for cluster, says in (({"workers": 7}, "1 CPU short"), ({"gpus_per_worker": 1}, "1 GPU short")):
        with pytest.raises(ClusterError, match=says):
            embed(prepare(parse(EmbedConfig, asked | {"cluster": cluster})), lambda done, total, phase: None)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_on_the_cluster_is_that_of_one_process(digits, digits_encoder):
    plain = {
        "name": "digits",
        "model": str(digits_encoder),
        "data": {"path": str(digits)},
        "evaluations": [{"kind": "knn"}, {"kind": "logistic", "labels_per_class": 5, "draws": 2}],
        "cluster": {"workers": 2},
    }
    prepared = appraisal.prepare(parse(EvaluateConfig, plain))
    assert evaluate.appraise(prepared) == appraisal.appraise_here(prepared)
