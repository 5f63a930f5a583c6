"""The best of a sweep, registered and offered to the registry's gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from maskray.config.load import merge, parse
from maskray.config.promotion import PromotionConfig
from maskray.config.schema import RunConfig
from maskray.config.sweep import RegisterConfig, SweepConfig
from maskray.data.storage import Storage
from maskray.errors import ConfigError
from maskray.evaluation.judgement import first_images, judge
from maskray.pretrain import settle
from maskray.publish.decisions import Decision
from maskray.publish.promotion import promote
from maskray.publish.release import TrainedRun, release
from maskray.sweeps import record
from maskray.sweeps.ranking import ranked
from maskray.sweeps.record import Result
from maskray.sweeps.space import Space, plan_of
from maskray.tracking.mlflow_store import Store
from maskray.training import checkpoint


def best_trial(config: SweepConfig, results: Mapping[str, Result]) -> Result | None:
    """That of the best point whose seed came out best; None: no trial finished."""
    points = ranked(config, results)
    if not points or points[0].mean is None:
        return None
    sign = 1 if config.objective.direction == "max" else -1
    finished = [result for result in points[0].results if result.status == "finished"]
    return max(finished, key=lambda result: sign * (result.value or 0.0))


class Registered(NamedTuple):
    """What came of the best trial in the registry."""

    model: str
    version: str
    decision: Decision | None
    """None where no promotion was asked for, or nothing was to be decided."""


def register(space: Space, folder: Storage, store: Store, code: Mapping[str, str], best: Result) -> Registered | None:
    """Register the encoder of a trial, and offer it as challenger, where the config says so.

    Args:
        space: of the sweep.
        folder: of the sweep.
        store: MLflow.
        code: as `mlflow_runs.provenance` says it.
        best: a trial that has finished.

    Raises:
        MaskrayError: as `publish.release.release` and `publish.promotion.promote` do.
    """
    wanted = space.config.register_best
    if wanted is None:
        return None
    assert best.run_id is not None
    assert best.checkpoint is not None
    config, dataset = space.run_config(best.trial), space.dataset
    tracking = config.tracking.model_copy(update={"register_as": wanted.name})
    config = config.model_copy(update={"tracking": tracking})
    run = TrainedRun(config, plan_of(config, dataset), dataset, store, best.run_id, code)
    settle(config)
    with checkpoint.on_disk(folder.child(record.TRIALS, best.trial.key, best.checkpoint)) as weights:
        verdict = judge(config, weights, torch.device("cpu"))
        _, version = release(run, weights, first_images(dataset, config), verdict.judgement)
    promotion = promotion_of(config, wanted)
    if promotion is None:
        return Registered(wanted.name, version, None)
    return Registered(wanted.name, version, promote(promotion.model_copy(update={"challenger": version})))


def promotion_of(base: RunConfig, wanted: RegisterConfig) -> PromotionConfig | None:
    """The promotion that is asked for, of whatever version; by default on the sweep's own dataset."""
    if wanted.promotion is None:
        return None
    places = {
        "model": wanted.name,
        "storage": {"path": base.storage.path},
        "tracking": {"uri": base.tracking.uri},
    }
    mine = {"data": {"path": base.data.path}}
    try:
        return parse(PromotionConfig, merge(mine, wanted.promotion) | places, "it")
    except ConfigError as error:
        raise ConfigError(str(error), key="register_best.promotion") from error
