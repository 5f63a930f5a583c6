"""An encoder with a linear head, to be trained together.

The head reads the mean over the cells behind a norm of its own, in place of the encoder's last one (the MAE authors'
`--global_pool`).

Shape letters: B images of a batch, C channels, H and W pixels down and across, K classes, N rows of a unit.
"""

from __future__ import annotations

import copy

from timm.layers import DropPath
from torch import Tensor, nn

from maskray.models.base import Part
from maskray.models.encoder import Encoder, without_decoder
from maskray.models.sparse_layers import group_norms
from maskray.training.optim import named_layers

HEAD_STD = 2e-5
FC_NORM_EPS = 1e-6


class Classifier(nn.Module):
    """An encoder with a linear head.

    Args:
        encoder: left as it is: the network has a copy.
        num_classes: K.
        drop_path: chance that the last residual block is left out.
        unit_rows: N, over which batch normalisation takes its statistics.
    """

    def __init__(self, encoder: Encoder, num_classes: int, drop_path: float, unit_rows: int) -> None:
        super().__init__()
        self.model = without_decoder(copy.deepcopy(encoder.model))
        self.normalize = copy.deepcopy(encoder.normalize)
        self.model.requires_grad_(requires_grad=True)
        for norm in group_norms(self.model):
            norm.group_images = unit_rows
        if hasattr(self.model, "norm"):  # a transformer's: `fc_norm` stands in its place
            self.model.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(self.model.width, eps=FC_NORM_EPS)
        self.head = nn.Linear(self.model.width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        set_drop_path(self.model.layers()[1:], drop_path)

    def forward(self, images_BCHW: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """(B, K) logits of normalised images; 0 in `weights_B` for those that do not count in statistics."""
        return self.head(self.fc_norm(self.model.pooled(images_BCHW, weights_B)))  # type: ignore[no-any-return]

    def layers(self) -> list[list[tuple[str, nn.Parameter]]]:
        """Names and parameters in layers, from the pixels to norm and head."""
        return named_layers(self, [*self.model.layers(), [self.fc_norm, self.head]])


def set_drop_path(blocks: list[list[Part]], last: float) -> None:
    """The chance rises linearly from 0 at the first block (Huang et al. 2016); where there is no residual, nothing."""
    residual = [[part for part in block if isinstance(part, nn.Module)] for block in blocks]
    places = [
        [(part, name) for part in parts for name in ("drop_path", "drop_path1", "drop_path2") if hasattr(part, name)]
        for parts in residual
    ]
    places = [block for block in places if block]
    for i, block in enumerate(places):
        for part, name in block:
            setattr(part, name, DropPath(last * i / max(1, len(places) - 1)))
