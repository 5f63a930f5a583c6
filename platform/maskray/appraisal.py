"""A model through a list of evaluations: features once, then all that is read from them; trainings; what it paints.

Features are computed wherever blocks are made, here or on a cluster. What is read from them does not take long, and is
read in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from maskray.config.evaluation import (
    DetectionEvaluation,
    EvaluateConfig,
    EvaluationData,
    FinetuneEvaluation,
    KnnEvaluation,
    ReconstructionEvaluation,
)
from maskray.data.embeddings import Undecodable
from maskray.data.manifest import SplitName
from maskray.data.mapper import Progress, silent
from maskray.data.portions import of_split
from maskray.data.shards import Dataset
from maskray.data.storage import Storage
from maskray.data.stream import walk
from maskray.errors import CheckpointError, ConfigError, DataError
from maskray.evaluation import detection
from maskray.evaluation.blocks import FeatureBlock, blocks_here
from maskray.evaluation.classification import Labelled, check_classes, classify
from maskray.evaluation.features import Images, pixel_features
from maskray.evaluation.finetune import Finetuning, Train, finetuned
from maskray.evaluation.likeness import Likeness, likeness
from maskray.evaluation.logistic import Labels
from maskray.evaluation.pictures import BATCH
from maskray.evaluation.reconstruction import Reconstruction, reconstruct
from maskray.evaluation.scores import Score
from maskray.models.encoder import Encoder
from maskray.objective import Objective
from maskray.publish.appraised import Appraisal
from maskray.publish.named import note_section
from maskray.publish.subject import Subject, WithDecoder, open_subject
from maskray.tracking import mlflow_runs
from maskray.tracking.mlflow_store import Store, has_embedded_store, open_store, refuse_missing
from maskray.training import courses

if TYPE_CHECKING:  # an extra, and long in coming
    from maskray.evaluation.detection.coco import CocoSet, SetAside
    from maskray.evaluation.detection.outcome import Detected, DetectionScore

MAX_PIXEL_VALUES = 4096
TRAIN: SplitName = "train"
TEST: SplitName = "held_out"
TRAINED = "evaluations"
"""Folder beside the runs, for what is trained to judge a model."""

Blocks = Callable[[Dataset, SplitName, Encoder], Iterator[FeatureBlock]]
"""Features of a split's rows by an encoder, each row once, in order."""


@dataclass(frozen=True)
class Prepared:
    """An appraisal that has passed every check that takes no features."""

    config: EvaluateConfig
    images: Dataset | None
    """None: detection alone is asked for, which has its own."""
    subject: Subject
    store: Store | None
    """MLflow; None: there is none."""
    coco: tuple[CocoSet, CocoSet] | None
    """Images with objects to learn from, and to be judged on; None: detection is not asked for."""

    @property
    def dataset(self) -> Dataset:
        """Of all evaluations but detection."""
        assert self.images is not None, "the config's check refuses it"
        return self.images

    @property
    def data(self) -> EvaluationData:
        """As `dataset`, as the config says it."""
        assert self.config.data is not None, "the config's check refuses it"
        return self.config.data

    @property
    def reads_features(self) -> bool:
        """Whether any evaluation does."""
        return any(each.kind not in ("reconstruction", "finetune", "detection") for each in self.config.evaluations)

    @property
    def reads_labels(self) -> bool:
        """Whether any evaluation does."""
        return any(each.kind not in ("reconstruction", "detection") for each in self.config.evaluations)

    def encoders(self) -> dict[str, Encoder]:
        """What is judged, by what it is called."""
        untrained = {"untrained": self.subject.untrained(self.config.seed)} if self.config.untrained else {}
        return {"model": self.subject.encoder} | untrained


def prepare(config: EvaluateConfig) -> Prepared:
    """Check all that can be checked before features are computed.

    Raises:
        DataError: no dataset, no labels, a split without rows, one class only, or classes without training rows.
        ConfigError: more neighbours than rows, a reconstruction by an encoder alone, detection without its extra, or of
            a size that does not suit the encoder.
        MaskrayError: as `open_subject`, and `open_sets` and `check_images` of detection do.
    """
    asked = [each for each in config.evaluations if isinstance(each, DetectionEvaluation)]
    if asked:
        detection.check_installed()
    dataset = None if config.data is None else Dataset.open(config.data.path, config.data.version)
    subject = open_subject(config.model, config.tracking, config.storage.path, "model")
    prepared = Prepared(config, dataset, subject, _store_of(config), coco=None)
    if dataset is not None:
        _check_bands(dataset, subject)
    if prepared.reads_labels:
        _check_labels(prepared)
    if subject.checkpoint is None and any(each.kind == "reconstruction" for each in config.evaluations):
        raise ConfigError(
            "an encoder alone paints nothing",
            key="evaluations",
            found=f"reconstruction, of {subject.name}",
            allowed="reconstruction of a checkpoint's folder",
            fix="give a checkpoint as model, or leave reconstruction out",
        )
    # Last, for it takes longest: COCO's own file is half a gigabyte.
    return replace(prepared, coco=next((_coco(each, subject.encoder) for each in asked), None))


def _coco(evaluation: DetectionEvaluation, encoder: Encoder) -> tuple[CocoSet, CocoSet]:
    from maskray.evaluation.detection.outcome import check_images, open_sets
    from maskray.evaluation.detection.pyramid import check_side

    check_side(encoder, evaluation.image_size)
    sets = open_sets(evaluation)
    for each in sets:
        check_images(each, encoder.channels)
    return sets


def _store_of(config: EvaluateConfig) -> Store | None:
    """An MLflow that is there: none is made for who only adds to it."""
    if config.tracking.uri is not None:
        refuse_missing(config.tracking.uri)
    elif not has_embedded_store(config.storage.path):
        return None
    return open_store(config.tracking, Storage(config.storage.path).uri)


def _check_bands(dataset: Dataset, subject: Subject) -> None:
    bands, wanted = dataset.manifest.channels, subject.encoder.channels
    if bands != wanted and not {bands, wanted} <= {1, 3}:
        raise DataError(
            f"the encoder takes images of {wanted} bands",
            key="data.path",
            found=f"{dataset.storage.uri}, of {bands} bands",
            fix="take a dataset of such images",
        )


def _check_labels(prepared: Prepared) -> None:
    config, dataset, data = prepared.config, prepared.dataset, prepared.data
    names = dataset.manifest.class_names
    if not names:
        raise DataError(
            "these evaluations need labels, and the dataset has none",
            key="data.path",
            found=data.path,
            fix="ingest images in class folders (or with a label column), or evaluate the reconstruction alone",
        )
    train, test = (dataset.labels(split, data.max_rows) for split in (TRAIN, TEST))
    check_classes(train, test, list(names))
    _check_draws(config, train)
    most = max((max(each.k) for each in config.evaluations if isinstance(each, KnnEvaluation)), default=0)
    if most > len(train):
        raise ConfigError(
            "there are fewer training rows than neighbours",
            key="evaluations",
            found=f"knn with k {most}",
            allowed=f"1 to {len(train)}",
            fix="lower k, or raise data.max_rows",
        )


def _check_draws(config: EvaluateConfig, train: Labels) -> None:
    wanted: list[tuple[int, str]] = [(0, "")]
    for each in config.evaluations:
        if each.kind == "logistic":
            wanted.append((each.labels_per_class or 0, each.kind))
        elif each.kind == "finetune":
            wanted += [(num, each.kind) for num in each.labels_per_class]
    most, kind = max(wanted)
    smallest = int(np.unique(train, return_counts=True)[1].min())
    if most > smallest:
        raise DataError(
            "a class has fewer training rows than labels to draw from it",
            key="evaluations",
            found=f"{kind} with labels_per_class {most}",
            allowed=f"1 to {smallest}",
            fix="lower it, or raise data.max_rows",
        )


def appraise(prepared: Prepared, blocks: Blocks, train: Train, progress: Progress = silent) -> Appraisal:
    """Run the evaluations.

    Neighbours are sought and heads trained in this process: on its GPU, where workers have some and it has one too.

    Args:
        prepared: by `prepare`.
        blocks: where features come from.
        train: who trains what is not frozen.
        progress: is told of the steps of that.

    Raises:
        MaskrayError: a shard is damaged, or workers are lost again and again.
        TrainingError: a detector's training went wrong, or workers were lost too often.
    """
    config, subject = prepared.config, prepared.subject
    device = _device(config)
    scores, undecodable, counts = list[Score](), dict[tuple[str, int], Undecodable](), (0, 0)
    figures = dict[str, bytes]()
    kinds = _kinds_of_features(prepared, blocks, undecodable) if prepared.reads_features else iter(())
    for name, rows in kinds:
        counts = len(rows.train_labels), len(rows.test_labels)
        for evaluation in config.evaluations:
            if not isinstance(evaluation, ReconstructionEvaluation | FinetuneEvaluation | DetectionEvaluation):
                scores += classify(evaluation, rows, features=name, seed=config.seed, device=device)
    for evaluation in config.evaluations:
        if isinstance(evaluation, FinetuneEvaluation):
            data = (prepared.dataset, prepared.data.max_rows)
            what = Finetuning(evaluation, prepared.encoders(), *data, config.seed, _threads(config))
            found = finetuned(what, train, progress)
            scores += found.scores
            undecodable |= {(TEST, each.row): each for each in found.undecodable}
            counts = found.num_train, found.num_test
    detections: list[DetectionScore] = []
    set_aside: list[SetAside] = []
    for evaluation in config.evaluations:
        if isinstance(evaluation, DetectionEvaluation):
            one = _detected(prepared, evaluation, train, progress)
            detections, set_aside, figures = one.scores, one.set_aside, figures | one.figures
    likenesses, paintings = _paintings(prepared)
    return Appraisal(
        name=config.name,
        model=subject.name,
        dataset=None if prepared.images is None else prepared.images.manifest.fingerprint,
        num_train=counts[0],
        num_test=counts[1],
        scores=tuple(scores),
        likenesses=tuple(likenesses),
        detections=tuple(detections),
        figures=figures | paintings,
        undecodable=tuple(undecodable.values()),
        set_aside=tuple(set_aside),
    )


def _paintings(prepared: Prepared) -> tuple[list[Likeness], dict[str, bytes]]:
    config, subject = prepared.config, prepared.subject
    likenesses, figures = list[Likeness](), dict[str, bytes]()
    for evaluation in config.evaluations:
        if isinstance(evaluation, ReconstructionEvaluation):
            assert subject.checkpoint is not None, "prepare() refuses it"
            images = _first_images(prepared, subject.checkpoint, evaluation.images)
            for ratio in evaluation.ratios:
                painted = _painted(subject.checkpoint, images, ratio, config.seed)
                likenesses.append(likeness(painted, ratio))
                some = painted.first(evaluation.figure_images)
                figures[f"reconstruction_{ratio:g}"] = some.figure(f"{subject.name}, ratio {ratio:g}")
    return likenesses, figures


def _detected(prepared: Prepared, evaluation: DetectionEvaluation, train: Train, progress: Progress) -> Detected:
    from maskray.evaluation.detection.course import Detection
    from maskray.evaluation.detection.outcome import detected

    assert prepared.coco is not None, "prepare() reads it"
    config = prepared.config
    what = Detection(evaluation, *prepared.coco, prepared.encoders(), config.seed, _threads(config))
    return detected(what, train, progress)


def _threads(config: EvaluateConfig) -> int:
    return max(1, int(config.cluster.cpus_per_worker))


def appraise_here(prepared: Prepared, progress: Progress = silent) -> Appraisal:
    """As `appraise`, with features from threads of this process, as many as a worker has CPUs, that trains too."""
    config = prepared.config

    def blocks(dataset: Dataset, split: SplitName, encoder: Encoder) -> Iterator[FeatureBlock]:
        images = of_split(dataset, split, BATCH, prepared.data.max_rows)
        return blocks_here(images, encoder, _threads(config))

    root = Storage(config.storage.path).child(TRAINED)
    train = partial(courses.run_all_here, root=root, prefix=config.name, device=_device(config))
    return appraise(prepared, blocks, train, progress)


def _device(config: EvaluateConfig) -> torch.device:
    """This process's, where workers have one."""
    on_gpu = config.cluster.gpus_per_worker > 0 and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _kinds_of_features(
    prepared: Prepared, blocks: Blocks, undecodable: dict[tuple[str, int], Undecodable]
) -> Iterator[tuple[str, Labelled]]:
    config, subject = prepared.config, prepared.subject
    for name, encoder in prepared.encoders().items():
        sides = [_collected(blocks, prepared.dataset, split, encoder, undecodable) for split in (TRAIN, TEST)]
        rows = Labelled(*sides[0], *sides[1])
        # Again: of what could be decoded.
        check_classes(rows.train_labels, rows.test_labels, list(prepared.dataset.manifest.class_names))
        yield name, rows
    height, width = subject.encoder.image_size
    if config.raw_pixels and height * width * subject.encoder.channels <= MAX_PIXEL_VALUES:
        sides = [_pixels(prepared, split) for split in (TRAIN, TEST)]
        yield "raw pixels", Labelled(*sides[0], *sides[1])


def _collected(
    blocks: Blocks,
    dataset: Dataset,
    split: SplitName,
    encoder: Encoder,
    undecodable: dict[tuple[str, int], Undecodable],
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float32]], Labels]:
    features, labels = [], []
    for block in blocks(dataset, split, encoder):
        assert block.labels is not None, "prepare() refuses a dataset without"
        features.append(block.features)
        labels.append(block.labels)
        undecodable |= {(split, each.row): each for each in block.undecodable}
    found = np.concatenate(features)
    if not np.isfinite(found).all():
        raise CheckpointError(
            "the encoder gives features that are no finite numbers", found=f"rows of {split}", fix="take another model"
        )
    return found, np.concatenate(labels)


def _pixels(prepared: Prepared, split: SplitName) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float32]], Labels]:
    encoder, max_rows = prepared.subject.encoder, prepared.data.max_rows
    groups = list(walk(prepared.dataset, split, encoder.image_size, encoder.channels, max_rows))
    images = torch.cat([group.images_BCHW for group in groups]).numpy()
    return pixel_features(images), np.concatenate([g.labels for g in groups if g.labels is not None])


def _first_images(prepared: Prepared, found: WithDecoder, num: int) -> Images:
    split = TEST if prepared.dataset.num_rows(TEST) else TRAIN
    groups = walk(prepared.dataset, split, found.run.data.image_size, found.run.data.channels, num)
    return torch.cat([group.images_BCHW for group in groups]).numpy()


def _painted(found: WithDecoder, images_NCHW: Images, ratio: float, seed: int) -> Reconstruction:
    mask = found.run.mask.model_copy(update={"ratio": (ratio,)})
    objective = Objective(found.run.objective, found.run.cell)
    return reconstruct(found.model, found.normalize, objective, images_NCHW, mask, seed)


def record(prepared: Prepared, appraisal: Appraisal) -> str | None:
    """Tell MLflow's run of the model what came out; its id, or None where MLflow has no such run.

    Metrics are those of the model's step, the newest value of each is shown; table and figures are in `evaluation/NAME`
    among the artifacts, and replace those of an earlier evaluation of that name. So does the table in the card of a
    registered version.

    Raises:
        TrackingError: MLflow is away, or does not take it all.
    """
    subject = prepared.subject
    if prepared.store is None:
        return None
    if appraisal.scores or appraisal.detections:
        note_section(prepared.store.uri, subject.name, f"Evaluation {appraisal.name}", appraisal.markdown())
    run_id = subject.run_id
    if subject.checkpoint is not None:
        run_id = mlflow_runs.find_run(prepared.store, subject.checkpoint.facts.fingerprint)
    if run_id is None:
        return None
    files = {f"{name}.png": png for name, png in appraisal.figures.items()}
    files |= {"evaluation.json": appraisal.dump().encode()}
    mlflow_runs.add_evaluation(
        prepared.store, run_id, f"evaluation/{appraisal.name}", appraisal.metrics(), subject.step, files
    )
    return run_id
