"""What the MAE paper found along its own axes, to stand beside what a sweep finds (He et al. 2022, arXiv 2111.06377).

ViT-L/16, 800 epochs of ImageNet-1K, masks of 75 %, a decoder of 8 blocks and width 512, pixels without norm, but for
the axis in question. Top-1 accuracy on ImageNet-1K's validation images, in %, after training the whole encoder on its
labels (fine-tuning) and of a linear layer on frozen features (linear probe).
"""

from __future__ import annotations

from collections.abc import Mapping

from maskray.figures.curves import Beside

_ABOUT = "ViT-L/16, 800 epochs of ImageNet-1K"
_SCALE = "accuracy on ImageNet-1K, %"
_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
_DEPTHS = (1.0, 2.0, 4.0, 8.0, 12.0)
_WIDTHS = (128.0, 256.0, 512.0, 768.0, 1024.0)


def _beside(source: str, xs: tuple[float, ...], tuned: tuple[float, ...], probed: tuple[float, ...]) -> Beside:
    curves = {"fine-tuning": tuned, "linear probe": probed}
    return Beside(
        title=f"The MAE paper, {source}",
        about=_ABOUT,
        scale=_SCALE,
        curves={name: tuple(zip(xs, values, strict=True)) for name, values in curves.items()},
    )


BY_KEY: Mapping[str, Beside] = {
    "mask.ratio": _beside(
        "Fig. 5",
        _RATIOS,
        (83.2, 83.4, 83.4, 84.7, 84.9, 85.0, 84.9, 84.9, 84.5, 83.0),
        (54.6, 58.9, 61.7, 67.0, 69.9, 71.8, 73.2, 73.5, 71.8, 66.1),
    ),
    "model.decoder.depth": _beside("Table 1a", _DEPTHS, (84.8, 84.9, 84.9, 84.9, 84.4), (65.5, 70.0, 71.9, 73.5, 73.3)),
    "model.decoder.width": _beside("Table 1b", _WIDTHS, (84.9, 84.8, 84.9, 84.4, 84.3), (69.1, 71.3, 73.5, 73.1, 73.1)),
}
"""By the key of the run's config."""
