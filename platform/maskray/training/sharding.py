"""Models divided among the workers (FSDP2): each holds a part of every parameter, and gathers a block while it runs.

A checkpoint is that of the whole model all the same: a run may go on sharded or not, on any number of workers, and
whoever reads one needs no workers at all. So the first worker's host holds weights and moments whole while one is
written, 12 bytes a parameter, and each host while one is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from maskray.models.vit import MaskedAutoencoderViT


def shard(model: MaskedAutoencoderViT) -> None:
    """Divide a transformer's parameters among all workers, in place; the names of its state stay.

    Blocks are gathered one at a time. Before the model is placed: a part of a block goes to the device, never the whole
    model. And before the optimiser is made, which must know the parts.
    """
    for block in (*model.blocks, *model.decoder_blocks):
        fully_shard(block)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(value: Any) -> Any:
    """A tensor as it is on all workers together. Each of them must ask, in the same order."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def load_model(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """As `load_state_dict`, of whole tensors, into a model that may be sharded."""
    state = model.state_dict()
    model.load_state_dict({name: _like(value, state.get(name)) for name, value in weights.items()})


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """As `load_state_dict`, of whole tensors, into the optimiser of a model that may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        number: {
            name: _like(value, parameters[number]) if _is_of(value, parameters[number]) else value
            for name, value in of_parameter.items()
        }
        for number, of_parameter in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _is_of(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _like(value: Tensor, model: Any) -> Tensor:
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
