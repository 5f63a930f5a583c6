"""Pictures of embeddings: of a dataset and a folder, with and without classes."""

import io

import numpy as np
import pytest
from PIL import Image

from maskray.config.embedding import EmbedConfig
from maskray.config.load import parse
from maskray.embedding import sights
from maskray.embedding.table import embed_here, prepare
from maskray.errors import DataError
from maskray.models.encoder import load_encoder


def embedded(encoder, images, place, **values):
    given = {"encoder": str(encoder), "images": str(images), "destination": str(place), "part_rows": 300}
    prepared = prepare(parse(EmbedConfig, given | values))
    embed_here(prepared, lambda done, total, phase: None)
    return prepared


def pixels(place):
    return np.asarray(Image.open(io.BytesIO(place.read_bytes())).convert("RGB"))


def test_both_pictures_lie_beside_the_embeddings_and_show_the_right_images(
    digits, digits_encoder, tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(sights.pictures, "neighbours", lambda rows, title: shown.append((rows, title)) or b"png")
    prepared = embedded(digits_encoder, digits, tmp_path / "out")
    assert sights.draw(prepared, 4) == [str(tmp_path / "out" / name) for name in (sights.NEIGHBOURS, sights.MAP)]
    (rows, title) = shown[0]
    assert "1,797" in title
    assert [len(row) for row in rows] == [1 + sights.NUM_NEIGHBOURS] * 4
    encoder, by_key = load_encoder(digits_encoder), {}
    from maskray.data.sources import open_source
    from maskray.evaluation.pictures import encode, picture_of

    source = open_source("digits")
    for entry in source.entries:
        by_key[entry.key] = (picture_of(source.read(entry), 1, (8, 8)), entry.label)
    for row in rows:
        pictures = [by_key[one.key][0] for one in row]
        for one, picture in zip(row, pictures, strict=True):
            assert np.array_equal(one.image_HWC[:, :, 0], picture[0].numpy()), f"{one.key} has another's picture"
            assert one.label == str(by_key[one.key][1])
        features = encode(pictures, encoder).astype(np.float64)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        np.testing.assert_allclose([one.similarity for one in row[1:]], (features[1:] @ features[0]), atol=1e-5)
        assert sorted((one.similarity for one in row), reverse=True) == [one.similarity for one in row]
    assert pixels(tmp_path / "out" / sights.MAP).shape[1] > 600


def test_a_folder_without_classes_and_with_one_image_that_is_none(digits_encoder, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(9):
        value = np.random.default_rng(i).integers(0, 256, (300, 200, 3), dtype=np.uint8)
        Image.fromarray(value).save(tmp_path / f"in/{i} [$x$] a long name of a picture, longer than its tile.png")
    (tmp_path / "in/3b.png").write_bytes(b"")
    prepared = embedded(digits_encoder, tmp_path / "in", tmp_path / "out", max_bad_fraction=0.2)
    sights.draw(prepared, 20)
    assert pixels(tmp_path / "out" / sights.NEIGHBOURS).std() > 10
    assert pixels(tmp_path / "out" / sights.MAP).std() > 1


def test_too_few_are_refused(digits_encoder, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(2):
        Image.new("L", (8, 8), i).save(tmp_path / f"in/{i}.png")
    prepared = embedded(digits_encoder, tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="too few embeddings for a picture"):
        sights.draw(prepared, 2)


def test_unfinished_embeddings_are_no_picture(digits, digits_encoder, tmp_path):
    prepared = embedded(digits_encoder, digits, tmp_path / "out")
    (tmp_path / "out/_manifest.json").unlink()
    with pytest.raises(DataError, match="not finished"):
        sights.draw(prepared, 2)
