"""One optimiser step: the part that must be fast. The host never waits for the device here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from maskray.config.schema import RunConfig
from maskray.data.device import moved
from maskray.data.stream import Batch
from maskray.models.sparse_layers import drop_statistics, group_norms, settle_statistics
from maskray.objective import Objective
from maskray.training.optim import Optimizer, Schedule
from maskray.training.sharding import whole
from maskray.training.spikes import SpikeWatch


@dataclass(frozen=True)
class StepReport:
    """What the host learns at a log step, from one transfer."""

    loss: float
    """Mean over the steps that were trained since the last report; NaN where none was."""
    grad_norm: float
    """Mean over the same steps, before clipping."""
    first_bad_step: int | None
    """First step with a non-finite loss or gradient norm, or whose loss leapt: no update has been applied since."""
    leap: tuple[float, float] | None
    """Of that step, where all of it was finite: its loss, and the median of those before it."""
    views_without_image: int
    """Views of the same steps whose image could not be decoded: their slots counted for nothing."""
    leaving: int
    """The most nodes of which a step was told that they will be taken away."""


class TrainStep:
    """Forward, backward, update on a worker's share of a step; gradients are summed over workers.

    The loss of a step is Σ weight · loss / global batch over all views of all workers, so it does not depend on how the
    views are split into workers and micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        normalize: nn.Module,
        objective: Objective,
        optimizer: Optimizer,
        schedule: Schedule,
        config: RunConfig,
        device: torch.device,
    ) -> None:
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        # Statistics are reduced once a step, by `settle_statistics`.
        ddp = self._world > 1 and not isinstance(model, FSDPModule)
        self._model = DistributedDataParallel(model, broadcast_buffers=False) if ddp else model
        self._norms = group_norms(model)
        self._normalize: Callable[..., torch.Tensor] = normalize
        self._objective: Callable[..., torch.Tensor] = objective
        if config.training.compile:  # many passes over the pixels become one; the model is compiled where it is placed
            self._normalize, self._objective = (
                torch.compile(each, dynamic=False) for each in (normalize, objective.__call__)
            )
        self._optimizer, self._schedule = optimizer, schedule
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._global_batch = config.optim.global_batch
        self._clip_norm = config.optim.clip_norm
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bf16")
        self._device = device
        # On the device: sums of loss, gradient norm and weights since the last report, whether any step was not finite,
        # and the first that was not. `found_inf` is the flag that the optimiser reads: once set, it stays.
        self._sums = torch.zeros(3, device=device, dtype=torch.float64)
        self._found_inf = torch.zeros((), device=device)
        self._first_bad = torch.full((), -1, device=device, dtype=torch.int64)
        self._leaving = torch.zeros((), device=device)
        self._steps_summed = 0
        optimizer.found_inf = self._found_inf
        spike = config.training.spike
        self._watch = None if spike is None else SpikeWatch(spike, device)
        # Loss and gradient norm of the first bad step, and the median of the losses before it.
        self._of_first_bad = torch.full((3,), math.nan, device=device)

    def warm_up(self, batch: Batch) -> None:
        """One backward on a batch that does not count, discarded, before the state is loaded.

        DDP lays its buckets anew after the first backward, and the place in a bucket decides the order in which
        gradients are added: without this a resumed run of three workers and more differs in its last bits.
        """
        self._backward(batch)
        self._optimizer.zero_grad()
        drop_statistics(self._norms)

    def __call__(self, number: int, batches: list[Batch], leaving: int = 0) -> None:
        """Train on a worker's batches of step `number`; all but the last keep their gradients to themselves.

        `leaving`: nodes that will be taken away, of one worker's knowledge; all of them learn it with the loss.
        """
        self._optimizer.zero_grad()
        sums = torch.zeros(3, device=self._device)  # of loss and weights, and what is told
        if leaving:
            sums[2] = leaving
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            if isinstance(self._model, FSDPModule):
                self._model.set_requires_gradient_sync(is_last)
            with self._alone(not is_last):
                sums[:2] += self._backward(batch)
        if self._world > 1:
            dist.all_reduce(sums)
        settle_statistics(self._norms)
        loss, weight, told = sums.unbind()
        self._leaving = torch.maximum(self._leaving, told)
        norm = whole(nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if self._watch is not None:
            leapt, median = self._watch.leaps(loss)
            bad |= leapt
            is_first = bad & (self._first_bad < 0)
            self._of_first_bad = torch.where(is_first, torch.stack([loss, norm, median]), self._of_first_bad)
        self._first_bad = torch.where(bad & (self._first_bad < 0), number, self._first_bad)
        self._found_inf.logical_or_(bad)
        self._schedule.apply(self._optimizer, number)
        self._optimizer.step()
        self._sums += torch.stack([loss, norm, weight])
        self._steps_summed += 1

    def report(self) -> StepReport:
        """Means since the last report. This waits for the device: call it at log steps."""
        told = [self._sums, self._first_bad[None].double(), self._of_first_bad.double(), self._leaving[None].double()]
        loss, norm, weight, first_bad, bad_loss, bad_norm, median, leaving = torch.cat(told).tolist()
        count, self._steps_summed = self._steps_summed, 0
        self._sums.zero_()
        return StepReport(
            loss=loss / count if count else math.nan,
            grad_norm=norm / count if count else math.nan,
            first_bad_step=None if first_bad < 0 else int(first_bad),
            leap=(bad_loss, median) if math.isfinite(bad_loss) and math.isfinite(bad_norm) else None,
            views_without_image=count * self._global_batch - round(weight),
            leaving=round(leaving),
        )

    def recent_losses(self) -> list[float]:
        """What a later step's loss is compared with, for a checkpoint; none where nothing is."""
        return [] if self._watch is None else self._watch.losses()

    def recall(self, losses: Sequence[float]) -> None:
        """Take up what `recent_losses` gave."""
        if self._watch is not None:
            self._watch.recall(losses)

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Gradients of a batch; its part of the step's loss and of its weights, as a tensor of two."""
        images_BCHW = self._normalize(moved(batch.images_BCHW, self._device))
        visible_BHW, weights_B = moved(batch.visible_BHW, self._device), moved(batch.weights_B, self._device)
        target_BHW = moved(batch.target_BHW, self._device)
        with self._autocast:
            pred_BLP = self._model(images_BCHW, visible_BHW, batch.num_visible, target_BHW, batch.num_target, weights_B)
        loss_B = self._objective(images_BCHW, pred_BLP, target_BHW)
        loss: torch.Tensor = (weights_B * loss_B).sum() / self._global_batch
        (loss * self._world).backward()  # DDP and FSDP average the gradients over the workers where their sum is wanted
        return torch.stack([loss.detach(), weights_B.sum()])

    def _alone(self, alone: bool) -> contextlib.AbstractContextManager[None]:
        if alone and isinstance(self._model, DistributedDataParallel):
            return self._model.no_sync()
        return contextlib.nullcontext()
