"""An encoder as a graph that runs without our code: ONNX, or torch's own export.

The graph takes uint8 images (images, channels, height, width) of the encoder's size, any number of them, and gives
features (images, width): normalisation is inside, so nobody can forget it.
"""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from maskray.errors import ConfigError
from maskray.models.encoder import Encoder

GraphFormat = Literal["onnx", "pt2"]
GRAPH_FILES: dict[GraphFormat, str] = {"onnx": "model.onnx", "pt2": "model.pt2"}
INPUT, OUTPUT = "images", "features"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_installed(kind: GraphFormat) -> None:
    """Whether what writes and proves a graph is there.

    Raises:
        ConfigError: it is not.
    """
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if kind == "onnx" and missing:
        raise ConfigError(
            "ONNX is an extra",
            key="--as",
            found=f"onnx, without {', '.join(missing)}",
            fix="pip install 'maskray[onnx]'",
        )


def write_graph(encoder: Encoder, path: Path, kind: GraphFormat) -> None:
    """Write the graph of an encoder on the CPU into a file."""
    graph = _Graph(encoder).eval()
    # Two images: for one alone torch would take the number for a constant.
    images_BCHW = torch.zeros(2, encoder.channels, *encoder.image_size, dtype=torch.uint8)
    dynamic = ({0: torch.export.Dim(INPUT, min=1)},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of deprecations inside the exporters, which nobody here can heed
        if kind == "pt2":
            torch.export.save(torch.export.export(graph, (images_BCHW,), dynamic_shapes=dynamic), path)
            return
        logging.getLogger("onnxscript").setLevel(logging.WARNING)
        torch.onnx.export(
            graph,
            (images_BCHW,),
            path,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=dynamic,
            external_data=False,
        )


class _Graph(nn.Module):
    """An encoder without its checks and its resizing, which are no part of a graph."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model, self.normalize = encoder.model, encoder.normalize

    def forward(self, images: Tensor) -> Tensor:
        return self.model.pooled(self.normalize(images)).float()
