"""What a trial of a sweep comes to without Ray: trained and judged in this process."""

from pathlib import Path

import torch

from maskray.config.sweep import LOSS
from maskray.evaluation.judgement import Bench
from maskray.pretrain import pretrain
from maskray.sweeps.record import Trial
from maskray.sweeps.space import Space
from maskray.tracking.base import Observer
from maskray.training import folders
from maskray.training.context import LocalContext


def alone(space: Space, trial: Trial, folder: Path) -> dict[str, float]:
    """Its metrics, as `Result.metrics` has them; its checkpoints go to an empty folder."""
    config, logged = space.run_config(trial), dict[str, float]()
    pretrain(config, LocalContext(folder, config.data), Observer(lambda _, metrics: logged.update(metrics)))
    (weights,) = folder.glob(f"{folders.FOLDER_PREFIX}*{trial.steps}-*")
    scores = Bench(config, torch.device("cpu")).find(trial.steps, weights).scores
    assert scores is not None
    return {**scores.metrics(), LOSS: logged[LOSS]}
