"""What MLflow runs when a registered encoder is loaded: images in, features out. Logged as a file, never pickled."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel
from torch import Tensor

from maskray.data.decode import UndecodableError, is_image, measure
from maskray.evaluation.pictures import encode, picture_of
from maskray.models.encoder import Encoder, load_encoder, resize

MAX_PIXELS = 178_956_970
"""Height × width of a larger image are not believed: Pillow's own limit, and ingest's."""
COLUMN = "image"
"""Of a table, or key of a dict, that images are in."""
ALLOWED = (
    "the bytes of an image file, those as base64, a path, or an array of whole numbers 0 to 255 (height, width, C)"
)


class EncoderPredictor(PythonModel):
    """`predict(images)` of any number of images gives float32 features (N, D), in their order.

    An image is the bytes of a file, the same as base64 (or as a `data:` URI), the path of a file on the machine that
    computes, or an array (H, W, C) of whole numbers from 0 to 255; of any height and width: it is decoded and resized
    as in training. They come in a list, an array (N, H, W, C), a table with the column `image`, or {"image": …}.

    `mlflow.pyfunc.load_model(uri, model_config={"device": "cuda"})` computes on another device than the CPU;
    {"paths": False} reads no files.
    """

    encoder: Encoder
    reads_paths: bool

    def load_context(self, context: Any) -> None:
        """Build the encoder from its folder."""
        config = context.model_config or {}
        self.encoder = load_encoder(context.artifacts["encoder"]).to(config.get("device", "cpu"))
        self.reads_paths = bool(config.get("paths", True))

    def predict(
        self,
        context: Any,  # noqa: ARG002  (MLflow gives it)
        model_input: np.ndarray,  # MLflow knows this very hint, and warns at any other
        params: dict[str, Any] | None = None,  # noqa: ARG002  (likewise)
    ) -> Any:
        """Features, in the order of the images.

        Raises:
            MlflowException: one of them is no image; says which and why.
        """
        return encode([self._picture(number, image) for number, image in enumerate(_images(model_input))], self.encoder)

    def _picture(self, number: int, image: Any) -> Tensor:
        try:
            if isinstance(image, str):
                image = self._bytes_of(image)
            if isinstance(image, bytes | bytearray | memoryview):
                measure(bytes(image), MAX_PIXELS)  # before a small file inflates to gigabytes
                return picture_of(bytes(image), self.encoder.channels, self.encoder.image_size)
            pixels_HWC = _pixels(image, self.encoder.channels)
        except (UndecodableError, OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise MlflowException.invalid_parameter_value(
                f"Image {number} cannot be used: {said}. Allowed: {ALLOWED}, where C is {self.encoder.channels}."
            ) from error
        return resize(torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None], self.encoder.image_size)[0]

    def _bytes_of(self, text: str) -> bytes:
        """Base64 if that makes an image, else a path: an image's first bytes are no beginning of a usual path."""
        is_uri = text.startswith("data:")
        try:
            data = base64.b64decode("".join(text.partition(",")[2].split() if is_uri else text.split()), validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if is_uri or is_image(data):
            return data
        if not self.reads_paths:
            raise ValueError("it is no base64 of an image, and paths are not read here")
        if len(text) > _LONGEST_PATH:
            raise ValueError("it is no base64 of an image, and too long for a path")
        if not Path(text).is_file():  # a device would never end
            raise ValueError("it is no base64 of an image, and no file here has that path")
        return Path(text).read_bytes()


_LONGEST_PATH = 4096


def _images(given: Any) -> Iterator[Any]:
    """Each image, whatever holds them."""
    if isinstance(given, dict):
        given = _column(given, list(given))
    elif hasattr(given, "columns"):  # a table of pandas'
        given = _column(given, list(given.columns)).tolist()
    if isinstance(given, str | bytes | bytearray | memoryview):
        yield given
        return
    for image in given:
        yield image[COLUMN] if isinstance(image, dict) and COLUMN in image else image


def _column(table: Any, names: list[Any]) -> Any:
    if COLUMN in names or len(names) == 1:
        return table[COLUMN if COLUMN in names else names[0]]
    raise MlflowException.invalid_parameter_value(
        f"There is no column {COLUMN!r}. Found: {', '.join(map(str, names))}."
    )


def _pixels(image: Any, channels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An array (H, W, C) of bytes.

    Raises:
        ValueError: it is none, and why.
    """
    try:
        pixels = np.asarray(image)
    except ValueError as error:
        raise ValueError("its rows are not of equal length") from error
    if pixels.ndim != 3 or pixels.shape[2] != channels or 0 in pixels.shape:
        raise ValueError(f"it is {type(image).__name__} of shape {pixels.shape}")
    if not np.issubdtype(pixels.dtype, np.integer):
        raise ValueError(f"its values are {pixels.dtype}")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"its values reach from {pixels.min()} to {pixels.max()}")
    return np.ascontiguousarray(pixels, dtype=np.uint8)


mlflow.models.set_model(EncoderPredictor())
