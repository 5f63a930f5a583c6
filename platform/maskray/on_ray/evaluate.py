"""A model through a list of evaluations, on features from the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from maskray import appraisal
from maskray.appraisal import Prepared
from maskray.config.evaluation import DetectionEvaluation, EvaluateConfig, FinetuneEvaluation
from maskray.data.manifest import SplitName
from maskray.data.mapper import Progress, silent
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.evaluation.blocks import FeatureBlock
from maskray.models.encoder import Encoder
from maskray.on_ray import courses, shared
from maskray.on_ray.cluster import check_workers
from maskray.on_ray.features import feature_blocks
from maskray.publish.appraised import Appraisal


def appraise(prepared: Prepared, progress: Progress = silent) -> Appraisal:
    """A model through its evaluations, on the cluster that is connected: features, and what is not frozen.

    Args:
        prepared: by `appraisal.prepare`.
        progress: as `appraisal.appraise` takes it.

    Raises:
        ClusterError: the cluster cannot hold the workers, or they are lost again and again.
        MaskrayError, TrainingError: as `appraisal.appraise` does.
    """
    config = prepared.config
    for place, key in _places(config):
        check_workers(config.cluster, place, key, "evaluate")

    def blocks(dataset: Dataset, split: SplitName, encoder: Encoder) -> Iterator[FeatureBlock]:
        return feature_blocks(dataset, split, encoder, config.cluster, prepared.data.max_rows)

    root = Storage(config.storage.path).child(appraisal.TRAINED)
    if any(isinstance(each, FinetuneEvaluation | DetectionEvaluation) for each in config.evaluations):
        shared.check_folder(root)
    train = partial(courses.run_all, cluster=config.cluster, root=root, prefix=config.name)
    return appraisal.appraise(prepared, blocks, train, progress)


def _places(config: EvaluateConfig) -> Iterator[tuple[str, str]]:
    """Whatever workers read, and the key that says where it is."""
    if config.data is not None:
        yield config.data.path, "data.path"
    for each in config.evaluations:
        if isinstance(each, DetectionEvaluation):
            yield each.train.images, "evaluations.train.images"
            yield each.val.images, "evaluations.val.images"
