"""Real pictures for whoever needs a few and has no dataset at hand: pieces of scikit-learn's two photographs.

Shape letters: N images, C channels, H and W pixels down and across.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from sklearn.datasets import load_sample_images

from maskray import draws
from maskray.evaluation.features import Images


def pieces(num: int, channels: int, size_HW: tuple[int, int], seed: int = 0) -> Images:
    """uint8 (N, C, H, W): pieces at places that the seed draws, with every pixel of them; one channel is their mean.

    Args:
        num: N.
        channels: more than three take the colours again and again.
        size_HW: up to any size: a piece that is larger than its photograph is mirrored at the border.
        seed: of the places.
    """
    rng = np.random.default_rng(draws.word(seed, draws.Stream.PROBE))
    out = []
    for number in range(num):
        photograph_HWC = _photographs()[number % 2]
        pad = [max(0, wanted - have) for wanted, have in zip(size_HW, photograph_HWC.shape, strict=False)]
        padded_HWC = np.pad(photograph_HWC, [(0, pad[0]), (0, pad[1]), (0, 0)], mode="symmetric")
        top, left = (int(rng.integers(have - want + 1)) for have, want in zip(padded_HWC.shape, size_HW, strict=False))
        piece_CHW = padded_HWC[top : top + size_HW[0], left : left + size_HW[1]].transpose(2, 0, 1)
        out.append(piece_CHW.mean(0, keepdims=True) if channels == 1 else piece_CHW[np.arange(channels) % 3])
    return np.stack(out).astype(np.uint8)


@cache
def _photographs() -> list[Any]:
    return list(load_sample_images().images)
