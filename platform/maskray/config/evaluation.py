"""What `maskray evaluate` is asked for: which model, on which data, by which evaluations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from maskray.config.models import Ratio
from maskray.config.schema import ClusterConfig, Crop, RandomResizedCrop, StorageConfig, TrackingConfig
from maskray.config.section import Fraction, PositiveInt, Section, operational

Share = Annotated[float, Field(gt=0, le=1)]


class KnnEvaluation(Section):
    """Weighted k nearest neighbours by cosine, with every training label (Wu et al. 2018)."""

    kind: Literal["knn"] = "knn"
    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (20,)
    """Neighbours; each number is reported."""
    temperature: PositiveFloat = 0.07


class LogisticEvaluation(Section):
    """Logistic regression on standardised features, scikit-learn's, L2 with C = 1."""

    kind: Literal["logistic"] = "logistic"
    labels_per_class: PositiveInt | None = None
    """None: every training label."""
    draws: PositiveInt = 10
    """Draws of `labels_per_class` labels whose accuracies are averaged."""


class LinearEvaluation(Section):
    """Linear heads on standardised features, by SGD; the learning rate is chosen on a fifth of the training rows."""

    kind: Literal["linear"] = "linear"
    label_shares: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.01, 0.1, 1.0)
    """Shares of the labels of each class, one at least, that are trained with; each is reported."""
    draws: PositiveInt = 3
    """Draws of a share below 1 whose accuracies are averaged."""
    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """For a batch of 256 rows; the grid is trained in one pass."""
    epochs: PositiveInt = 90
    batch: PositiveInt = 1024


class FinetuneEvaluation(Section):
    """Encoder and a linear head trained together on labels, by the MAE authors' recipe (He et al. 2022, Table 9).

    Beside it, where `untrained` asks for it, the same network from scratch: the same recipe, without layer decay.
    Images are judged whole, as by the other evaluations.
    """

    kind: Literal["finetune"] = "finetune"
    labels_per_class: tuple[PositiveInt, ...] = ()
    """Labels of each class that are trained with; each number is reported."""
    label_shares: tuple[Share, ...] = (0.01, 0.1, 1.0)
    """Shares of the labels of each class, one at least, that are trained with; each is reported."""
    draws: PositiveInt = 3
    """Draws of labels whose accuracies are averaged, where not all are taken. The rows are those that the other
    evaluations draw."""
    epochs: PositiveFloat = 100.0
    """Passes over the labels."""
    least_steps: PositiveInt = 200
    """Steps at least: passes are added where labels are few."""
    batch: Annotated[int, Field(ge=2)] = 1024
    """Rows of a step, or all of them where there are fewer."""
    base_lr: PositiveFloat = 5e-4
    """The learning rate is base_lr × batch / 256: the authors' for ViT-B; 1e-3 for larger ones."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Where the cosine ends."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    """Of the learning rate, from each layer to the one before it: the authors' for ViT-B; 0.75 for larger ones."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    warmup_fraction: Fraction = 0.05
    """Share of the steps in which the learning rate rises."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Chance that the last residual block is left out for an image; it rises from 0 with the depth."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    mixup: Annotated[float, Field(ge=0)] = 0.8
    """Alpha of the Beta distribution by which images are mixed; 0: none."""
    cutmix: Annotated[float, Field(ge=0)] = 1.0
    """Likewise, of pieces put into each other. Where both are above 0, each is taken half of the time."""
    crop: Crop = RandomResizedCrop(scale=(0.08, 1.0))
    flip_probability: Fraction = 0.5
    precision: Literal["fp32", "bf16"] = "fp32"
    unit_rows: Annotated[int, Field(ge=2)] = 32
    """Rows that a worker takes at once: they are mixed among each other, and batch normalisation, where the encoder has
    it, takes its statistics over them. So a step's rows and their mixing do not depend on the number of workers; which
    residual blocks are left out does, unless drop_path is 0."""
    keep_bytes: PositiveInt = 2 * 2**30
    """Images that a worker keeps in memory, if those that are trained on fit into so many; else they are read again in
    each pass, a row group at a time."""
    pass_units: PositiveInt = 8
    """Units in one forward and backward pass of a worker. Which residual blocks are left out is drawn for them all at
    once."""
    checkpoint_steps: PositiveInt = operational(200)
    """Steps between two checkpoints."""

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> FinetuneEvaluation:
        if not self.labels_per_class and not self.label_shares:
            raise ValueError("give labels_per_class or label_shares: there is nothing to train with")
        return self


class ReconstructionEvaluation(Section):
    """What the decoder paints of fixed images under fixed masks: loss, PSNR and SSIM by ratio, and a figure."""

    kind: Literal["reconstruction"] = "reconstruction"
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1)] = (0.5, 0.6, 0.7, 0.8, 0.9)
    images: PositiveInt = 64
    """The first of the held-out split."""
    figure_images: Annotated[int, Field(ge=1, le=16)] = 4


class CocoData(Section):
    """Images with their objects, in COCO's format."""

    annotations: str = operational()
    """Path or URI of the JSON file."""
    images: str = operational()
    """Folder or URI that the file names of the annotations are relative to."""
    max_images: PositiveInt | None = None
    """The first by id; None takes all."""


class DetectionEvaluation(Section):
    """Faster or Mask R-CNN on the encoder, trained and judged on data of its own (Li et al. 2022, for transformers)."""

    kind: Literal["detection"] = "detection"
    train: CocoData
    val: CocoData
    """Judged on; the same categories."""
    masks: bool = False
    """Mask R-CNN: outlines too."""
    image_size: PositiveInt = 512
    """Pixels a side of the square that images are fitted into. The recipe's is 1,024, which costs far more."""
    epochs: PositiveFloat = 25
    batch: PositiveInt = 16
    """Images of a step, of all workers."""
    base_lr: PositiveFloat = 4e-4
    """For a batch of 256 images; scaled linearly with the batch."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    layer_decay: Share = 0.7
    """Of the rate, from each of the encoder's layers to the one before."""
    warmup_fraction: Fraction = 0.02
    """Of the steps, in which the rate rises to its peak; then half a cosine."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Chance that the last residual block is left out for an image; it rises from 0 with the depth."""
    clip_norm: PositiveFloat = 1.0
    flip_probability: Fraction = 0.5
    pyramid_width: PositiveInt = 256
    """Channels of each level of the pyramid."""
    head_width: PositiveInt = 1024
    proposals: PositiveInt = 1000
    """Boxes of an image that are looked at again."""
    sampled_boxes: PositiveInt = 512
    """Of them, those of an image that are learned from in a step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast."""
    figure_images: Annotated[int, Field(ge=1, le=12)] = operational(6)
    """Of the validation images, drawn with what was found."""
    checkpoint_steps: PositiveInt = operational(200)
    """Steps between two checkpoints."""


FeatureEvaluation = KnnEvaluation | LogisticEvaluation | LinearEvaluation
"""What reads frozen features."""
Evaluation = Annotated[
    FeatureEvaluation | FinetuneEvaluation | DetectionEvaluation | ReconstructionEvaluation, Field(discriminator="kind")
]


class EvaluationData(Section):
    """Labelled images: learned from in the training split, judged on in the held-out one."""

    path: str
    """Folder or URI of an ingested dataset."""
    version: str | None = None
    """Fingerprint of a dataset's version; None takes the newest."""
    max_rows: PositiveInt | None = None
    """Rows at most of each split: the first ones. None takes all."""


class EvaluateConfig(Section):
    """One model through a list of evaluations."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Of the table, and of the metrics: `evaluation/NAME/…`."""
    model: str
    """Folder or URI of a checkpoint, or of an encoder with `encoder.json`; or `models:/name@alias`,
    `models:/name/version` of the registry. Reconstruction wants a checkpoint: an encoder alone paints nothing."""
    data: EvaluationData | None = None
    """Of all evaluations but detection, which has its own."""
    evaluations: Annotated[tuple[Evaluation, ...], Field(min_length=1)]
    untrained: bool = True
    """Judge the same encoder before any training too: what of a score is pretraining's."""
    raw_pixels: bool = True
    """Judge the pixels themselves as features too, where an image has at most 4,096 values."""
    seed: Annotated[int, Field(ge=0)] = 0
    cluster: ClusterConfig = ClusterConfig()
    """Workers that compute features, and the CPUs and GPUs of each."""
    storage: StorageConfig = StorageConfig()
    """Where the runs are, beside which MLflow's embedded store lies."""
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _each_once(self) -> EvaluateConfig:
        kinds = [each.kind for each in self.evaluations if each.kind != "logistic"]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"evaluations: {', '.join(twice)} stands there twice; list its values in one")
        return self

    @model_validator(mode="after")
    def _with_data(self) -> EvaluateConfig:
        others = [each.kind for each in self.evaluations if each.kind != "detection"]
        if others and self.data is None:
            raise ValueError(f"data must be given: {others[0]} is judged on a dataset's images")
        return self
