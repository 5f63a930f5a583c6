"""The config meets the dataset: durations in steps, groups a step, and the run's identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maskray.config.load import fingerprint, identity
from maskray.config.models import SparseConvConfig
from maskray.config.schema import PretrainClusterConfig, RunConfig
from maskray.config.training import OptimConfig
from maskray.errors import ConfigError, DataError


@dataclass(frozen=True)
class DatasetFacts:
    """What the config must know of a dataset (from its manifest)."""

    fingerprint: str
    group_rows: int
    num_row_groups: int
    """Full row groups of the training split: what a pass is made of."""
    num_rows: int
    """Rows of the training split, left-over rows included."""


@dataclass(frozen=True)
class RunPlan:
    """All durations in steps, and the run's identity. One function makes it; nothing else converts."""

    run_name: str
    fingerprint: str
    identity: dict[str, Any]
    """What the fingerprint is over: what is learned, from which data and weights, with durations in steps."""
    num_row_groups: int
    group_rows: int
    views_per_image: int
    groups_per_step: int
    total_steps: int
    warmup_steps: int

    @property
    def steps_per_pass(self) -> float:
        """Steps in one pass over the data; steps ignore the borders of passes."""
        return self.num_row_groups / self.groups_per_step

    @property
    def global_batch(self) -> int:
        """Views in one step, over all workers."""
        return self.groups_per_step * self.views_per_group

    @property
    def views_per_group(self) -> int:
        """Views in one row group."""
        return self.group_rows * self.views_per_image


def resolve(config: RunConfig, data: DatasetFacts, init_digest: str | None = None) -> RunPlan:
    """The plan of a run on a dataset.

    Args:
        config: of the run.
        data: facts of the dataset at `data.path`.
        init_digest: digest of the weights at `init_from`; a part of the identity.

    Raises:
        DataError: the dataset has no full row group.
        ConfigError: the global batch is not whole row groups, more workers than a step has row groups, a number of
            workers that may change and does not divide them, a micro-batch that is neither whole groups nor a divisor
            of one, or steps to be skipped that there are not.
    """
    if data.num_row_groups == 0:
        raise DataError(
            "the training split has no full row group",
            key="data.path",
            found=f"{data.num_rows} rows with group_rows {data.group_rows}",
            fix=f"ingest again with group_rows of at most {max(1, data.num_rows)}",
        )
    group = data.group_rows * config.data.views_per_image
    batch = config.optim.global_batch
    if batch % group:
        near = [n for n in (batch // group * group, batch // group * group + group) if n]
        raise ConfigError(
            f"a step takes whole row groups of {data.group_rows} images × {config.data.views_per_image} views",
            key="optim.global_batch",
            found=batch,
            allowed=" or ".join(map(str, near)),
            fix="take one of these, or ingest again with another group_rows",
        )
    k = batch // group
    check_shares(config, group, k)
    if config.cluster.min_workers is not None and k % config.cluster.workers:
        raise ConfigError(
            f"workers that may become fewer must divide the row groups of a step ({k})",
            key="cluster.workers",
            found=f"{config.cluster.workers}, with cluster.min_workers {config.cluster.min_workers}",
            allowed=", ".join(str(d) for d in range(config.cluster.min_workers, k + 1) if k % d == 0),
            fix="take one of these, or set cluster.min_workers: null",
        )
    total, warmup = _steps(config.optim, data.num_row_groups / k)
    _check_skipped(config.training.skip_steps, total)
    plain: dict[str, Any] = identity(config)
    for key in ("epochs", "steps", "warmup_epochs", "warmup_steps"):
        plain["optim"].pop(key)
    plain["optim"] |= {  # equal meaning, equal run: epochs or steps, defaults by name or by value
        "total_steps": total,
        "warmup_steps": warmup,
        "weight_decay_end": config.optim.final_weight_decay,
    }
    plain |= {"dataset": data.fingerprint, "init_digest": init_digest}
    run = fingerprint(plain)
    return RunPlan(
        run_name=f"{config.name}-{run[:8]}",
        fingerprint=run,
        identity=plain,
        num_row_groups=data.num_row_groups,
        group_rows=data.group_rows,
        views_per_image=config.data.views_per_image,
        groups_per_step=k,
        total_steps=total,
        warmup_steps=warmup,
    )


def check_shares(config: RunConfig, group: int, k: int) -> None:
    """Whether `k` row groups of `group` views a step can be dealt to the workers, and cut into micro-batches.

    Raises:
        ConfigError: they cannot.
    """
    if config.cluster.workers > k:
        raise ConfigError(
            f"more workers than a step has row groups ({k})",
            key="cluster.workers",
            found=config.cluster.workers,
            allowed=f"1 to {k}",
            fix=f"use fewer workers, or a global batch of at least {config.cluster.workers * group}",
        )
    micro = config.training.micro_batch
    if micro is not None and micro % group and group % micro:
        raise ConfigError(
            f"a micro-batch is whole row groups or a divisor of one ({group} views)",
            key="training.micro_batch",
            found=micro,
            allowed=", ".join(str(d) for d in range(1, group + 1) if group % d == 0) + f", or multiples of {group}",
        )
    if micro is not None and micro % group and isinstance(config.model, SparseConvConfig):
        raise ConfigError(
            f"batch normalisation takes its statistics over whole row groups ({group} views)",
            key="training.micro_batch",
            found=micro,
            allowed=f"multiples of {group}",
            fix="take one, or ingest again with a smaller group_rows",
        )


def _check_skipped(steps: Sequence[int], total: int) -> None:
    beyond = [step for step in steps if step >= total]
    if beyond:
        raise ConfigError(
            "the run has no such step: they are counted from 0",
            key="training.skip_steps",
            found=beyond[0] if len(beyond) == 1 else beyond,
            allowed=f"0 to {total - 1}",
        )
    if len(steps) == total:
        raise ConfigError("no step would be left to train", key="training.skip_steps", found=f"all {total}")


def worker_counts(cluster: PretrainClusterConfig, groups_per_step: int) -> list[int]:
    """Numbers of workers that a run may have, the largest first.

    Where there are several, each divides the row groups of a step: so streams start at the first worker's turn wherever
    they start, and no worker waits for another.
    """
    if cluster.min_workers is None:
        return [cluster.workers]
    return [n for n in range(cluster.workers, cluster.min_workers - 1, -1) if groups_per_step % n == 0]


def _steps(optim: OptimConfig, steps_per_pass: float) -> tuple[int, int]:
    total = optim.steps or max(1, round((optim.epochs or 0) * steps_per_pass))
    if optim.warmup_steps is not None:
        warmup = optim.warmup_steps
    elif optim.warmup_epochs is not None:
        warmup = round(optim.warmup_epochs * steps_per_pass)
    else:
        warmup = round(0.05 * total)
    if warmup >= total:
        raise ConfigError(
            "the warm-up must be shorter than the run",
            key="optim.warmup_epochs" if optim.warmup_epochs is not None else "optim.warmup_steps",
            found=f"{warmup} of {total} steps",
            allowed=f"at most {total - 1} steps",
        )
    return total, warmup


def padding_waste(workers: int, groups_per_step: int) -> float:
    """Share of the workers' time spent on repeats of weight 0, where workers do not divide the groups of a step."""
    rounds = -(-groups_per_step // workers)
    return 1 - groups_per_step / (rounds * workers)
