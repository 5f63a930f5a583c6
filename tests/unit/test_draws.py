"""Keyed draws: the published generator, the same in numpy and torch, a function of the key and nothing else."""

import numpy as np
import pytest
import torch

from maskray import draws
from maskray.draws import Stream

# Known answers of philox4x32-10 from Random123, the reference library: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
ROWS = np.array([0, 1, 2, 12345, 2**32 - 1, 2**32, 2**40 + 7])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers_in_numpy_and_torch(counter, key, expected):
    in_numpy = draws.philox(tuple(np.array([c], dtype=np.int64) for c in counter), key)
    in_torch = draws.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w[0]) for w in in_numpy) == expected
    assert tuple(int(w[0]) for w in in_torch) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("num", [1, 3, 4, 5, 40])
def test_numpy_and_torch_draw_the_same_bits(seed, num):
    key = {"seed": seed, "stream": Stream.CROP, "view": 3, "num": num}
    passes = np.arange(len(ROWS))
    in_numpy = draws.uniform(pass_=passes, row=ROWS, **key)
    in_torch = draws.uniform(pass_=torch.from_numpy(passes), row=torch.from_numpy(ROWS), xp=torch, **key)
    assert in_numpy.shape == (len(ROWS), num)
    assert in_numpy.dtype == np.float64
    np.testing.assert_array_equal(in_numpy, in_torch.numpy())
    assert ((in_numpy >= 0) & (in_numpy < 1)).all()


def test_a_draw_depends_on_its_own_key_alone():
    together = draws.words(seed=5, stream=Stream.MASK, pass_=2, row=ROWS, view=1, num=9)
    for i, row in enumerate(ROWS):
        alone = draws.words(seed=5, stream=Stream.MASK, pass_=2, row=np.array([row]), view=1, num=9)
        np.testing.assert_array_equal(alone[0], together[i])
    fewer = draws.words(seed=5, stream=Stream.MASK, pass_=2, row=ROWS, view=1, num=2)
    np.testing.assert_array_equal(fewer, together[:, :2])


def test_every_part_of_the_key_counts():
    base = {"seed": 1, "stream": Stream.CROP, "pass_": 1, "row": np.array([1]), "view": 1, "num": 4}
    changed = [
        {},
        {"seed": 2},
        {"seed": 1 + 2**32},
        {"stream": Stream.FLIP},
        {"pass_": 2},
        {"row": np.array([2])},
        {"row": np.array([1 + 2**32])},
        {"view": 2},
    ]
    drawn = {tuple(draws.words(**(base | change))[0].tolist()) for change in changed}
    assert len(drawn) == len(changed)


def test_draws_are_spread_evenly():
    sample = draws.uniform(seed=0, stream=Stream.PROBE, pass_=0, row=np.arange(20_000), view=0, num=2)
    counts, _ = np.histogram(sample, bins=16, range=(0, 1))
    assert abs(counts - 2500).max() < 250  # five standard deviations
    assert abs(np.corrcoef(sample.T)[0, 1]) < 0.03


def test_a_word_has_64_bits_and_depends_on_all_its_parts():
    drawn = {draws.word(s, t, *p) for s in (0, 1) for t in (Stream.PLAN, Stream.MASK) for p in ((0,), (1,), (0, 1))}
    assert len(drawn) == 12
    assert all(0 <= w < 2**64 for w in drawn)
    assert max(drawn) > 2**33
