"""One pretraining run, on one page. Whoever launches it gives the context: Ray, torchrun, a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from maskray import masking
from maskray.config.load import dump
from maskray.config.resolve import resolve
from maskray.config.schema import RunConfig
from maskray.config.training import TrainingConfig
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec
from maskray.data.stream import Batch
from maskray.models.base import MaskedAutoencoder
from maskray.models.build import build_normalize, initial_model
from maskray.models.cost import cost
from maskray.models.foreign import weights_digest
from maskray.models.vit import MaskedAutoencoderViT
from maskray.objective import Objective
from maskray.tracking.base import Tracker
from maskray.tracking.commit import sources_digest
from maskray.training import checkpoint, loop
from maskray.training.context import RunContext, Snapshot
from maskray.training.memory import keep_freed_memory
from maskray.training.optim import Schedule, build_optimizer
from maskray.training.sharding import shard
from maskray.training.step import TrainStep
from maskray.training.throughput import Meter, hardware, rate_of_process

_MOST_GRAPHS = 32
# What the bits of a run depend on. Ray is not one: what it hands over is checked, and its version is on Train's record.
# Of the code here a version would say nothing: a job brings its sources along, and the image has a wheel of another.
PACKAGES = ("torch", "torchvision", "torchcodec", "timm", "numpy", "pillow", "tifffile", "pyarrow")
SOURCES = "maskray's sources"


def pretrain(config: RunConfig, context: RunContext, tracker: Tracker) -> int:
    """Train from the latest checkpoint, or from the start, to the end of the plan; the number of steps done.

    Raises:
        MaskrayError: config, dataset or checkpoint do not fit together.
        TrainingError: the run itself went wrong.
    """
    threads = settle(config)
    if context.device.type == "cpu":
        keep_freed_memory()
    dataset = Dataset.open(config.data.path, config.data.version, unreadable=config.data.unreadable)
    plan = resolve(config, dataset.facts(), weights_digest(config.init_from))
    spec = StreamSpec.of(config, plan, dataset)

    model = placed(initial_model(config, spec.views_per_group), context.device, config.training)
    normalize = build_normalize(config, dataset.manifest).to(context.device)
    objective = Objective(config.objective, config.cell)
    optimizer = build_optimizer(model, config.optim)
    schedule = Schedule.of(config.optim, plan)
    step = TrainStep(model, normalize, objective, optimizer, schedule, config, context.device)
    if config.training.deterministic:
        step.warm_up(zero_batch(spec))

    packages = {SOURCES: sources_digest(Path(__file__).parent), **checkpoint.versions(PACKAGES)}

    def facts(done: int) -> checkpoint.Facts:
        known = (plan.fingerprint, context.world_size, threads, packages, tracker.pending())
        return checkpoint.Facts(done, *known, dict(rates), config.training.skipped_before(done), step.recent_losses())

    def snapshot(done: int) -> Snapshot | None:
        return checkpoint.taken(context.rank, model, optimizer, facts(done), dump(config))

    start_step, rates = 0, dict[str, float]()
    with context.latest_checkpoint() as folder:
        if folder is not None:
            then = checkpoint.restore(folder, model, optimizer, plan.fingerprint, config.training.skip_steps)
            step.recall(then.recent_losses)
            checkpoint.warn_of_differences(then, facts(then.step))
            tracker.restore(then.pending_metrics)
            start_step, rates = then.step, dict(then.matmul_rates)

    on = hardware(context.device, threads)
    if on not in rates:  # once a run: measured again, it would be another, and MFU's curve would jump
        rates[on] = rate_of_process(context.device, config.training.precision, threads)
    tracker.tag("maskray.mfu_of", f"{rates[on]:.4g} FLOP/s in a matrix product ({on})")
    costs = [
        cost(model, num, masking.num_target(config.objective, spec.grid_HW, num)).training_flops
        for num in spec.visible_counts
    ]
    parts = loop.Parts(
        spec=spec,
        step=step,
        schedule=schedule,
        meter=Meter(plan.global_batch, context.world_size, sum(costs) / len(costs), rates[on]),
        snapshot=snapshot,
        probed=lambda done: config.probe.enabled and config.training.probes_after(done),
        ledger=_ledger(config.training.ledger, context.rank),
    )
    return loop.run(parts, config.training, context, tracker, start_step)


def placed(
    model: MaskedAutoencoder,
    device: torch.device,
    config: TrainingConfig,
    backend: str | Callable[..., Any] = "inductor",
) -> MaskedAutoencoder:
    """The model on its device, as it is trained; the parameters keep their names. `backend`: what compiles it."""
    model.remembers_activations = not config.recompute_activations
    if config.shard:
        assert isinstance(model, MaskedAutoencoderViT), "the config shards transformers alone"
        shard(model)
    model.place(device)
    if config.compile:
        # A graph for each ratio of the mask and for each size of a micro-batch: static shapes are the faster ones.
        torch._dynamo.config.recompile_limit = _MOST_GRAPHS
        model.compile(dynamic=False, backend=backend)
    return model


def settle(config: RunConfig) -> int:
    """Set what torch keeps for the whole process; the number of threads."""
    threads = config.training.threads or max(1, int(config.cluster.cpus_per_worker))
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(config.training.deterministic)
    torch.backends.cudnn.benchmark = not config.training.deterministic
    return threads


def settle_probe(config: RunConfig) -> None:
    """As `settle`, in a process that judges beside those that train."""
    settle(config)
    torch.set_num_threads(max(1, int(config.probe.cpus)))


def zero_batch(spec: StreamSpec) -> Batch:
    """One black row group under real masks, for the warm-up."""
    rows, num_visible = torch.arange(spec.views_per_group), spec.num_visible(0)
    visible_BHW = masking.draw(
        spec.mask, spec.grid_HW, num_visible, seed=spec.seed, pass_=0, rows=rows, view=0, xp=torch
    )
    return Batch(
        images_BCHW=torch.zeros(len(rows), spec.channels, *spec.image_size, dtype=torch.uint8),
        visible_BHW=visible_BHW,
        num_visible=num_visible,
        target_BHW=~visible_BHW,
        num_target=visible_BHW[0].numel() - num_visible,
        weights_B=torch.ones(len(rows)),
        keys=[],
    )


def _ledger(folder: str | None, rank: int) -> Path | None:
    if folder is None:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) / f"{rank}.jsonl"
