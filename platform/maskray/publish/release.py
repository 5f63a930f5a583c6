"""A trained run's encoder into the registry, with all that is known of where it comes from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from maskray import masking
from maskray.config.load import dump
from maskray.config.models import AnyModel
from maskray.config.resolve import RunPlan
from maskray.config.schema import RunConfig
from maskray.data.shards import Dataset
from maskray.evaluation.features import Images
from maskray.evaluation.judgement import Judgement
from maskray.evaluation.reconstruction import reconstruct
from maskray.evaluation.scores import interval
from maskray.models.build import build_normalize, initial_model, weightless_model
from maskray.models.cost import cost
from maskray.models.encoder import save_encoder
from maskray.models.foreign import load_weights
from maskray.objective import Objective
from maskray.publish import card, registry
from maskray.publish.card import Data, Lineage, Score, Trained
from maskray.publish.registry import ModelCard
from maskray.tracking import mlflow_runs
from maskray.tracking.mlflow_store import Store
from maskray.training.throughput import IMAGES_PER_SECOND

Curve = Sequence[tuple[int, float]]
"""Step and value, by step."""


@dataclass(frozen=True)
class TrainedRun:
    """A run whose steps are all done and logged."""

    config: RunConfig
    plan: RunPlan
    dataset: Dataset
    store: Store
    """MLflow."""
    run_id: str
    code: Mapping[str, str]
    """As `mlflow_runs.provenance` says it."""

    @property
    def registered_as(self) -> str:
        """Name in the registry."""
        return self.config.tracking.register_as or self.config.name


def release(run: TrainedRun, weights: Path, images: Images, judgement: Judgement | None) -> tuple[Lineage, str]:
    """Register the encoder; its lineage, and the number of its version.

    Args:
        run: that it comes from.
        weights: folder of its newest checkpoint.
        images: uint8 (N, C, H, W), that its reconstructions are shown of.
        judgement: None where there was none.

    Raises:
        TrackingError: MLflow refuses.
    """
    config, name = run.config, f"{run.plan.run_name}, step {run.plan.total_steps}"
    loss, rate = (mlflow_runs.curve(run.store, run.run_id, key) for key in ("pretrain/loss", IMAGES_PER_SECOND))
    lineage = gather(run, loss, rate, judgement)
    model = initial_model(config.model_copy(update={"init_from": None}))
    load_weights(model, weights)
    normalize = build_normalize(config, run.dataset.manifest)
    painted = reconstruct(model, normalize, Objective(config.objective, config.cell), images, config.mask, config.seed)
    told = ModelCard(
        step=run.plan.total_steps,
        tags={mlflow_runs.DATASET_PARAM: lineage.data.fingerprint, **lineage.tags()},
        metrics={score.measure: score.value for score in lineage.scores if score.of == "after"},
        description=card.markdown(lineage),
        files={
            card.LINEAGE: lineage.dump(),
            card.CONFIG: dump(config).encode(),
            card.FIGURE: painted.figure(name),
        },
        example=images.transpose(0, 2, 3, 1),
    )
    with tempfile.TemporaryDirectory(prefix="maskray-") as folder:
        save_encoder(Path(folder), model, normalize, config)
        return lineage, registry.register_encoder(run.store.uri, run.run_id, Path(folder), run.registered_as, told)


def gather(run: TrainedRun, loss: Curve, rate: Curve, judgement: Judgement | None) -> Lineage:
    """What is known of a run.

    Args:
        run: that is trained.
        loss: of the whole run.
        rate: images/s of the whole run, each value over the steps since the one before it.
        judgement: None where there was none.
    """
    config, plan, dataset = run.config, run.plan, run.dataset
    manifest, built = dataset.manifest, weightless_model(config)
    counts = masking.visible_counts(config.mask, config.grid)
    costs = [cost(built, num, masking.num_target(config.objective, config.grid, num)) for num in counts]
    digest = plan.identity.get("init_digest")
    return Lineage(
        model=run.registered_as,
        run=plan.run_name,
        run_id=run.run_id,
        fingerprint=plan.fingerprint,
        architecture=_architecture(config.model),
        image_size=config.data.image_size,
        channels=config.data.channels,
        encoder_parameters=costs[0].encoder_parameters,
        feature_width=built.width,
        mask=config.mask.model_dump(mode="json"),
        seeds={"run": config.seed},
        data=Data(
            fingerprint=manifest.fingerprint,
            place=dataset.storage.uri,
            train_rows=dataset.num_rows(),
            held_out_rows=dataset.num_rows("held_out"),
            classes=len(manifest.class_names),
        ),
        init_from=config.init_from,
        init_digest=None if digest is None else str(digest),
        code=dict(run.code),
        trained=_trained(config, plan, fmean(each.training_flops for each in costs), rate),
        first_loss=loss[0][1],
        last_loss=loss[-1][1],
        scores=() if judgement is None else _scores(judgement),
        scored_rows=0 if judgement is None else judgement.num_test,
    )


def training_seconds(rate: Curve, global_batch: int) -> float:
    """Time in the loop, from the images/s over each stretch of steps: a resumed run's too, each step once."""
    starts = [0, *(step for step, _ in rate)]
    return sum((step - before) * global_batch / value for before, (step, value) in zip(starts, rate, strict=False))


def _trained(config: RunConfig, plan: RunPlan, flops_per_view: float, rate: Curve) -> Trained:
    cluster, skipped = config.cluster, config.training.skip_steps
    views = (plan.total_steps - len(skipped)) * plan.global_batch
    seconds = training_seconds(rate, plan.global_batch)
    on_gpu = cluster.gpus_per_worker > 0
    units = cluster.workers * (cluster.gpus_per_worker if on_gpu else cluster.cpus_per_worker)
    return Trained(
        steps=plan.total_steps,
        global_batch=plan.global_batch,
        views=views,
        passes=(plan.total_steps - len(skipped)) / plan.steps_per_pass,
        flops=views * flops_per_view,
        seconds=seconds,
        hours=seconds * units / 3600,
        hours_of="accelerator" if on_gpu else "core",
        workers=cluster.workers,
        skipped=skipped,
    )


def _scores(judgement: Judgement) -> tuple[Score, ...]:
    meanings = {
        "probe/few_labels": f"logistic regression, {judgement.labels_per_class} labels a class, mean ± std of draws",
        "probe/all_labels": f"logistic regression, all {judgement.num_train:,} labels",
        "probe/knn": f"{judgement.k} nearest neighbours, weighted",
    }
    out = []
    for of, scores in (("before", judgement.before), ("after", judgement.after), ("pixels", judgement.pixels)):
        for measure, value in scores.metrics().items() if scores is not None else ():
            std = scores.few_labels.std if scores is not None and measure == "probe/few_labels" else None
            low, high = interval(value, judgement.num_test)
            out.append(Score(measure, meanings[measure], of, value, low, high, std))
    return tuple(out)


def _architecture(model: AnyModel) -> str:
    """The kind, and what is said of the encoder."""
    plain = {k: v for k, v in model.model_dump(mode="json", exclude={"decoder", "kind"}).items() if v is not None}
    return f"{model.kind} (" + ", ".join(f"{key} {value}" for key, value in plain.items()) + ")"
