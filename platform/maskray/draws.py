"""Keyed random numbers: the same in numpy and in torch, on any worker, in any order.

A draw is a function of (seed, stream, pass, row, view, counter) and of nothing else, so a crop or a mask can be drawn
anywhere, again, or for one image alone. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011; test vectors of its reference library Random123 are in the tests).

    key      (seed low 32 bits, seed high 32 bits)
    counter  (counter, row low 32 bits, pass, stream 8 bits | view 8 bits | row high 16 bits)

All arithmetic is on int64, which wraps alike in numpy and torch (torch has no shifts for uint64).
"""

from __future__ import annotations

from enum import IntEnum
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    Array = np.ndarray[Any, np.dtype[Any]] | torch.Tensor

MASK32 = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """What a draw is for. Numbers are part of the format of a run: append, never renumber."""

    PLAN = 0
    CROP = 1
    FLIP = 2
    MASK = 3
    RATIO = 4
    INGEST = 5
    HELD_OUT = 6
    PROBE = 7
    TARGET = 8
    BOOTSTRAP = 9
    COURSE = 10
    SEARCH = 11


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Four 32-bit words for each counter, as int64 arrays of the counters' common shape.

    Args:
        counter: four int64 arrays (numpy or torch) with values below 2**32 and one common shape.
        key: two integers below 2**32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]  # wraps as int64: the 64 bits are right
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & MASK32, (k1 + _WEYL[1]) & MASK32
    return c0, c1, c2, c3


def words(*, seed: int, stream: Stream, pass_: Any, row: Any, view: Any, num: int, xp: ModuleType = np) -> Any:
    """`num` words of 32 bits for each (pass, row, view), as int64 of shape (B, num).

    Args:
        seed: the run's seed, 0 <= seed < 2**64.
        stream: what the words are for.
        pass_: (B,) int64 or a scalar: the pass over the data that the row is read in, below 2**32.
        row: (B,) int64: the row's number in the dataset, below 2**48.
        view: (B,) int64 or a scalar: which of the image's views, below 256.
        num: how many words.
        xp: `numpy` or `torch`; says what the arrays are.
    """
    zeros = row * 0
    pass_, view = zeros + pass_, zeros + view
    blocks = xp.arange((num + 3) // 4) if xp is np else xp.arange((num + 3) // 4, device=row.device)
    grid = zeros[:, None] + blocks[None, :]
    tag = (int(stream) << 24) | (view << 16) | (row >> 32)
    same = grid * 0
    out = philox(
        (grid, same + (row & MASK32)[:, None], same + pass_[:, None], same + tag[:, None]),
        (seed & MASK32, (seed >> 32) & MASK32),
    )
    return xp.stack(out, -1).reshape(len(row), -1)[:, :num]


def uniform(*, seed: int, stream: Stream, pass_: Any, row: Any, view: Any, num: int, xp: ModuleType = np) -> Any:
    """As `words`, as float64 in [0, 1), exact multiples of 2**-32 (so numpy and torch agree to the bit)."""
    drawn = words(seed=seed, stream=stream, pass_=pass_, row=row, view=view, num=num, xp=xp)
    return (drawn if xp is np else drawn.double()) / 2.0**32  # torch alone would divide in float32


def word(seed: int, stream: Stream, *parts: int) -> int:
    """One 64-bit integer drawn by up to three integer parts: for seeds of other generators and for round keys."""
    a, b, c = (*parts, 0, 0, 0)[:3]
    counter = tuple(
        np.array([v & MASK32], dtype=np.int64) for v in (a, b, c, (int(stream) << 24) | ((a >> 32) & 0xFFFF))
    )
    low, high, *_ = philox(counter, (seed & MASK32, (seed >> 32) & MASK32))  # type: ignore[arg-type]
    return int(low[0]) | (int(high[0]) << 32)
