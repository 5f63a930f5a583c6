"""Embedding on a cluster: checks of what its nodes see, and blocks by actors."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from maskray.data.mapper import Progress
from maskray.data.portions import Images
from maskray.on_ray.cluster import check_embed
from maskray.on_ray.features import blocks_on_ray
from maskray.publish import embedding
from maskray.publish.embedding import Prepared
from maskray.publish.export import Encoder
from maskray.publish.features import FeatureBlock


def embed(prepared: Prepared, report: Progress) -> dict[str, Any]:
    """Embed on the cluster that is connected; the manifest.

    Raises:
        ClusterError: the cluster cannot hold the workers, not all nodes see the images, or workers are lost again and
            again.
        MaskrayError: as `embedding.embed` does.
    """
    config = prepared.config
    check_embed(config)

    def blocks(images: Images, encoder: Encoder) -> Generator[FeatureBlock]:
        return blocks_on_ray(images, encoder, config.cluster, config.batch, config.precision)

    return embedding.embed(prepared, blocks, report)
