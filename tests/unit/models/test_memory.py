"""The memory model against what torch keeps for the backward pass."""

import pytest
import torch

from maskray.config.models import ObjectiveConfig
from maskray.models.memory import activations, memory
from maskray.objective import Objective

WITHIN = 0.15


def kept_bytes(build, precision, num_images):
    """Bytes of the storages, each once, that autograd keeps; weights themselves are not among them."""
    model, images, visible, target = build(num_images)
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no two get the same address
        return tensor

    num_visible, num_target = int(visible[0].sum()), int(target[0].sum())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            pred = model(images, visible, num_visible, target, num_target)
        Objective(ObjectiveConfig(norm_pix=False), model.cell_HW)(images, pred, target).mean()
    expected = activations(model, num_visible, num_target, num_images, precision)
    return sum(s.nbytes() for at, s in storages.items() if at not in own), expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_torch_keeps_for_the_backward_pass(build, precision):
    found, expected = kept_bytes(build, precision, num_images=4)
    assert expected == pytest.approx(found, rel=WITHIN)


def test_weights_gradients_and_moments_are_those_of_the_parameters(build):
    model = build(1)[0]
    alone, many = (memory(model, 1, 1, 1, "bf16", workers) for workers in (1, 2))
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (alone.gradients, alone.optimizer, many.gradients) == (4 * numbers, 8 * numbers, 8 * numbers)
    state = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert alone.weights == many.weights == state
    assert alone.total == state + 12 * numbers + alone.activations
    parts = memory(model, 1, 1, 1, "bf16", 4, sharded=True)
    assert (parts.weights, parts.gradients, parts.optimizer) == (state // 4, numbers, 2 * numbers)
    assert parts.activations == alone.activations
