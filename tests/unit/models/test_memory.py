"""The memory model against what torch keeps for the backward pass."""

from functools import partial

import pytest
import torch

from maskray.config.models import ObjectiveConfig, VitConfig, VitDecoder
from maskray.models.build import build_model
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["self", "cross"])
def test_recomputed_activations_are_the_inputs_of_blocks_and_what_one_block_keeps(attention, precision):
    decoder = VitDecoder(width=64, depth=6, heads=4, attention=attention)
    model = build_model(VitConfig(patch=4, width=128, depth=6, heads=4, decoder=decoder), (64, 64), 3)
    model.remembers_activations = False
    visible = torch.zeros(4, 16, 16, dtype=torch.bool)
    visible[:, :4] = True
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept, of_a_block = {}, {}

    def keep(tensor, where=kept):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            where[storage.data_ptr()] = storage
        return tensor

    blocks = [*model.blocks, *model.decoder_blocks]
    for block in blocks:  # what checkpointing holds
        block.register_forward_pre_hook(lambda _, given: [keep(each) for each in given] and None)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            pred = model(torch.randn(4, 3, 64, 64), visible, 64, ~visible, 192)
        error = pred.float().square()
        largest = 0
        for block, shape in ((blocks[0], (4, 65, 128)), (blocks[6], (4, 257 if attention == "self" else 192, 64))):
            of_a_block.clear()
            given = [torch.randn(shape, requires_grad=True)] + [torch.randn(4, 65, 64)] * (
                attention == "cross" and block is blocks[6]
            )
            with torch.autograd.graph.saved_tensors_hooks(partial(keep, where=of_a_block), lambda tensor: tensor):
                out = block(*given)
            largest = max(largest, sum(storage.nbytes() for storage in of_a_block.values()))
            del out
    found = sum(storage.nbytes() for storage in kept.values()) + error.nbytes + largest
    expected = activations(model, 64, 192, 4, precision, recomputed=True)
    assert expected == pytest.approx(found, rel=WITHIN)
    assert expected < 0.6 * activations(model, 64, 192, 4, precision)


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
