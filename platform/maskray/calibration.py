"""How long a step takes here: a few real ones, of the run itself, on its own data."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from maskray.config.schema import RunConfig
from maskray.pretrain import pretrain
from maskray.tracking.base import Observer
from maskray.training.context import LocalContext

_STEPS, _FIRST = 8, 3  # the first ones fill caches and lay out memory


def seconds_per_step(config: RunConfig) -> float:
    """The median of a few steps in this process, as one worker; nothing is kept of them.

    Args:
        config: of a run with `data.stream: local`.

    Raises:
        MaskrayError, TrainingError: of the run.
    """
    length = {"steps": _STEPS, "epochs": None, "warmup_steps": 0, "warmup_epochs": None}
    every = {"log_steps": 1, "checkpoint_steps": _STEPS, "probe_steps": None, "probe_at": ()}
    short = config.model_copy(
        update={
            "optim": config.optim.model_copy(update=length),
            "training": config.training.model_copy(update=every),
            "cluster": config.cluster.model_copy(update={"workers": 1}),
        }
    )
    done: list[float] = []
    device = torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    with tempfile.TemporaryDirectory(prefix="maskray-") as folder:
        pretrain(
            short,
            LocalContext(Path(folder), short.data, device=device),
            Observer(lambda *_: done.append(time.perf_counter())),
        )
    return median(after - before for before, after in zip(done[_FIRST:], done[_FIRST + 1 :], strict=False))
