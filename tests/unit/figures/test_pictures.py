import io

import numpy as np
import pytest
from PIL import Image

from maskray.figures import pictures

RNG = np.random.default_rng(0)


def pixels(png):
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def arrays(channels, size_HW, grid_HW, num_images=2):
    images = RNG.integers(0, 256, (num_images, channels, *size_HW), dtype=np.uint8)
    painted = RNG.integers(0, 256, images.shape, dtype=np.uint8)
    visible = RNG.random((num_images, *grid_HW)) < 0.5
    return images, visible, painted


@pytest.mark.parametrize(
    ("channels", "size_HW", "grid_HW"),
    [
        (1, (8, 8), (4, 4)),
        (3, (32, 32), (8, 8)),
        (3, (224, 224), (14, 14)),
        (3, (32, 8), (8, 4)),
        (1, (16, 48), (4, 4)),
    ],
)
@pytest.mark.parametrize("uses_target_statistics", [False, True])
def test_a_figure_fits_a_screen(channels, size_HW, grid_HW, uses_target_statistics):
    images, visible, painted = arrays(channels, size_HW, grid_HW, num_images=6)
    image = pixels(
        pictures.reconstructions(
            images,
            visible,
            painted,
            title="run · step 1",
            losses=[0.5] * 6,
            uses_target_statistics=uses_target_statistics,
        )
    )
    assert 300 < image.shape[0] < 1600
    assert 500 < image.shape[1] < 1100


@pytest.mark.parametrize(("channels", "shown"), [(2, [0, 0, 0]), (5, [0, 1, 2])])
def test_of_many_bands_the_first_are_shown(channels, shown):
    images, visible, painted = arrays(channels, (8, 8), (4, 4))
    many = pictures.reconstructions(images, visible, painted, title="t")
    colour = pictures.reconstructions(images[:, shown], visible, painted[:, shown], title="t")
    np.testing.assert_array_equal(pixels(many), pixels(colour))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_enlarged_whole_and_stands_in_its_column(channels):
    images, visible, painted = arrays(channels, (8, 8), (4, 4))
    image = pixels(pictures.reconstructions(images, visible, painted, title="t"))
    rgb, prediction = (np.broadcast_to(a, (2, 3, 8, 8)).transpose(0, 2, 3, 1) for a in (images, painted))
    shown = visible.repeat(2, 1).repeat(2, 2)[..., None]
    expected = [
        rgb,
        np.where(shown, rgb, np.array(pictures.HIDDEN_COLOR)),
        np.where(shown, rgb, prediction),
        prediction,
    ]
    scale = pictures.TILE // 8
    for row in range(2):
        y = pictures.HEAD + pictures.COLUMN_HEAD + row * (pictures.TILE + pictures.GAP)
        for column, tiles in enumerate(expected):
            x = pictures.MARGIN + column * (pictures.TILE + pictures.GAP)
            tile = image[y : y + pictures.TILE, x : x + pictures.TILE]
            np.testing.assert_array_equal(tile, tiles[row].repeat(scale, 0).repeat(scale, 1))


def test_borrowed_statistics_are_said():
    images, visible, painted = arrays(3, (8, 8), (4, 4))
    plain, borrowed = (
        pictures.reconstructions(images, visible, painted, title="t", uses_target_statistics=said)
        for said in (False, True)
    )
    assert pixels(plain).shape[0] < pixels(borrowed).shape[0]  # a line more at the foot


def test_no_pyplot_state_is_left():
    import sys

    pictures.reconstructions(*arrays(1, (8, 8), (4, 4)), title="t")
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_a_contact_sheet_shows_pictures_of_any_size_whole():
    images = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((8, 8), (160, 100), (90, 160), (33, 5))] * 3
    captions = [(f"folder/图像_$x_{i}$" + "long " * 20, "a class") for i in range(12)]
    image = pixels(pictures.contact_sheet(images, captions, title="twelve"))
    assert image.shape[1] < 1100
    scale = pictures.TILE // 8
    left, bottom = pictures.MARGIN, pictures.HEAD + pictures.TILE
    tile = image[bottom - pictures.TILE : bottom, left : left + pictures.TILE]
    np.testing.assert_array_equal(tile, images[0].repeat(scale, 0).repeat(scale, 1))
    left += pictures.TILE + pictures.GAP + (pictures.TILE - 100) // 2
    np.testing.assert_array_equal(image[bottom - 160 : bottom, left : left + 100], images[1])


def test_a_contact_sheet_of_one_picture():
    sheet = pictures.contact_sheet([np.zeros((8, 8, 3), dtype=np.uint8)], [("key", "")], title="one")
    assert pixels(sheet).shape[0] > 160


def test_neighbours_of_another_class_are_red_and_the_query_stands_apart():
    def row(*labels):
        picture = np.full((8, 8, 3), 200, np.uint8)
        return [pictures.Neighbour(picture, f"key/{i}", label, 1 - i / 10) for i, label in enumerate(labels)]

    reds = []
    for rows in ([row("a", "a", "a")], [row("a", "a", "b")], [row("", "", "")]):
        image = pixels(pictures.neighbours(rows, title="t")).astype(int)
        reds.append(int(((image[..., 0] - image[..., 2]) > 60).sum()))
    assert reds[0] == reds[2] == 0 < reds[1]
    tiles = np.flatnonzero((image[pictures.HEAD + 8] == 200).all(axis=1))
    gaps = np.diff(tiles)
    assert sorted(gaps[gaps > 1].tolist()) == [pictures.GAP + 1, 4 * pictures.GAP + 1]


def test_boxes_are_drawn_around_their_pixels():
    image = np.zeros((64, 128, 3), np.uint8)
    boxed = pictures.Boxed(image, "a.png", [], [((32, 16, 96, 48), 1, 0.5)])
    sheet = pixels(pictures.detections([boxed], ["a", "b $x$"], title="t", tile=256)).astype(int)
    left, bottom = pictures.MARGIN, pictures.HEAD + 128
    tile = sheet[bottom - 128 : bottom, left : left + 256]
    coloured = tile.max(2) - tile.min(2) > 40
    across, down = coloured[96:].any(0).nonzero()[0], coloured[:, :70].any(1).nonzero()[0]
    assert abs(across.min() - 64) <= 1
    assert abs(across.max() - 191) <= 1
    assert abs(down.max() - 95) <= 1
    assert not coloured[40:90, 70:185].any()


def test_what_is_there_is_dashed_white_and_what_was_found_in_the_colour_of_its_class():
    image = np.zeros((64, 64, 3), np.uint8)
    true, found = [((8, 8, 40, 40), 0)], [((8, 8, 40, 40), class_, 0.9) for class_ in (0, 1)]
    sheets = [
        pixels(pictures.detections([pictures.Boxed(image, "", *sides)] * num, ["a", "b"], title="t")).astype(int)
        for sides, num in (((true, []), 1), (([], found[:1]), 1), (([], found[1:]), 1), (([], []), 4))
    ]
    white = [int((sheet[60:250, 40:200] > 200).all(2).sum()) for sheet in sheets]
    assert white[0] > 100
    hues = [sheet[60:250, 40:200].reshape(-1, 3) for sheet in sheets]
    mean = [hue[hue.max(1) - hue.min(1) > 80].mean(0) for hue in hues[1:3]]
    assert np.abs(mean[0] - mean[1]).max() > 60
    assert sheets[3].shape[0] > 1.8 * sheets[0].shape[0]  # a second row
