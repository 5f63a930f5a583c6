"""Pictures of images: reconstructions, masks, contact sheets, neighbours, detections.

Shape letters: N images, C channels (of many, the first three are shown), H and W down and across (pixels of an image,
cells of a visibility).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.patches import Rectangle

from maskray.figures.canvas import CLASS_COLORS, INK, SOFT_INK, blank, png, wrapped

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

TILE = 160
"""About the side of a picture in pixels: small images are enlarged a whole number of times, so pixels stay square."""
MIN_COLUMN = 136
"""Room for the longest name of a column, in pixels."""
GAP, MARGIN, HEAD, COLUMN_HEAD, FOOT = 8, 12, 34, 24, 26
SHEET_COLUMNS, MASK_COLUMNS, SHEET_LINE, SHEET_LETTERS = 6, 4, 14, 28
HIDDEN_COLOR = (128, 134, 150)
"""Gray with a breath of blue: told apart from the gray of a gray image."""
OTHER_INK = "#c0392b"
NEIGHBOUR_TILE = 112
DETECTION_TILE, DETECTION_COLUMNS = 256, 3
LABEL_SHARE = 0.05
"""Of a picture's height: a box that begins above has its label inside."""


def reconstructions(
    images_NCHW: Bytes,
    visible_NHW: Bools,
    painted_NCHW: Bytes,
    *,
    title: str,
    losses: Sequence[float] = (),
    uses_target_statistics: bool = False,
) -> bytes:
    """PNG of reconstructions, an image a row: input, what the model saw, what it painted into that, raw prediction.

    Args:
        images_NCHW: uint8 input.
        visible_NHW: True = the model saw the cell.
        painted_NCHW: uint8 prediction for every cell, those the model saw included.
        title: stands above all.
        losses: of each image, shown beside its row where given.
        uses_target_statistics: each painted cell's mean and std were taken from the original; the figure says so.
    """
    images, painted = rgb(images_NCHW), rgb(painted_NCHW)
    visible = to_pixels(visible_NHW, images.shape[1:3])[..., None]
    share = float(visible_NHW.mean())
    star = " *" if uses_target_statistics else ""
    columns = [
        ("input", images),
        (f"the model saw ({share:.0%})", np.where(visible, images, np.array(HIDDEN_COLOR, dtype=np.uint8))),
        (f"it painted{star}", np.where(visible, images, painted)),
        (f"raw prediction{star}", painted),
    ]
    note = "In the third column the visible cells are the input's own; the fourth is the prediction for every cell."
    if uses_target_statistics:
        note += (
            " * Each predicted cell was given the mean and std of the ORIGINAL cell: only its pattern is the model's."
        )
    return _grid(columns, title=title, note=note, row_names=[f"loss {loss:.3f}" for loss in losses])


def masks(image_CHW: Bytes, visible: Mapping[str, Bools], *, title: str) -> bytes:
    """PNG of one image as it is, and as it is seen through masks, each with its name and the share that is visible.

    Args:
        image_CHW: uint8.
        visible: by the name of the mask, (H, W) in cells, True = seen.
        title: stands above all.
    """
    image_HWC = rgb(image_CHW[None])[0]
    size_HW, hidden = image_HWC.shape[:2], np.array(HIDDEN_COLOR, dtype=np.uint8)
    seen = [np.where(to_pixels(each[None], size_HW)[0, :, :, None], image_HWC, hidden) for each in visible.values()]
    counts = [f"{each.mean():.1%} of {each.shape[0]} × {each.shape[1]} cells seen" for each in visible.values()]
    captions = [("the image", ""), *zip(visible, counts, strict=True)]
    tile = max(size_HW) * max(1, round(TILE / max(size_HW)))
    return contact_sheet([image_HWC, *seen], captions, title=title, tile=tile, columns=MASK_COLUMNS)


def contact_sheet(
    images_HWC: Sequence[Bytes],
    captions: Sequence[Sequence[str]],
    *,
    title: str,
    tile: int = TILE,
    columns: int = SHEET_COLUMNS,
) -> bytes:
    """PNG of pictures of any sizes in rows, with lines of text under each.

    Args:
        images_HWC: uint8 RGB, at most `tile` pixels wide and high; small ones are enlarged a whole number of times.
        captions: lines under each picture; long ones lose their beginning.
        title: stands above all.
        tile: pixels down and across that a picture has room in.
        columns: pictures in a row, at most.
    """
    colors = [[INK] + [SOFT_INK] * (len(lines) - 1) for lines in captions]
    return _sheet(images_HWC, captions, colors, title=title, tile=tile, columns=columns)


class Neighbour(NamedTuple):
    """A picture in a row of those that are alike."""

    image_HWC: Bytes
    """uint8 RGB, at most `tile` pixels wide and high."""
    key: str
    label: str
    """Name of its class; empty where there is none."""
    similarity: float
    """With the first of its row."""


def neighbours(rows: Sequence[Sequence[Neighbour]], *, title: str, tile: int = NEIGHBOUR_TILE) -> bytes:
    """PNG of rows of pictures: the first, and those that are most like it, with similarity, class and key under each.

    A class that is not the first one's is red.

    Args:
        rows: of equal length.
        title: stands above all.
        tile: pixels down and across that a picture has room in.
    """
    pictures = [(one, row[0], place) for row in rows for place, one in enumerate(row)]
    captions, colors = [], []
    for one, first, place in pictures:
        said = "query" if place == 0 else f"{one.similarity:.3f}"
        captions.append([f"{said} · {one.label}" if one.label else said, one.key])
        colors.append([OTHER_INK if one.label != first.label else INK, SOFT_INK])
    images = [one.image_HWC for one, _, _ in pictures]
    return _sheet(images, captions, colors, title=title, tile=tile, columns=len(rows[0]), first_apart=True)


class Boxed(NamedTuple):
    """A picture with boxes, each left, top, right, bottom in its pixels."""

    image_HWC: Bytes
    """uint8 RGB."""
    caption: str
    true: Sequence[tuple[Sequence[float], int]]
    """Boxes that are on it, and the class of each."""
    found: Sequence[tuple[Sequence[float], int, float]]
    """Boxes that were found, the class of each, and how sure that is, 0 to 1."""


def detections(
    pictures: Sequence[Boxed], class_names: Sequence[str], *, title: str, tile: int = DETECTION_TILE
) -> bytes:
    """PNG of pictures with what was found on them, in the colour of its class, and dashed white what is there.

    Args:
        pictures: at most `tile` pixels wide and high; small ones are enlarged a whole number of times.
        class_names: by number.
        title: stands above all.
        tile: pixels down and across that a picture has room in.
    """

    def draw(axes: Any, number: int) -> None:
        for box, _ in pictures[number].true:
            axes.add_patch(_rectangle(box, edgecolor="white", linewidth=2.2, linestyle=(0, (2, 2))))
        for box, class_, score in pictures[number].found:
            color = CLASS_COLORS[class_ % len(CLASS_COLORS)]
            axes.add_patch(_rectangle(box, edgecolor=color, linewidth=1.4))
            is_at_top = box[1] < LABEL_SHARE * pictures[number].image_HWC.shape[0]
            axes.text(
                box[0] - 0.5, box[1] - 0.5, f"{class_names[class_]} {score:.2f}", fontsize=6, color="white",
                va="top" if is_at_top else "bottom", ha="left", clip_on=True, parse_math=False,
                bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip

    images = [each.image_HWC for each in pictures]
    captions = [[each.caption] for each in pictures]
    colors = [[SOFT_INK]] * len(pictures)
    return _sheet(images, captions, colors, title=title, tile=tile, columns=DETECTION_COLUMNS, draw=draw)


def _rectangle(box: Sequence[float], **options: Any) -> Rectangle:
    left, top, right, bottom = (each - 0.5 for each in box)  # matplotlib's 0 is the middle of the first pixel
    return Rectangle((left, top), right - left, bottom - top, fill=False, **options)


def _sheet(
    images_HWC: Sequence[Bytes],
    captions: Sequence[Sequence[str]],
    colors: Sequence[Sequence[str]],
    *,
    title: str,
    tile: int,
    columns: int,
    first_apart: bool = False,
    draw: Callable[[Any, int], None] | None = None,
) -> bytes:
    """A contact sheet whose lines have colours, the first column set apart where that is asked for.

    `draw` gets the axes of each picture and its number.
    """
    num_columns = min(columns, len(images_HWC))
    num_rows = -(-len(images_HWC) // num_columns)
    scales = [max(1, tile // max(image.shape[:2])) for image in images_HWC]
    tile_height = max(image.shape[0] * scale for image, scale in zip(images_HWC, scales, strict=True))
    letters = SHEET_LETTERS * tile // TILE
    foot = SHEET_LINE * max(map(len, captions))
    apart = 3 * GAP if first_apart else 0
    width = 2 * MARGIN + num_columns * (tile + GAP) - GAP + apart
    height = HEAD + num_rows * (tile_height + foot + GAP) + MARGIN
    figure = blank(width, height)
    figure.text(
        MARGIN / width, 1 - (HEAD / 2) / height, title, fontsize=11, color=INK, va="center", weight="bold",
        parse_math=False,
    )  # fmt: skip
    for number, (image, scale, lines) in enumerate(zip(images_HWC, scales, captions, strict=True)):
        column = number % num_columns
        x = MARGIN + column * (tile + GAP) + (apart if column else 0)
        y = HEAD + number // num_columns * (tile_height + foot + GAP)
        tile_h, tile_w = image.shape[0] * scale, image.shape[1] * scale
        bottom = y + tile_height  # pictures stand on their captions
        place = ((x + (tile - tile_w) // 2) / width, 1 - bottom / height, tile_w / width, tile_h / height)
        axes = figure.add_axes(place)
        axes.imshow(image, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        if draw is not None:
            draw(axes, number)
        for line, words in enumerate(lines):
            shown = words if len(words) <= letters else "…" + words[1 - letters :]
            where = ((x + tile / 2) / width, 1 - (bottom + SHEET_LINE * (line + 0.5)) / height)
            # A key is no formula, and may have letters that the font lacks.
            figure.text(
                *where, shown, fontsize=7, color=colors[number][line], va="center", ha="center", parse_math=False
            )
    return png(figure)


def _grid(columns: Sequence[tuple[str, Bytes]], *, title: str, note: str, row_names: Sequence[str]) -> bytes:
    """Pictures placed to the pixel, so that none is resampled by a fraction."""
    num_rows, image_h, image_w = columns[0][1].shape[:3]
    scale = max(1, round(TILE / max(image_h, image_w)))
    tile_h, tile_w = image_h * scale, image_w * scale
    left = MARGIN + (22 if row_names else 0)
    column_w = max(tile_w, MIN_COLUMN)
    width = left + len(columns) * (column_w + GAP) - GAP + MARGIN
    lines = wrapped(note, width - left - MARGIN)
    foot = FOOT + 15 * (len(lines) - 1)
    height = HEAD + COLUMN_HEAD + num_rows * (tile_h + GAP) - GAP + foot

    figure = blank(width, height)

    def text(x: float, y: float, words: str, size: int, color: str, **options: Any) -> None:
        figure.text(x / width, 1 - y / height, words, fontsize=size, color=color, **options)

    text(left, HEAD / 2 + 4, title, 11, INK, va="center", ha="left", weight="bold")
    text(left, height - foot / 2, "\n".join(lines), 8, SOFT_INK, va="center", ha="left", linespacing=1.35)
    for c, (name, pictures) in enumerate(columns):
        x = left + c * (column_w + GAP) + (column_w - tile_w) // 2
        text(x + tile_w / 2, HEAD + COLUMN_HEAD / 2, name, 9, INK, va="center", ha="center")
        for r in range(num_rows):
            y = HEAD + COLUMN_HEAD + r * (tile_h + GAP)
            axes = figure.add_axes((x / width, 1 - (y + tile_h) / height, tile_w / width, tile_h / height))
            axes.imshow(pictures[r], interpolation="nearest", aspect="auto")
            axes.set_axis_off()
    for r, name in enumerate(row_names):
        y = HEAD + COLUMN_HEAD + r * (tile_h + GAP) + tile_h / 2
        text(left - 10, y, name, 8, SOFT_INK, va="center", ha="center", rotation=90)
    return png(figure)


def rgb(images_NCHW: Bytes) -> Bytes:
    """Gray, or the first three of any number of bands as if they were red, green and blue (of two, the first)."""
    images = images_NCHW.transpose(0, 2, 3, 1)
    return images[..., :3] if images.shape[3] >= 3 else np.repeat(images[..., :1], 3, axis=3)


def to_pixels(cells_NHW: Bools, size_HW: tuple[int, int]) -> Bools:
    """(N, H, W) in cells, as large as images of so many pixels down and across."""
    rows, columns = (pixels // cells for pixels, cells in zip(size_HW, cells_NHW.shape[1:], strict=True))
    return cells_NHW.repeat(rows, axis=1).repeat(columns, axis=2)
