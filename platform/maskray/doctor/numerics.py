"""That this machine's torch computes what the method says, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from maskray import draws, masking
from maskray.config.models import ObjectiveConfig, RandomMask, VitConfig, VitDecoder
from maskray.config.training import OptimConfig
from maskray.data import decode
from maskray.doctor.finding import Check, Finding, Subject, fail, ok
from maskray.models.base import MaskedAutoencoder
from maskray.models.build import build_model
from maskray.objective import Objective
from maskray.training.optim import build_optimizer

_CONFIG = VitConfig(patch=(4, 4), width=32, depth=1, heads=2, decoder=VitDecoder(width=64, depth=1, heads=4))
_SIDE, _CHANNELS, _SEEDS, _IMAGES = 16, 3, 24, 16
_FIX = "pip install --force-reinstall -c constraints.txt torch, and report it where that does not help"
# (cells, ratio, visible): where ratios are no exact floats, a truncated product is one too few or too many.
_EDGES = ((10, 0.9, 1), (10, 0.7, 3), (196, 0.75, 49), (100, 0.29, 71), (100, 0.57, 43), (1000, 0.999, 1))

Build = Callable[[], MaskedAutoencoder]


def tiny_model() -> MaskedAutoencoder:
    """The model of these checks, freshly drawn."""
    return build_model(_CONFIG, (_SIDE, _SIDE), _CHANNELS)


def first_loss(_: Subject, build: Build = tiny_model) -> Finding:
    """(P − 1)/P + 2D/(D + P) under norm_pix within 10 %, on white noise: the initialisation is the authors'."""
    losses = []
    for seed in range(_SEEDS):
        model = _drawn(build, seed)
        images, visible, num_visible = _batch(seed)
        with torch.no_grad():
            loss = Objective(ObjectiveConfig(norm_pix=True), model.cell_HW)
            losses.append(loss(images, model(images, visible, num_visible), ~visible).mean().item())
    P, D = model.cell_pixels, _CONFIG.decoder.width
    found, wanted = float(np.mean(losses)), (P - 1) / P + 2 * D / (D + P)
    words = f"{found:.3f}, {wanted:.3f} by arithmetic"
    return ok(words) if abs(found / wanted - 1) < 0.1 else fail(words, _FIX)


def mask_counts(_: Subject) -> Finding:
    """Each image hides exactly as many cells as the ratio says, at the edges of floats too."""
    wrong = []
    for cells, ratio, wanted in _EDGES:
        mask = RandomMask(ratio=(ratio,))
        (num,) = masking.visible_counts(mask, (1, cells))
        if num != wanted:
            wrong.append(f"{cells} cells at ratio {ratio} show {num}, not {wanted}")
            continue
        drawn = masking.draw(mask, (1, cells), num, seed=0, pass_=0, rows=np.arange(8), view=0)
        if set(drawn.sum(axis=(1, 2)).tolist()) != {num}:
            wrong.append(f"a mask of {cells} cells at ratio {ratio} does not show {num} of each image")
    return fail("; ".join(wrong), _FIX) if wrong else ok(f"exact at {len(_EDGES)} edges")


def leak(_: Subject, build: Build = tiny_model) -> Finding:
    """Hidden pixels do not move the encoding by a bit, and visible ones do."""
    model = _drawn(build, 0).eval()
    images, visible, num_visible = _batch(0)
    shown = visible.repeat_interleave(model.cell_HW[0], 1).repeat_interleave(model.cell_HW[1], 2)[:, None]
    with torch.no_grad():
        before, hidden_moved, shown_moved = (
            model.encode_visible(each, visible, num_visible)
            for each in (images, torch.where(shown, images, 1e4), torch.where(shown, images + 3, images))
        )
    if not torch.equal(before, hidden_moved):
        return fail("hidden pixels change the encoding: the loss would look better than the model is", _FIX)
    if torch.equal(before, shown_moved):
        return fail("visible pixels do not change the encoding", _FIX)
    return ok("hidden pixels do not move the encoding by a bit")


def optimizer_groups(_: Subject, build: Build = tiny_model) -> Finding:
    """Weight decay on matrices and tokens, none on norms and biases, each parameter once."""
    model = _drawn(build, 0)
    groups = build_optimizer(model, OptimConfig(steps=1)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    held = [id(p) for group in groups for p in group["params"]]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = [name for name, p in trained.items() if (id(p) in decayed) != (p.ndim > 1)]
    wrong += [name for name, p in trained.items() if held.count(id(p)) != 1]
    if wrong:
        return fail(f"{', '.join(wrong[:4])}: in the wrong group of the optimiser", _FIX)
    return ok(f"{len(decayed)} of {len(trained)} tensors decay: no norm and no bias")


def equal_draws(_: Subject) -> Finding:
    """Crops and masks are the same in numpy and torch, on any worker."""
    rows = np.arange(64) * 0x1234567
    drawn = partial(draws.words, seed=2**40 + 7, stream=draws.Stream.MASK, pass_=3, view=1, num=9)
    in_numpy, in_torch = drawn(row=rows), drawn(row=torch.from_numpy(rows), xp=torch)
    if not np.array_equal(in_numpy, in_torch.numpy()):
        return fail("numpy and torch draw other numbers: a run would not be repeatable", _FIX)
    return ok("the same bits in numpy and torch")


def decoder(_: Subject) -> Finding:
    """Whether JPEGs are decoded to what was encoded."""
    ramp_HW = torch.arange(64.0).mul(3)[None].expand(64, 64)
    image_CHW = torch.stack([ramp_HW, ramp_HW.T, 255 - ramp_HW]).to(torch.uint8)
    worst = (decode.decode(decode.encode(image_CHW, 95), 3).int() - image_CHW.int()).abs().max().item()
    words = f"a JPEG comes back within {worst} of 255"
    return ok(words) if worst <= 12 else fail(words, "pip install --force-reinstall -c constraints.txt torchcodec")


def _drawn(build: Build, seed: int) -> MaskedAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    images = torch.randn(_IMAGES, _CHANNELS, _SIDE, _SIDE, generator=torch.Generator().manual_seed(seed))
    grid = (_SIDE // _CONFIG.cell[0], _SIDE // _CONFIG.cell[1])
    mask = RandomMask(ratio=(0.75,))
    (num_visible,) = masking.visible_counts(mask, grid)
    visible = masking.draw(mask, grid, num_visible, seed=seed, pass_=0, rows=np.arange(_IMAGES), view=0)
    return images, torch.from_numpy(visible), num_visible


CHECKS = [
    Check("decoder", decoder),
    Check("loss at step 0", first_loss),
    Check("mask counts", mask_counts),
    Check("leak", leak),
    Check("optimiser groups", optimizer_groups),
    Check("draws", equal_draws),
]
