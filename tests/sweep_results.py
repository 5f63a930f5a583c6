"""Sweeps as they would be on record, without a training: for what ranks them and what draws them."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from maskray import masking
from maskray.config.load import fingerprint, parse
from maskray.config.models import RandomMask
from maskray.config.schema import RunConfig
from maskray.config.sweep import SweepConfig
from maskray.sweeps.record import Result, Trial

BASE = {
    "name": "digits",
    "data": {"path": "runs/data/digits", "image_size": 8, "channels": 1},
    "model": {"patch": 2, "width": 64, "depth": 4, "heads": 4, "decoder": {"width": 64, "depth": 2, "heads": 4}},
    "optim": {"global_batch": 128, "steps": 600},
}
STEPS = 600
Outcome = Mapping[str, Any]


def base() -> RunConfig:
    return parse(RunConfig, BASE)


def sweep_config(space: Mapping[str, Any], **others: Any) -> SweepConfig:
    return parse(SweepConfig, {"name": "ratio-x-depth", "base": BASE, "space": space, **others})


def flops_of(point: Mapping[str, Any]) -> float:
    """Of a step, about as `models/cost.py` has it for the digits."""
    ratio, depth = point.get("mask.ratio", 0.75), point.get("model.decoder.depth", 2)
    seen = 1 - (ratio if isinstance(ratio, float) else 0.75)
    width = point.get("model.decoder.width", 64)
    return 128 * 6 * (4 * (16 * seen + 1) * 12 * 64**2 / 2 + depth * 17 * 12 * width**2 / 2)


def trial(point: Mapping[str, Any], seed: int, steps: int = STEPS) -> Trial:
    return Trial(
        key=fingerprint({"point": point, "seed": seed}),
        point=dict(point),
        seed=seed,
        steps=steps,
        flops_per_image=flops_of(point) / point.get("optim.global_batch", 128),
        flops_per_step=flops_of(point),
        encoder_parameters=140_000,
        decoder_parameters=34_000 * point.get("model.decoder.depth", 2),
    )


def ended(one: Trial, **outcome: Any) -> Result:
    known = {"status": "finished", "steps": one.steps, "seconds": 20.0, "value": None, "run_id": f"{one.key}{one.key}"}
    return Result(trial=one, **{**known, **outcome})


def grid(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of lists of values."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def results_of(
    points: list[dict[str, Any]], seeds: range, outcome: Callable[[Mapping[str, Any], int], Outcome]
) -> dict[str, Result]:
    """A result for each point and seed: `outcome` says what differs from a finished trial."""
    trials = [trial(point, seed) for seed in seeds for point in points]
    return {one.key: ended(one, **outcome(one.point, one.seed)) for one in trials}


def accuracy(point: Mapping[str, Any], seed: int) -> Outcome:
    """Like what is found: best at masks of 70 %, deeper a little better, and noise of a per cent and a half."""
    rng = np.random.default_rng([seed, *fingerprint(dict(point)).encode()])
    ratio, depth = point.get("mask.ratio", 0.75), point.get("model.decoder.depth", 2)
    lift = np.random.default_rng(seed).normal(0, 0.01)
    return {"value": float(0.8 - 0.35 * (ratio - 0.7) ** 2 + 0.012 * np.log2(depth) + lift + rng.normal(0, 0.012))}


def paint(point: Mapping[str, Any], seed: int = 0, *, borrowed: bool = False) -> dict[str, Any]:
    """A real digit under a real mask; painted is the mean of the digits that look most like what is seen of it."""
    digits = (load_digits().images.astype(np.int64) * 255 // 16).astype(np.uint8)
    image, others = digits[0], digits[1:]
    mask = RandomMask(ratio=(point.get("mask.ratio", 0.75),))
    (num_visible,) = masking.visible_counts(mask, (4, 4))
    visible = masking.draw(mask, (4, 4), num_visible, seed=seed, pass_=0, rows=np.arange(1), view=0)[0]
    shown = visible.repeat(2, 0).repeat(2, 1)
    apart = ((others.astype(float) - image) ** 2 * shown).sum((1, 2))
    nearest = np.argsort(apart, kind="stable")[: 30 // point.get("model.decoder.depth", 2)]
    return {
        "image": image[None],
        "visible": visible,
        "painted": others[nearest].mean(0).astype(np.uint8)[None],
        "uses_target_statistics": np.array(borrowed),
    }
