"""The recipe: learning rate, weight decay, and who is decayed."""

import math
from typing import get_args

import pytest
import torch
from timm.optim import Lamb

from maskray.config.resolve import DatasetFacts, resolve
from maskray.config.training import OptimConfig
from maskray.models.build import initial_model
from maskray.training.optim import Schedule, build_optimizer

FACTS = DatasetFacts("0" * 16, 16, 80, 1280)


def schedule(tiny, **optim):
    config = tiny(optim={"steps": 100, "warmup_steps": 10, "base_lr": 0.1, **optim})
    return Schedule.of(config.optim, resolve(config, FACTS))


def test_the_peak_scales_with_the_global_batch(tiny):
    assert schedule(tiny, global_batch=512).peak_lr == pytest.approx(0.1 * 512 / 256)
    assert schedule(tiny, global_batch=64).peak_lr == pytest.approx(0.1 * 64 / 256)


def test_the_learning_rate_is_the_closed_form(tiny):
    s = schedule(tiny, min_lr=0.001)
    peak = 0.025
    assert s.lr(0) == 0
    assert s.lr(5) == pytest.approx(peak / 2)
    assert s.lr(10) == pytest.approx(peak)
    assert s.lr(55) == pytest.approx((peak + 0.001) / 2)
    assert s.lr(100) == pytest.approx(0.001)
    for step in range(10, 100):
        expected = 0.001 + (peak - 0.001) * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert s.lr(step) == pytest.approx(expected)
        assert s.lr(step + 1) < s.lr(step)


def test_without_a_warm_up_the_first_step_has_the_peak(tiny):
    assert schedule(tiny, warmup_steps=0).lr(0) == pytest.approx(0.025)
    assert schedule(tiny, steps=1, warmup_steps=0).lr(0) == pytest.approx(0.025)


def test_weight_decay_is_a_cosine_over_the_whole_run(tiny):
    s = schedule(tiny, weight_decay=0.04, weight_decay_end=0.4)
    assert s.decay(0) == pytest.approx(0.04)
    assert s.decay(50) == pytest.approx(0.22)
    assert s.decay(100) == pytest.approx(0.4)
    assert s.decay(25) == pytest.approx(0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi / 4)))


def test_weight_decay_stays_where_no_end_is_given(tiny):
    s = schedule(tiny, weight_decay=0.04)
    assert {s.decay(step) for step in range(101)} == {0.04}
    assert schedule(tiny, weight_decay=0.04, weight_decay_end=0).decay(100) == pytest.approx(0)


def names(model, group):
    numbers = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in numbers}


@pytest.mark.parametrize("positions", ["fixed", "learnable"])
def test_biases_and_norms_are_not_decayed_and_fixed_positions_not_trained(tiny, positions):
    config = tiny(model={"positions": positions})
    model = initial_model(config)
    decayed, plain = build_optimizer(model, config.optim).param_groups
    assert all(name.endswith(".bias") or "norm" in name for name in names(model, plain))
    assert not any(name.endswith(".bias") or "norm" in name for name in names(model, decayed))
    assert {"cls_token", "mask_token", "patch_embed.proj.weight"} <= names(model, decayed)
    together = names(model, plain) | names(model, decayed)
    table = {"pos_embed", "decoder_pos_embed"}
    assert together == {n for n, _ in model.named_parameters()} - (table if positions == "fixed" else set())
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0, config.optim.weight_decay)


NAMES = get_args(OptimConfig.model_fields["name"].annotation)


@pytest.mark.parametrize("name", NAMES)
def test_the_flag_of_any_optimiser_skips_an_update(name):
    weight, optimizer = one_weight(name)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3))


def test_lamb_does_not_wait_for_the_device():
    """Tensors without values: whatever would have to look at one raises. Torch's fused kernels do not know them."""
    _, optimizer = one_weight("lamb", device="meta")
    optimizer.found_inf = torch.zeros((), device="meta")
    for _ in range(2):
        optimizer.step()


def test_lamb_is_timms_and_leaves_clipping_to_clip_norm():
    weight, optimizer = one_weight("lamb")
    optimizer.found_inf = torch.zeros(())
    plain = torch.nn.Parameter(torch.ones(3))
    theirs = Lamb([plain], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=None)
    for number in range(1, 4):
        weight.grad, plain.grad = torch.full((3,), 5.0 * number), torch.full((3,), 5.0 * number)
        optimizer.step()
        theirs.step()
    assert torch.equal(weight, plain)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_is_that_of_its_paper(decay):
    """You et al. 2020, Algorithm 2: Adam's direction plus decay, as long as the weight, times the learning rate."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
    expected, first, second = weight.detach().double(), 0.0, 0.0
    config = OptimConfig(name="lamb", steps=1, weight_decay=decay)
    optimizer = build_optimizer(torch.nn.ParameterList([weight]), config)
    optimizer.found_inf = torch.zeros(())
    optimizer.param_groups[0]["lr"] = 0.1
    for step in range(1, 6):
        weight.grad = torch.randn(3, 4, generator=generator)
        optimizer.step()
        gradient = weight.grad.double()
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient.square()
        direction = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + optimizer.param_groups[0]["eps"])
        direction = direction + decay * expected
        expected = expected - 0.1 * expected.norm() / direction.norm() * direction
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def one_weight(name, device="cpu"):
    """A weight with a gradient, and its optimiser."""
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = build_optimizer(torch.nn.ParameterList([weight]), OptimConfig(name=name, steps=1))
    optimizer.param_groups[1]["lr"] = 0.1
    weight.grad = torch.ones(3, device=device)
    return weight, optimizer
