"""The numeric self-tests pass here, and each catches what it is for."""

import numpy as np
import pytest
import torch

from maskray import draws, masking
from maskray.data import decode
from maskray.doctor import numerics
from maskray.doctor.finding import Level, Subject
from maskray.models.vit import MaskedAutoencoderViT


@pytest.mark.parametrize("check", numerics.CHECKS, ids=lambda c: c.name)
def test_they_pass(check):
    state = torch.random.get_rng_state()
    assert check.look(Subject()).level is Level.OK
    assert torch.equal(torch.random.get_rng_state(), state)


class Leaky(MaskedAutoencoderViT):
    def _cells(self, images_BCHW):
        return super()._cells(torch.nn.functional.avg_pool2d(images_BCHW, 3, stride=1, padding=1))


class Blind(MaskedAutoencoderViT):
    def _cells(self, images_BCHW):
        return super()._cells(torch.zeros_like(images_BCHW))


def tiny(kind):
    return lambda: kind(numerics._CONFIG, (numerics._SIDE, numerics._SIDE), numerics._CHANNELS)


def badly_drawn():
    model = numerics.tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    return model


@pytest.mark.parametrize(("kind", "says"), [(Leaky, "hidden pixels change"), (Blind, "visible pixels do not change")])
def test_a_leak_and_a_blind_encoder(kind, says):
    found = numerics.leak(Subject(), tiny(kind))
    assert (found.level, says in found.found) == (Level.FAIL, True)


def test_another_initialisation():
    assert numerics.first_loss(Subject(), badly_drawn).level is Level.FAIL


def test_a_ratio_that_was_multiplied_as_a_float(monkeypatch):
    monkeypatch.setattr(masking, "visible_counts", lambda mask, grid: (int(grid[1] * (1 - mask.ratio[0])),))
    found = numerics.mask_counts(Subject())
    assert found.level is Level.FAIL
    assert "10 cells at ratio 0.9 show 0, not 1" in found.found


def test_a_mask_that_hides_another_number(monkeypatch):
    right = masking.draw
    monkeypatch.setattr(masking, "draw", lambda mask, grid, num, **key: right(mask, grid, num + 1, **key))
    assert "does not show 1 of each image" in numerics.mask_counts(Subject()).found


def test_a_bias_that_decays(monkeypatch):
    def build(model, config):
        return torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)

    monkeypatch.setattr(numerics, "build_optimizer", build)
    found = numerics.optimizer_groups(Subject())
    assert (found.level, "bias" in found.found) == (Level.FAIL, True)


def test_draws_that_differ(monkeypatch):
    words = draws.words

    def differs(*, xp=np, **key):
        return words(xp=xp, **key) + (xp is torch)

    monkeypatch.setattr(draws, "words", differs)
    assert numerics.equal_draws(Subject()).level is Level.FAIL


def test_a_decoder_that_swaps_channels(monkeypatch):
    right = decode.decode
    monkeypatch.setattr(decode, "decode", lambda data, channels: right(data, channels).flip(0))
    assert numerics.decoder(Subject()).level is Level.FAIL
