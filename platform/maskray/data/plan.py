"""The order of the data as a pure function: position → (pass, row group). No list, no state, no torch.

The plan is an infinite sequence of row groups. Position p lies in pass p // R, at place p mod R of that pass, and the
pass's order is a permutation of the R row groups keyed by (seed, pass): a Feistel network on the next power of four
with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Any position is found in
microseconds with memory for nothing, so a run resumes anywhere from one integer, its step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from maskray.draws import MASK32, Stream, word

Ints = np.ndarray[Any, np.dtype[np.int64]]

_FEISTEL_ROUNDS = 8
_MIN_HALF_BITS = 4  # a network of two bits a half mixes too little; walking 256 places for a tiny R costs nothing


@dataclass(frozen=True)
class Plan:
    """The order in which `num_row_groups` row groups are read, for ever."""

    seed: int
    num_row_groups: int

    def __post_init__(self) -> None:
        assert self.num_row_groups > 0, "resolve() refuses datasets without a full row group"

    def locate(self, position: int) -> tuple[int, int]:
        """(pass, row group) of one position."""
        passes, groups = self.locate_many(np.array([position], dtype=np.int64))
        return int(passes[0]), int(groups[0])

    def locate_many(self, positions: Ints) -> tuple[Ints, Ints]:
        """Passes and row groups, (N,) int64 each, of (N,) positions."""
        passes, places = np.divmod(positions, self.num_row_groups)
        groups = np.empty_like(places)
        for pass_ in np.unique(passes):
            at = passes == pass_
            groups[at] = permute(places[at], self.num_row_groups, self.seed, int(pass_))
        return passes, groups


def permute(places: Ints, size: int, seed: int, pass_: int, stream: Stream = Stream.PLAN) -> Ints:
    """Images of `places` under the permutation of 0 … size-1 keyed by (seed, stream, pass)."""
    keys = _round_keys(seed, pass_, stream)
    half_bits = max(_MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    out = _feistel(places, keys, half_bits)
    while (outside := out >= size).any():  # the domain is under 4 × size (or 256): few walk, and not far
        out[outside] = _feistel(out[outside], keys, half_bits)
    return out


@lru_cache(maxsize=64)
def _round_keys(seed: int, pass_: int, stream: Stream) -> tuple[int, ...]:
    return tuple(word(seed, stream, pass_, r) & MASK32 for r in range(_FEISTEL_ROUNDS))


def _feistel(x: Ints, keys: tuple[int, ...], half_bits: int) -> Ints:
    low = (1 << half_bits) - 1
    left, right = x >> half_bits, x & low
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low)
    return (left << half_bits) | right


def _mix(x: Ints) -> Ints:
    """murmur3's 32-bit finaliser, on int64 that holds 32 bits."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)


def share(step: int, groups_per_step: int, rank: int, world_size: int) -> list[int]:
    """Positions of a step that fall to a worker: position p belongs to worker p mod W.

    Counted from position 0, not from where a stream was opened: so the split over workers, and with it the order in
    which gradients are added, is the same after a resume.
    """
    first = step * groups_per_step
    return list(range(first + (rank - first) % world_size, first + groups_per_step, world_size))


def shared_rounds(groups_per_step: int, world_size: int) -> int:
    """Groups that every worker computes in a step; one without its last group repeats its first with weight 0."""
    return -(-groups_per_step // world_size)
