"""Optimisers and the MAE recipe (He et al. 2022, Table 8; the authors' `util/lr_sched.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lamb
from torch import Tensor, nn

from maskray.config.resolve import RunPlan
from maskray.config.training import OptimConfig
from maskray.models.base import Part


class FusedAdamW(torch.optim.AdamW):
    """Torch's own, whose fused kernel reads the flag `found_inf`."""

    found_inf: Tensor
    """On the device: where it is not 0, a step changes nothing, with no word to the host."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, fused=True, **options)


class SkippingLamb(Lamb):
    """timm's, in which a step that `found_inf` forbids is undone on the device."""

    found_inf: Tensor
    """As `FusedAdamW.found_inf`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update, or leave weights and moments as they are."""
        before = {id(tensor): tensor.clone() for tensor in self._tensors()}
        super().step(closure)
        for tensor in self._tensors():  # moments that were not there begin at 0
            was = before[id(tensor)] if id(tensor) in before else torch.zeros_like(tensor)
            tensor.copy_(torch.where(self.found_inf.bool(), was, tensor))

    def _tensors(self) -> Iterator[Tensor]:
        """Weights that get an update, and their moments."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    yield weight
                    yield from self.state[weight].values()


Optimizer = FusedAdamW | SkippingLamb

_NOT_DECAYED = ("pos_embed", "cls_token", "reg_token")
"""In fine-tuning; in pretraining the authors decay them."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimiser in two groups: weight decay on tensors of two dimensions and more, none on biases and norms.

    As in the authors' code (timm's rule), the class and mask tokens, three-dimensional, are decayed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "decays": True},
        {"params": [p for p in trained if p.ndim <= 1], "decays": False, "weight_decay": 0.0},
    ]
    options = {"lr": 0.0, "betas": config.betas, "weight_decay": config.weight_decay}
    match config.name:
        case "adamw":
            return FusedAdamW(groups, **options)
        case "lamb":
            # timm leaves the trust ratio out where the decay is 0, of matrices too.
            for group in groups:
                group["always_adapt"] = group["decays"]
            return SkippingLamb(groups, max_grad_norm=None, **options)  # `clip_norm` clips


def build_layered_optimizer(
    layers: Sequence[Iterable[tuple[str, nn.Parameter]]], betas: tuple[float, float], weight_decay: float, decay: float
) -> FusedAdamW:
    """AdamW whose learning rate falls from layer to layer towards the pixels (the MAE authors' `util/lr_decay.py`).

    Biases, norms, positions and tokens of no cell are not decayed, as there.

    Args:
        layers: names and parameters of each, from the pixels on; the last one gets the whole rate.
        betas: of AdamW.
        weight_decay: of matrices.
        decay: from a layer to the one before it. `Schedule.apply` reads `lr_scale` of the groups.
    """
    groups: list[dict[str, Any]] = []
    for i, layer in enumerate(layers):
        parameters, scale = list(layer), decay ** (len(layers) - 1 - i)
        for decays in (True, False):
            some = [p for name, p in parameters if (p.ndim > 1 and name.split(".")[-1] not in _NOT_DECAYED) == decays]
            options = {} if decays else {"weight_decay": 0.0}
            groups += [{"params": some, "decays": decays, "lr_scale": scale, **options}] if some else []
    return FusedAdamW(groups, lr=0.0, betas=betas, weight_decay=weight_decay)


def named_layers(network: nn.Module, layers: Iterable[Iterable[Part]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Names and parameters of layers that together are all of a network; those without parameters are left out."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    out = []
    for layer in layers:
        found = list[nn.Parameter]()
        for part in layer:
            found += [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        out.append([(names.pop(parameter), parameter) for parameter in found])
    assert not names, f"parameters of no layer: {sorted(names.values())}"
    return [layer for layer in out if layer]


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of each step, on the host: a function of the step alone."""

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int
    weight_decay: float
    weight_decay_end: float

    @classmethod
    def of(cls, config: OptimConfig, plan: RunPlan) -> Schedule:
        """The schedule of a run; the peak is base_lr × global batch / 256."""
        return cls(
            peak_lr=config.base_lr * plan.global_batch / 256,
            min_lr=config.min_lr,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.total_steps,
            weight_decay=config.weight_decay,
            weight_decay_end=config.final_weight_decay,
        )

    def lr(self, step: int) -> float:
        """Learning rate of a step (from 0): linear from 0 to the peak, then half a cosine to `min_lr`."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        return self.min_lr + (self.peak_lr - self.min_lr) * self._half_cosine(step)

    def decay(self, step: int) -> float:
        """Weight decay of a step: half a cosine from `weight_decay` to `weight_decay_end` over the whole run."""
        left = 0.5 * (1 + math.cos(math.pi * step / self.total_steps))
        return self.weight_decay_end + (self.weight_decay - self.weight_decay_end) * left

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the optimiser's groups for a step."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(step) * group.get("lr_scale", 1.0)
            if group["decays"]:
                group["weight_decay"] = self.decay(step)

    def _half_cosine(self, step: int) -> float:
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * done))
