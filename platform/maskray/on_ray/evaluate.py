"""Judging a checkpoint as a Ray task."""

from __future__ import annotations

import ray
import torch

from maskray.config.schema import RunConfig
from maskray.data.storage import Storage
from maskray.evaluation import judgement
from maskray.evaluation.judgement import Judgement
from maskray.pretrain import settle
from maskray.training import checkpoint


def judge(config: RunConfig, weights: Storage) -> Judgement | None:
    """The first judgement of the checkpoint at `weights`, with the resources of a worker."""
    cluster = config.cluster
    # cuBLAS wants it where kernels are deterministic.
    environment = {"env_vars": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}
    resources = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker}
    task = ray.remote(**resources, runtime_env=environment)(_judge)
    return ray.get(task.remote(config, weights))  # type: ignore[no-any-return]


def _judge(config: RunConfig, weights: Storage) -> Judgement | None:
    settle(config)
    device = torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    with checkpoint.on_disk(weights) as folder:
        return judgement.judge(config, folder, device)
