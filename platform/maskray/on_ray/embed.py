"""Embedding on a cluster: checks of what its nodes see, and blocks by actors."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from maskray.data.mapper import Progress
from maskray.data.portions import Images
from maskray.embedding import table
from maskray.embedding.table import Prepared
from maskray.evaluation.blocks import FeatureBlock
from maskray.models.encoder import Encoder
from maskray.on_ray.cluster import check_embed
from maskray.on_ray.features import blocks_on_ray


def embed(prepared: Prepared, report: Progress) -> dict[str, Any]:
    """Embed on the cluster that is connected; the manifest.

    Raises:
        ClusterError: the cluster cannot hold the workers, not all nodes see the images, or workers are lost again and
            again.
        MaskrayError: as `table.embed` does.
    """
    config = prepared.config
    check_embed(config)

    def blocks(images: Images, encoder: Encoder) -> Generator[FeatureBlock]:
        return blocks_on_ray(images, encoder, config.cluster, config.batch, config.precision)

    return table.embed(prepared, blocks, report)
