"""torchvision's Faster R-CNN (Ren et al. 2015) or Mask R-CNN (He et al. 2017) on an encoder's pyramid.

Heads, losses and their constants are torchvision's, but for three things that it guesses from the first images it
sees, and guesses wrongly where they are padded to a square or where a stride is no power of two: strides of anchors,
scales of pooling and levels of boxes are given here.

Boxes are fp32 whatever the rest is computed in: torchvision's take the precision of what the heads give, and bf16 has
no number between 256 and 258 pixels.

Shape letters: B images, C channels, h and w pixels of an image inside the square.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from maskray.config.evaluation import DetectionEvaluation
from maskray.evaluation.classifier import set_drop_path
from maskray.evaluation.detection.pyramid import Backbone, build_backbone
from maskray.models.encoder import Encoder
from maskray.models.normalize import Normalize
from maskray.training.randomness import drawn_by

ANCHOR_PLACES = 8
"""An anchor's side in places of its level: 32 pixels where a place has 4 (Lin et al. 2017)."""
ASPECTS = (0.5, 1.0, 2.0)
CANONICAL_PLACES = 14
"""Boxes of 14 to 28 places a side are pooled from a level: 224 pixels from the one of stride 16 (Lin et al. 2017)."""
_BOX_PLACES, _MASK_PLACES = 7, 14
_MASK_LAYERS = 4


def build_detector(encoder: Encoder, num_classes: int, config: DetectionEvaluation, seed: int) -> FasterRCNN:
    """A detector on a copy of an encoder; what stands on it is drawn by the seed. Torch's generator is left alone.

    In training it takes images (C, h, w) of bytes that are fitted to the square, and targets, and gives losses;
    otherwise it gives what it found, inside the square.

    Args:
        encoder: stays as it is.
        num_classes: of objects.
        config: sizes.
        seed: of pyramid and heads.

    Raises:
        ConfigError: the encoder takes no images of that size.
    """
    with drawn_by(seed):
        backbone = build_backbone(encoder, config.image_size, config.pyramid_width)
        set_drop_path(backbone.encoder.layers()[1:], config.drop_path)
        detector = _on(backbone, num_classes + 1, config)
    detector.transform = Square(encoder.normalize, config.image_size)
    return detector


def _on(backbone: Backbone, num_labels: int, config: DetectionEvaluation) -> FasterRCNN:
    width = backbone.out_channels
    options: dict[str, Any] = {
        "backbone": backbone,
        "rpn_anchor_generator": Anchors(backbone.strides),
        "rpn_pre_nms_top_n_train": 2 * config.proposals,
        "rpn_pre_nms_top_n_test": config.proposals,
        "rpn_post_nms_top_n_train": config.proposals,
        "rpn_post_nms_top_n_test": config.proposals,
        "box_roi_pool": _pool(backbone.strides, _BOX_PLACES),
        "box_head": TwoMLPHead(width * _BOX_PLACES**2, config.head_width),
        "box_predictor": BoxPredictor(config.head_width, num_labels),
        "box_batch_size_per_image": config.sampled_boxes,
    }
    if config.masks:
        options |= {
            "mask_roi_pool": _pool(backbone.strides, _MASK_PLACES),
            "mask_head": MaskRCNNHeads(width, (width,) * _MASK_LAYERS, dilation=1),
            "mask_predictor": MaskPredictor(width, width, num_labels),
        }
    options["rpn_head"] = ProposalHead(width, len(ASPECTS))
    return MaskRCNN(**options) if config.masks else FasterRCNN(**options)


class ProposalHead(RPNHead):
    """Gives fp32, from which the boxes of proposals are made."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and codes of the anchors of each level."""
        logits, codes = super().forward(x)
        return [each.float() for each in logits], [each.float() for each in codes]


class BoxPredictor(FastRCNNPredictor):
    """Computes in fp32: by its scores detections are ranked, and bf16's have eight bits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and codes of each box."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())  # type: ignore[no-any-return]


class MaskPredictor(MaskRCNNPredictor):
    """Gives fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the places of each box, for each class."""
        return super().forward(x).float()  # type: ignore[no-any-return]


class Square(GeneralizedRCNNTransform):
    """Fitted bytes to a batch of normalised squares. What is found stays inside the square: see `fitting`.

    Args:
        normalize: what the encoder was trained behind.
        side: of the square in pixels.
    """

    def __init__(self, normalize: Normalize, side: int) -> None:
        super().__init__(side, side, [], [], size_divisible=side)
        self.values = normalize

    def normalize(self, image: Tensor) -> Tensor:
        """(C, h, w) as the encoder knows it."""
        return self.values(image)  # type: ignore[no-any-return]

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, Any]:
        """Nothing: it is fitted."""
        return image, target

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """Nothing: it is restored later."""
        del image_shapes, original_image_sizes
        return result


class Anchors(AnchorGenerator):
    """An anchor of each aspect at each place, `ANCHOR_PLACES` places large.

    Args:
        strides: pixels a place of each level.
    """

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__(tuple((ANCHOR_PLACES * each,) for each in strides), (ASPECTS,) * len(strides))
        self._strides = [[each, each] for each in strides]

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """In fp32, whatever the maps are."""
        del dtype
        super().set_cell_anchors(torch.float32, device)

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> Any:
        """At the strides that are given; torchvision would divide sides, whatever is left over."""
        del strides
        return super().grid_anchors(grid_sizes, self._strides)


def _pool(strides: tuple[int, ...], places: int) -> MultiScaleRoIAlign:
    """From all levels but the coarsest, which is for proposals alone."""
    levels = strides[:-1]
    pool = MultiScaleRoIAlign([str(i) for i in range(len(levels))], places, sampling_ratio=2)
    pool.scales = [1 / each for each in levels]
    pool.map_levels = LevelMapper(0, len(levels) - 1, CANONICAL_PLACES * levels[0], 0)
    return pool
