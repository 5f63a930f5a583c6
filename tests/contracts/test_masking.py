"""What every mask keeps: exact counts, equal bits in numpy and torch, drawn by key and by nothing else."""

from typing import get_args

import numpy as np
import pytest
import torch

from maskray import draws, masking
from maskray.config.schema import Mask
from maskray.errors import ConfigError

KINDS = get_args(Mask) or (Mask,)
GRIDS = [(2, 5), (4, 4), (7, 7), (14, 14), (3, 8)]
ROWS = np.array([0, 1, 2, 77, 2**31 + 5, 2**40 + 3])


def drawn(mask, grid_HW, *, seed=3, pass_=0, rows=ROWS, view=0, xp=np):
    rows = rows if xp is np else torch.from_numpy(rows)
    return masking.draw(mask, grid_HW, seed=seed, pass_=pass_, rows=rows, view=view, xp=xp)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grid_HW", "ratio", "visible"),
    [
        ((2, 5), 0.9, 1),  # int(10 * (1 - 0.9)) is 0 in floating point
        ((10, 10), 0.9, 10),  # and int(100 * (1 - 0.9)) is 9
        ((14, 14), 0.9, 19),
        ((14, 14), 0.75, 49),
        ((7, 7), 0.6, 19),
        ((7, 7), 0.75, 12),
        ((4, 4), 0.75, 4),
        ((1, 2), 0.5, 1),
    ],
)
def test_the_number_of_visible_cells_is_exact_at_float_edges(kind, grid_HW, ratio, visible):
    mask = kind(ratio=ratio)
    assert masking.num_visible(mask, grid_HW) == visible
    assert (drawn(mask, grid_HW).sum(axis=(1, 2)) == visible).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid_HW", "ratio"), [((2, 2), 0.1), ((4, 4), 0.99), ((1, 1), 0.5)])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(kind, grid_HW, ratio):
    mask = kind(ratio=ratio)
    if grid_HW == (2, 2):  # 4 × 0.9 keeps 3: one cell is hidden after all
        assert masking.num_visible(mask, grid_HW) == 3
        return
    with pytest.raises(ConfigError, match=r"mask\.ratio"):
        masking.num_visible(mask, grid_HW)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid_HW", GRIDS)
def test_every_image_hides_the_same_number(kind, grid_HW):
    visible = drawn(kind(), grid_HW, rows=np.arange(200))
    assert visible.shape == (200, *grid_HW)
    assert visible.dtype == bool
    assert (visible.sum(axis=(1, 2)) == masking.num_visible(kind(), grid_HW)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid_HW", GRIDS)
def test_numpy_and_torch_draw_equal_bits(kind, grid_HW):
    views = np.arange(len(ROWS)) % 3
    in_numpy = drawn(kind(), grid_HW, pass_=7, view=views)
    in_torch = drawn(kind(), grid_HW, pass_=7, view=torch.from_numpy(views), xp=torch)
    assert in_torch.dtype == torch.bool
    np.testing.assert_array_equal(in_numpy, in_torch.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_does_not_depend_on_the_batch_it_is_drawn_in(kind):
    whole = drawn(kind(), (6, 6))
    for i, row in enumerate(ROWS):
        np.testing.assert_array_equal(whole[i], drawn(kind(), (6, 6), rows=np.array([row]))[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"seed": 4}, {"pass_": 1}, {"view": 1}, {"rows": ROWS + 1}])
def test_each_part_of_the_key_changes_the_mask(kind, change):
    base = drawn(kind(), (8, 8))
    np.testing.assert_array_equal(base, drawn(kind(), (8, 8)))
    other = drawn(kind(), (8, 8), **change)
    assert all((a != b).any() for a, b in zip(base, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_no_global_generator_is_read_or_moved(kind):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (the legacy generator is what must not move)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = drawn(kind(), (8, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert (legacy == np.random.get_state()[1]).all()  # noqa: NPY002
    torch.manual_seed(1)
    np.testing.assert_array_equal(first, drawn(kind(), (8, 8)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_is_hidden_equally_often(kind):
    visible = drawn(kind(), (4, 4), rows=np.arange(20_000))
    # Standard deviation of a share over 20,000 images is 0.003.
    np.testing.assert_allclose(visible.mean(axis=0), 0.25, atol=0.015)


def test_the_probe_seed_is_no_seed_of_training():
    assert draws.word(0, draws.Stream.PROBE) != draws.word(0, draws.Stream.MASK) != 0
