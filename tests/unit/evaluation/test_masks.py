"""The figure of all masks."""

import io

import numpy as np
import pytest
from PIL import Image

from maskray import cli, masking
from maskray.config.load import dump
from maskray.errors import ConfigError, DataError
from maskray.evaluation.masks import image_of, mask_figure
from maskray.figures import pictures


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_the_run_s_own_mask_is_the_one_that_its_first_image_gets(tiny):
    config = tiny(data={"image_size": 160}, model={"patch": 20}, mask={"kind": "block", "ratio": [0.5, 0.25]})
    image = np.random.default_rng(0).integers(0, 256, (1, 160, 160), dtype=np.uint8)
    png, _ = mask_figure(config, image)
    (num_visible, _) = masking.visible_counts(config.mask, config.grid)
    key = {"seed": config.seed, "pass_": 0, "rows": np.arange(1), "view": 0}
    visible = masking.draw(config.mask, config.grid, num_visible, **key)[0].repeat(20, 0).repeat(20, 1)
    left, top = pictures.MARGIN + 160 + pictures.GAP, pictures.HEAD
    shown = pixels(png)[top : top + 160, left : left + 160]
    expected = np.where(visible[..., None], image[0][..., None], np.array(pictures.HIDDEN_COLOR))
    np.testing.assert_array_equal(shown, expected)


def test_what_cannot_be_drawn_is_left_out_and_said(tiny):
    config = tiny(data={"image_size": 14}, mask={"ratio": 0.6})
    _, left_out = mask_figure(config, np.zeros((1, 14, 14), dtype=np.uint8))
    assert set(left_out) == {"grid"}
    assert "no regular grid" in left_out["grid"]
    with pytest.raises(ConfigError, match="no regular grid"):
        mask_figure(tiny(data={"image_size": 14}, mask={"kind": "grid", "ratio": 0.6}), np.zeros((1, 14, 14), np.uint8))


def test_a_picture_is_cut_to_the_aspect_of_the_model_and_not_squeezed(tiny, tmp_path):
    wide = np.zeros((10, 40, 3), dtype=np.uint8)
    wide[:, 15:25] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = image_of(tiny(), tmp_path / "wide.png")
    assert image.shape == (1, 8, 8)
    assert (image == 255).all()


def test_no_picture_is_said_with_its_path(tiny, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "nowhere.png"):
        with pytest.raises(DataError, match=f"--image.*{name}"):
            image_of(tiny(), tmp_path / name)


def test_the_command_takes_the_dataset_s_first_image(tiny, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(dump(tiny()))
    for nowhere in (tmp_path, tmp_path / "no folder" / "masks.png"):
        assert cli.main(["masks", "--config", str(path), "--out", str(nowhere)]) == cli.USER_MISTAKE
    out = tmp_path / "masks.png"
    assert cli.main(["masks", "--config", str(path), "--out", str(out)]) == 0
    assert pixels(out.read_bytes()).shape[1] < 1100
    assert str(out) in capsys.readouterr().out
