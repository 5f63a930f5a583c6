"""What a Ray Train worker sees of the stream: when each row group reached it."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import ray.data
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from maskray.config.schema import DataConfig
from maskray.data.spec import StreamSpec
from maskray.data.storage import Storage
from maskray.on_ray import stream
from maskray.on_ray.context import RayContext

CONSUMER = "consumer"
"""A resource that the cluster must have one of. The worker takes it instead of a CPU: as with a bare loader, all CPUs
decode, and the process that only takes what they give is one more."""


def arrivals(spec: StreamSpec, data: DataConfig, folder: Path, pause_seconds: float = 0.0) -> list[float]:
    """Start a run of one worker that takes the whole stream; the seconds at which it had each unit, from its asking.

    Args:
        spec: the stream.
        data: as in the run's config.
        folder: for Train's records.
        pause_seconds: that the worker is busy after each step, as if it trained.
    """
    name = uuid.uuid4().hex
    run = Storage(folder / name)
    trainer = TorchTrainer(
        _take_all,
        train_loop_config={"spec": spec, "data": data, "run": run.uri, "pause_seconds": pause_seconds},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0, CONSUMER: 1}),
        run_config=ray.train.RunConfig(
            name=name, storage_path=str(folder), logging_config=ray.train.LoggingConfig(log_level="ERROR")
        ),
        dataset_config=stream.DealingConfig(data),
        datasets=stream.datasets(spec, run, 1, data),
    )
    times: list[float] = trainer.fit().return_value
    return times


def _take_all(settings: dict[str, Any]) -> list[float]:
    torch.set_num_threads(1)
    spec, pause = settings["spec"], settings["pause_seconds"]
    start = time.perf_counter()
    share = stream.Share.of_worker(spec, settings["data"])
    context = RayContext(settings["data"], Storage(settings["run"]), share)
    times: list[float] = []
    with context.units(spec, 0) as units:
        for _ in units:
            times.append(time.perf_counter() - start)
            if pause and len(times) % spec.groups_per_step == 0:
                time.sleep(pause)
    return times
