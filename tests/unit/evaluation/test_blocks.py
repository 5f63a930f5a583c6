"""Features of many images: each row once, the bits of the encoder alone, whoever computes them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskray.data import portions
from maskray.data.shards import Dataset
from maskray.data.sources import open_source
from maskray.data.stream import walk
from maskray.evaluation.blocks import blocks_here
from maskray.models.encoder import load_encoder

MAX_PIXELS = 10**6


@pytest.mark.parametrize("max_rows", [None, 100])
def test_each_row_of_a_split_once_with_the_features_of_the_walk(digits: Path, digits_encoder: Path, max_rows):
    dataset, encoder = Dataset.open(str(digits)), load_encoder(digits_encoder)
    blocks = list(blocks_here(portions.of_split(dataset, "held_out", 48, max_rows), encoder, threads=2))
    groups = list(walk(dataset, "held_out", (8, 8), 1, max_rows))
    assert [k for b in blocks for k in b.keys] == [k for g in groups for k in g.keys]
    assert np.array_equal(np.concatenate([b.rows for b in blocks]), np.concatenate([g.rows for g in groups]))
    assert np.array_equal(np.concatenate([b.labels for b in blocks]), np.concatenate([g.labels for g in groups]))
    images = torch.cat([g.images_BCHW for g in groups])
    expected = [encoder(images[at : at + 48]).numpy() for at in range(0, len(images), 48)]
    assert np.array_equal(np.concatenate([b.features for b in blocks]), np.concatenate(expected))
    assert [len(b.rows) for b in blocks] == [len(e) for e in expected]
    assert len(expected[-1]) < 48, "no short last portion was seen"
    assert not any(b.undecodable for b in blocks)


def test_a_folder_of_images_of_all_sizes_and_some_that_are_none(tmp_path: Path, digits_encoder: Path):
    for i in range(23):
        path = tmp_path / ("cats", "dogs")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8 + i, 30 - i), dtype=np.uint8)).save(path)
    (tmp_path / "cats/04.png").write_bytes(b"no image")
    Image.new("L", (1001, 1000)).save(tmp_path / "dogs/07.png")
    encoder = load_encoder(digits_encoder)
    images = portions.of_source(open_source(str(tmp_path)), 10, MAX_PIXELS, threads=3)
    (tmp_path / "cats/08.png").unlink()  # between the listing and the reading
    blocks = list(blocks_here(images, encoder, threads=1))
    assert [len(b.rows) + len(b.undecodable) for b in blocks] == [10, 10, 3]
    bad = {u.key: u.reason for b in blocks for u in b.undecodable}
    assert set(bad) == {"cats/04.png", "cats/08.png", "dogs/07.png"}
    assert "no image format" in bad["cats/04.png"]
    assert "No such file" in bad["cats/08.png"]
    assert "1001 x 1000 pixels" in bad["dogs/07.png"]
    rows = np.concatenate([b.rows for b in blocks])
    listed = [entry.key for entry in open_source(str(tmp_path)).entries]
    keys = [k for b in blocks for k in b.keys]
    assert sorted(rows.tolist() + [u.row for b in blocks for u in b.undecodable]) == list(range(23))
    assert keys == [key for key in listed if key not in bad]
    labels = np.concatenate([b.labels for b in blocks])
    assert [("cats", "dogs")[label] for label in labels] == [key.split("/")[0] for key in keys]


def test_batches_within_a_portion_are_fixed(digits: Path, digits_encoder: Path):
    """A row group may hold more images than the encoder can take at once."""
    from maskray.evaluation.blocks import compute

    images, encoder = portions.of_split(Dataset.open(str(digits)), "train", 64), load_encoder(digits_encoder)
    portion = next(images.portions())
    whole, sliced = (compute(encoder, images.read, portion, batch=batch, threads=2) for batch in (64, 10))
    assert whole.features.shape == sliced.features.shape == (64, 16)
    np.testing.assert_allclose(whole.features, sliced.features, rtol=1e-4, atol=1e-5)
